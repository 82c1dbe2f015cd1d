import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, cases, load, read, relative, study_of
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from encoder import Encoder, encoder_config, encoder_tensors
from plumbing import checkpoint
from plumbing.files import read_json
from plumbing.pixels import PixelConfig, open_clip_pixels, pixel_config, preprocess


@pytest.mark.parametrize(("family", "case"), cases(), ids=lambda value: getattr(value, "name", value))
def test_golden_pixels_and_features(family, case):
    libra, expected = load(family), load_file(case / "expected.safetensors")
    images = study_of(read(family, case.name, "expected.json")).images()
    pixels = libra.preprocess([*images, *images][:2])
    torch.testing.assert_close(pixels, expected["pixels"], atol=1e-6, rtol=0)
    assert relative(libra.features(pixels), expected["features"]) < 1e-4


# ------------------------------------------------------------------------------------------- transformers

SIZES = dict(
    hidden_size=36, num_hidden_layers=5, num_attention_heads=3, intermediate_size=108, image_size=30, patch_size=6,
    layer_norm_eps=1e-3,
)  # fmt: skip
TEXT = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
MODELS = {  # encoder repositories as they are on the hub: the tower alone, or beside a text tower
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=3)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)),
    "clip with gelu": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act="gelu")),
    "clip with text": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SIZES)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
    "siglip with text": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=SIZES)),
}


def random_weights(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def read_encoder(settings, stored, **options):
    config = encoder_config(settings, "folder", stored, **options)
    encoder = Encoder(config)
    tensors, parameters = encoder_tensors(encoder, stored), dict(encoder.named_parameters())
    checkpoint.check_fit(parameters, tensors, "")
    checkpoint.load_tensors(parameters, tensors)
    return encoder


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A random encoder of odd sizes in `transformers`, and ours, read from what it saves, plain and with the norm."""
    theirs, folder = random_weights(MODELS[request.param]()), tmp_path_factory.mktemp("encoder")
    theirs.save_pretrained(folder)
    settings = read_json(folder / "config.json")
    stored = checkpoint.list_tensors(checkpoint.locate(folder))
    ours = [read_encoder(settings, stored, final_norm=final_norm) for final_norm in (False, True)]
    return getattr(theirs, "vision_model", theirs), *ours


@torch.no_grad()
def both(pair, *selection, size=30):
    """hidden states of `transformers` (L + 1, from the embeddings on), ours as selected."""
    theirs, ours, _ = pair
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    interpolate = {} if isinstance(theirs, Dinov2Model) else dict(interpolate_pos_encoding=True)
    return theirs(pixels, output_hidden_states=True, **interpolate).hidden_states, ours(pixels, *selection)


@pytest.mark.parametrize("size", [30, 42, 18])  # 42 and 18: the position embeddings are interpolated
def test_every_block_equals_transformers(pair, size):
    hidden, features = both(pair, "all", "cls_patch", size=size)
    assert features.shape == (2, 5, (size // 6) ** 2 + pair[1].config.class_token, 36) and len(hidden) == 6
    for layer in range(5):
        assert relative(features[:, layer], hidden[layer + 1]) < 1e-5


def test_the_default_is_every_block_and_every_patch_without_the_class_token(pair):
    hidden, features = both(pair)
    first = int(pair[1].config.class_token)
    assert features.shape[2] == 25
    assert relative(features, torch.stack(hidden[1:], 1)[:, :, first:]) < 1e-5


@pytest.mark.parametrize("layer", [-1, -2, 3, 0])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_one_layer_is_counted_from_the_embeddings(pair, layer, feature):
    hidden, features = both(pair, layer, feature)
    first = int(pair[1].config.class_token and feature == "patch")
    assert relative(features, hidden[layer][:, None, first:]) < 1e-5


@torch.no_grad()
def test_the_final_norm_gives_the_last_hidden_state(pair):
    theirs, _, normed = pair
    pixels = torch.randn(2, 3, 30, 30)
    expected = theirs(pixels).last_hidden_state  # CLIP's is not normed
    if normed.config.model_type == "clip_vision_model":
        expected = theirs.post_layernorm(expected)
    assert relative(normed(pixels, -1, "cls_patch")[:, 0], expected) < 1e-5


@pytest.mark.parametrize("scales", [True, False])
def test_an_open_clip_checkpoint_gives_what_the_same_weights_give_in_transformers(tmp_path, scales):
    """BiomedCLIP's layout: a timm ViT with fused qkv beside a text tower, its sizes told by the tensors alone."""
    sizes = SIZES | dict(hidden_size=128, num_attention_heads=2, layer_norm_eps=1e-6)
    theirs = random_weights(Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)))
    if not scales:
        for layer in theirs.encoder.layer:
            torch.nn.init.ones_(layer.layer_scale1.lambda1)
            torch.nn.init.ones_(layer.layer_scale2.lambda1)
    theirs.save_pretrained(tmp_path)
    weights, trunk = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in weights if ".attention.attention.query." in name]:
        parts = [weights.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        trunk[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    trunk |= {name: tensor for name, tensor in weights.items() if scales or "layer_scale" not in name}
    for ours, timm in {
        "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed", "encoder.layer.": "blocks.",
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "layernorm.": "norm.",
    }.items():  # fmt: skip
        trunk = {name.replace(ours, timm): tensor for name, tensor in trunk.items() if "mask_token" not in name}
    state = {f"module.visual.trunk.{name}": tensor for name, tensor in trunk.items()}
    state |= {"module.logit_scale": torch.ones(()), "module.text.transformer.embeddings.weight": torch.ones(3, 2)}
    torch.save({"epoch": 7, "name": "x", "state_dict": state, "optimizer": {"lr": [0.1]}}, tmp_path / "checkpoint.pt")
    settings = {"vision_cfg": {"timm_model_name": "vit_base_patch14_dinov2.lvd142m", "image_size": 30}}
    ours = read_encoder(settings, checkpoint.file_tensors(tmp_path / "checkpoint.pt"))
    pixels = torch.randn(2, 3, 30, 30)
    with torch.no_grad():
        hidden = theirs(pixels, output_hidden_states=True).hidden_states
        assert relative(ours(pixels, -2), hidden[-2][:, None, 1:]) < 1e-5


@pytest.mark.parametrize("name", ["resnet50", None])
def test_an_open_clip_checkpoint_of_another_kind_is_refused(name):
    with pytest.raises(ValueError, match="timm_model_name"):
        encoder_config({"vision_cfg": {"timm_model_name": name, "image_size": 30}}, "folder", {})


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_swiglu_ffn", True), ("model_type", "sam"), ("hidden_act", "relu"), ("qkv_bias", False), ("num_channels", 1)],
)
def test_an_unsupported_encoder_is_refused_by_the_name_of_its_field(field, value):
    config = read("libra-7b", "encoder-dinov2", "config.json")
    with pytest.raises(ValueError, match=field):
        encoder_config(config | {field: value}, "folder", {})


@pytest.mark.parametrize("theirs", [Dinov2Config(), CLIPVisionConfig(), SiglipVisionConfig()], ids=str)
def test_sizes_that_config_json_omits_are_those_of_transformers(theirs):
    ours = encoder_config({"model_type": theirs.model_type}, "folder", {})
    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    for name in (*names, "hidden_act"):
        assert getattr(ours, name) == getattr(theirs, name)
    width = getattr(theirs, "intermediate_size", None) or theirs.mlp_ratio * theirs.hidden_size
    assert ours.intermediate_size == width


# ------------------------------------------------------------------------------------------------ pixels

SETTINGS = read("libra-7b", "encoder-dinov2", "preprocessor_config.json")
COLOURS = {"mean": (114, 127, 140), "black": (0, 0, 0)}  # int(255 * MEAN)
MEAN, STD = (0.45, 0.5, 0.55), (0.22, 0.25, 0.28)


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor(size, crop):
    return BitImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": crop, "width": crop}, resample=3, image_mean=list(MEAN),
        image_std=list(STD), rescale_factor=1 / 255, do_convert_rgb=True,
    )  # fmt: skip


def pixels_of(image, size, crop, pad):
    return preprocess(image, PixelConfig(size, crop, MEAN, STD, 1 / 255, pad))


def padded(image, colour):
    """A square of one colour with the image in its middle; the odd pixel goes right or below."""
    side = max(image.size)
    above, left = (side - image.height) // 2, (side - image.width) // 2
    square = np.full((side, side, 3), colour, dtype=np.uint8)
    square[above : above + image.height, left : left + image.width] = np.array(image)
    return Image.fromarray(square)


PICTURES = [(33, 57), (57, 33), (101, 40), (7, 64), (30, 31), (49, 49)]


@pytest.mark.parametrize(("size", "crop"), [(30, 30), (33, 24), (28, 21)])
@pytest.mark.parametrize("shape", PICTURES, ids=str)
def test_pixels_without_padding_are_those_of_transformers(shape, size, crop):
    reference = processor(size, crop)(picture(*shape), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(pixels_of(picture(*shape), size, crop, "none"), reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pad", COLOURS)
@pytest.mark.parametrize("shape", PICTURES, ids=str)
def test_a_padded_image_is_a_square_one(shape, pad):
    reference = processor(30, 30)(padded(picture(*shape), COLOURS[pad]), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(pixels_of(picture(*shape), 30, 30, pad), reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pad", COLOURS)
def test_an_odd_margin_is_wider_on_the_right_and_below(pad):
    """33 × 40 at size 40: nothing is resized, so every pixel can be looked up."""
    tall = picture(33, 40)
    for image, axis in ((tall, 2), (tall.transpose(Image.Transpose.TRANSPOSE), 1)):
        pixels = pixels_of(image, 40, 40, pad) * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        left, middle, right = (pixels * 255).round().split((3, 33, 4), axis)
        assert torch.equal(middle, torch.from_numpy(np.array(image)).permute(2, 0, 1).float())
        for margin in (left, right):
            assert (margin.flatten(1) == torch.tensor(COLOURS[pad])[:, None]).all()


@pytest.mark.parametrize("size", [64, {"shortest_edge": 64}])
@pytest.mark.parametrize("crop", [56, {"height": 56, "width": 56}])
def test_clip_s_pixels_are_those_of_transformers(tmp_path, size, crop):
    """Its first files give sizes as numbers, later ones as objects."""
    settings = dict(
        crop_size=crop, size=size, do_center_crop=True, do_normalize=True, do_resize=True, resample=3,
        image_mean=list(MEAN), image_std=list(STD),
    )  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(settings | {"image_processor_type": "CLIPImageProcessor"})
    )
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)
    for shape in PICTURES:
        reference = theirs(picture(*shape), return_tensors="pt").pixel_values[0]
        out = preprocess(picture(*shape), pixel_config(settings, "folder", "none"))
        torch.testing.assert_close(out, reference, atol=1e-6, rtol=0)


def test_siglip_s_pixels_are_those_of_transformers_squashed_without_a_crop():
    theirs = SiglipImageProcessorPil(size={"height": 42, "width": 42}, resample=3)
    settings = checkpoint_settings(theirs)
    for shape in PICTURES:
        reference = theirs(picture(*shape), return_tensors="pt").pixel_values[0]
        out = preprocess(picture(*shape), pixel_config(settings, "folder", "none"))
        torch.testing.assert_close(out, reference, atol=1e-6, rtol=0)


def checkpoint_settings(processor):
    return json.loads(processor.to_json_string())


@pytest.mark.parametrize(("margin", "corner"), [(3, 2), (5, 2), (7, 4), (4, 2)])
def test_open_clip_rounds_the_corner_of_its_crop_half_to_even(margin, corner):
    image = picture(40, 40 + margin)
    pixels = preprocess(image, replace(open_clip_pixels(40, "none"), mean=(0, 0, 0), std=(1, 1, 1)))
    expected = np.array(image)[corner : corner + 40]
    assert torch.equal((pixels * 255).round(), torch.from_numpy(expected).permute(2, 0, 1).float())


def test_settings_come_from_preprocessor_config_json():
    changed = SETTINGS | dict(size={"shortest_edge": 64}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    assert pixel_config(changed, "folder", "black") == PixelConfig(
        64, 56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), SETTINGS["rescale_factor"], "black"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("do_center_crop", False), ("do_resize", False), ("do_rescale", False), ("do_normalize", False), ("resample", 2),
     ("size", {"height": 56, "width": 56}), ("size", None), ("size", {"longest_edge": 56}), ("crop_size", None),
     ("crop_size", {"height": 56, "width": 42}), ("crop_size", {"height": 70, "width": 70})],
)  # fmt: skip
def test_unsupported_preprocessing_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        pixel_config(SETTINGS | {field: value}, "folder", "mean")


def test_the_golden_preprocessor_is_the_one_that_transformers_reads():
    image = picture(61, 47)
    theirs = BitImageProcessorPil.from_pretrained(GOLDEN / "libra-7b" / "encoder-dinov2")
    reference = theirs(image, return_tensors="pt").pixel_values[0]
    out = preprocess(image, pixel_config(SETTINGS, "folder", "none"))
    torch.testing.assert_close(out, reference, atol=1e-6, rtol=0)
