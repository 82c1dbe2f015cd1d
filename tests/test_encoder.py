"""The oracles: golden values, and the models and image processors of `transformers`."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import GOLDEN, cases, load, read, relative, study_of
from PIL import Image
from safetensors.torch import load_file

from encoder import DROPOUTS, FAMILIES, Encoder, encoder_config, encoder_tensors
from plumbing import checkpoint
from plumbing.checkpoint import StoredTensor
from plumbing.files import read_json
from plumbing.pixels import PixelConfig, Preprocessor, open_clip_pixels, pixel_config, preprocess, read_pixel_config


@pytest.mark.parametrize(("family", "case"), cases(), ids=lambda value: getattr(value, "name", value))
def test_golden_pixels_and_features(family, case):
    libra, expected = load(family), load_file(case / "expected.safetensors")
    images = study_of(read(family, case.name, "expected.json")).images()
    pixels = libra.preprocess([images[0], images[-1]])
    torch.testing.assert_close(pixels, expected["pixels"], atol=1e-6, rtol=0)
    assert relative(libra.features(pixels), expected["features"]) < 1e-4


# ------------------------------------------------------------------------------------------- the encoder

SIZES = dict(
    hidden_size=36, num_hidden_layers=5, num_attention_heads=3, intermediate_size=108, image_size=30, patch_size=6,
    layer_norm_eps=1e-3,
)  # fmt: skip
TEXT = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
BOTH = dict(text_config=TEXT, vision_config=SIZES)
MODELS = {  # as repositories on the hub hold them: the tower alone, or beside a text tower
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config(**SIZES, mlp_ratio=3)),
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**SIZES)),
    "clip with gelu": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**SIZES, hidden_act="gelu")),
    "clip with text": (transformers.CLIPModel, transformers.CLIPConfig(**BOTH)),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**SIZES)),
    "siglip with text": (transformers.SiglipModel, transformers.SiglipConfig(**BOTH)),
}


def random_weights(kind, config):
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def read_encoder(config, stored, **options):
    encoder = Encoder(encoder_config(config, "folder", stored, **options))
    tensors, parameters = encoder_tensors(encoder, stored), dict(encoder.named_parameters())
    checkpoint.check_fit(parameters, tensors, "")
    checkpoint.load_tensors(parameters, tensors)
    return encoder.requires_grad_(False)


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def pair(request, tmp_path_factory):
    """A random encoder of odd sizes in `transformers`, and ours, read from what it saves, plain and with the norm."""
    theirs, folder = random_weights(*request.param), tmp_path_factory.mktemp("encoder")
    theirs.save_pretrained(folder)
    config = read_json(folder / "config.json")
    stored = checkpoint.list_tensors(checkpoint.locate(folder))
    plain, normed = read_encoder(config, stored), read_encoder(config, stored, final_norm=True)
    return getattr(theirs, "vision_model", theirs), plain, normed


def random_pixels(size=30):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hidden_states(model, size=30):
    """The embeddings and the output of every block in `transformers`."""
    interpolate = {} if isinstance(model, transformers.Dinov2Model) else dict(interpolate_pos_encoding=True)
    return model(random_pixels(size), output_hidden_states=True, **interpolate).hidden_states


@pytest.mark.parametrize("size", [30, 42, 18])  # the position embeddings of 42 and 18 are interpolated
def test_every_block_equals_transformers(pair, size):
    theirs, ours, _ = pair
    hidden = hidden_states(theirs, size)
    features = ours(random_pixels(size), "all", "cls_patch")
    assert features.shape == (2, 5, (size // 6) ** 2 + ours.config.class_token, 36) and len(hidden) == 6
    for layer in range(5):
        assert relative(features[:, layer], hidden[layer + 1]) < 1e-5


def test_the_default_is_every_block_without_the_class_token(pair):
    theirs, ours, _ = pair
    patches = torch.stack(hidden_states(theirs)[1:], 1)[:, :, -25:]
    assert relative(ours(random_pixels()), patches) < 1e-5


@pytest.mark.parametrize("layer", [-1, -2, 3, 0])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_one_layer_is_counted_from_the_embeddings(pair, layer, feature):
    theirs, ours, _ = pair
    expected = hidden_states(theirs)[layer]
    if feature == "patch":
        expected = expected[:, -25:]
    assert relative(ours(random_pixels(), layer, feature), expected[:, None]) < 1e-5


@torch.no_grad()
def test_the_final_norm_gives_the_last_hidden_state(pair):
    theirs, _, normed = pair
    expected = theirs(random_pixels()).last_hidden_state
    if normed.config.model_type == "clip_vision_model":  # CLIP applies its norm to the class token only
        expected = theirs.post_layernorm(expected)
    assert relative(normed(random_pixels(), -1, "cls_patch")[:, 0], expected) < 1e-5


def timm_state(state):
    """A saved DINOv2 as BiomedCLIP's file has it: timm's names, fused qkv, a text tower beside it."""
    state.pop("embeddings.mask_token")
    for name in [name for name in state if ".attention.attention.query." in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    names = {
        "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed", "encoder.layer.": "blocks.",
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "layernorm.": "norm.",
    }  # fmt: skip
    for theirs, timm in names.items():
        state = {name.replace(theirs, timm): tensor for name, tensor in state.items()}
    state = {f"module.visual.trunk.{name}": tensor for name, tensor in state.items()}
    return state | {"module.logit_scale": torch.ones(()), "module.text.transformer.weight": torch.ones(3, 2)}


@pytest.mark.parametrize("scales", [True, False])
def test_an_open_clip_checkpoint_equals_the_same_weights_in_transformers(tmp_path, scales):
    sizes = SIZES | dict(hidden_size=128, num_attention_heads=2, layer_norm_eps=1e-6)
    theirs = random_weights(transformers.Dinov2Model, transformers.Dinov2Config(**sizes, mlp_ratio=2))
    if not scales:
        for layer in theirs.encoder.layer:
            torch.nn.init.ones_(layer.layer_scale1.lambda1)
            torch.nn.init.ones_(layer.layer_scale2.lambda1)
    theirs.save_pretrained(tmp_path)
    state = timm_state(load_file(tmp_path / "model.safetensors"))
    state = {name: tensor for name, tensor in state.items() if scales or ".ls" not in name}
    torch.save({"epoch": 7, "name": "x", "state_dict": state, "optimizer": {"lr": [0.1]}}, tmp_path / "checkpoint.pt")

    config = {"vision_cfg": {"timm_model_name": "vit_base_patch14_dinov2.lvd142m", "image_size": 30}}
    ours = read_encoder(config, checkpoint.file_tensors(tmp_path / "checkpoint.pt"))
    assert relative(ours(random_pixels(), -2), hidden_states(theirs)[-2][:, None, 1:]) < 1e-5


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_swiglu_ffn", True), ("model_type", "sam"), ("hidden_act", "relu"), ("qkv_bias", False), ("num_channels", 1),
     ("vision_cfg", {"timm_model_name": "resnet50", "image_size": 30}), ("vision_cfg", {"timm_model_name": None})],
)  # fmt: skip
def test_an_unsupported_encoder_is_refused_by_the_name_of_its_field(field, value):
    config = read("libra-7b", "encoder-dinov2", "config.json")
    with pytest.raises(ValueError, match=field.replace("vision_cfg", "timm_model_name")):
        encoder_config(config | {field: value}, "folder", {})


def test_a_clip_that_is_described_twice_has_the_second_description():
    second = dict(hidden_size=48, num_attention_heads=4)
    config = dict(model_type="clip", vision_config=SIZES, vision_config_dict=second)
    ours = encoder_config(config, "folder", {})
    theirs = transformers.CLIPConfig(**config).vision_config  # which changes what it is given
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "image_size", "layer_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("name", ["vit_huge_patch14_224", "vit_base_patch16_clip_quickgelu_224", "vit_srelu_small"])
def test_a_timm_model_that_is_no_plain_vit_is_refused(name):
    shapes = {"patch_embed.proj.weight": (1280, 3, 14, 14), "blocks.0.mlp.fc1.weight": (5120, 1280)}
    stored = {f"module.visual.trunk.{key}": StoredTensor(Path("x"), key, shape, "F32") for key, shape in shapes.items()}
    with pytest.raises(ValueError, match=name):
        encoder_config({"vision_cfg": {"timm_model_name": name, "image_size": 224}}, "folder", stored)


# what `transformers` knows and what changes no feature: outputs, initial values, heads for other tasks, masks
NEUTRAL = [
    "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "initializer_factor",
    "initializer_range", "is_encoder_decoder", "label2id", "layerscale_value", "output_attentions",
    "output_hidden_states", "problem_type", "projection_dim", "return_dict", "transformers_version", "use_mask_token",
    "vision_use_head",
]  # fmt: skip
BACKBONE = ["_out_features", "_out_indices", "apply_layernorm", "out_features", "out_indices", "reshape_hidden_states",
            "stage_names"]  # fmt: skip
BOTH_TOWERS = ["text_config", "vision_config", "logit_scale_init_value"]


@pytest.mark.parametrize("name", ["Dinov2", "CLIPVision", "SiglipVision", "CLIP", "Siglip"])
def test_every_field_that_transformers_knows_is_computed_neutral_or_refused(name):
    config = getattr(transformers, f"{name}Config")
    listed = {"model_type", *NEUTRAL, *BACKBONE, *DROPOUTS}
    if config.model_type in FAMILIES:
        family = FAMILIES[config.model_type]
        listed |= {*family.defaults, *family.supported}
    else:
        listed |= set(BOTH_TOWERS)
    assert {field.name for field in fields(config)} | set(config().to_dict()) <= listed


NESTED = json.loads("[" * 500 + "]" * 500)
BAD = [None, "text", [], [1], {}, -1, 0, 1.5, True, math.nan, math.inf, 10**30, 10**400, NESTED, {"a": NESTED}]


@pytest.mark.parametrize("model_type", ["dinov2", "clip_vision_model", "siglip_vision_model"])
def test_any_value_of_any_field_is_accepted_or_refused_in_one_line(model_type):
    family = FAMILIES[model_type]
    for name in {"model_type", "vision_config", "vision_cfg", *family.defaults, *family.supported}:
        for value in BAD:
            try:
                encoder_config({"model_type": model_type, name: value}, "folder", {})
            except ValueError as error:
                assert str(error).startswith("folder") and "\n" not in str(error) and len(str(error)) < 250
                assert any(word in str(error) for word in (name, "model_type", "timm_model_name"))


MISFITS = [
    ("layer_norm_eps", -1), ("layer_norm_eps", 0), ("num_hidden_layers", 100_000), ("num_attention_heads", 5),
    ("image_size", [224, 224]), ("image_size", 7), ("patch_size", 0), ("mlp_ratio", -1), ("mlp_ratio", 0),
    ("mlp_ratio", math.nan), ("hidden_act", "quick"), ("hidden_size", None), ("hidden_size", 10**30),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), MISFITS)
def test_a_value_out_of_its_bounds_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(ValueError, match=f"^folder/config.json: .*{field}"):
        encoder_config({"model_type": "dinov2", field: value}, "folder", {})


@pytest.mark.parametrize("family", ["Dinov2Config", "CLIPVisionConfig", "SiglipVisionConfig"])
def test_sizes_that_config_json_omits_are_those_of_transformers(family):
    theirs = getattr(transformers, family)()
    ours = encoder_config({"model_type": theirs.model_type}, "folder", {})
    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    for name in (*names, "hidden_act"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.intermediate_size == 3072


# ------------------------------------------------------------------------------------------------ pixels

SETTINGS = read("libra-7b", "encoder-dinov2", "preprocessor_config.json")
MEAN, STD = (0.45, 0.5, 0.55), (0.22, 0.25, 0.28)
COLOURS = {"mean": (114, 127, 140), "black": (0, 0, 0)}  # int(255 * MEAN)
SHAPES = [(33, 57), (57, 33), (101, 40), (7, 64), (30, 31), (49, 49)]


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_same_pixels(image, config, processor, processed=None):
    """Our pixels equal those of an image processor of `transformers`, given the same image or another one."""
    reference = processor(processed or image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(preprocess(image, config), reference, atol=1e-6, rtol=0)


def processor(size, crop):
    return transformers.BitImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": crop, "width": crop}, resample=3, image_mean=list(MEAN),
        image_std=list(STD), rescale_factor=1 / 255, do_convert_rgb=True,
    )  # fmt: skip


@pytest.mark.parametrize(("size", "crop"), [(30, 30), (33, 24), (28, 21)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_without_padding_are_those_of_transformers(shape, size, crop):
    config = PixelConfig(size, crop, MEAN, STD, scale=1 / 255, pad="none")
    assert_same_pixels(picture(*shape), config, processor(size, crop))


@pytest.mark.parametrize("pad", COLOURS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_padded_image_is_a_square_one_with_the_odd_pixel_on_the_right_or_below(shape, pad):
    image, side = picture(*shape), max(shape)
    top, left = (side - image.height) // 2, (side - image.width) // 2
    square = np.full((side, side, 3), COLOURS[pad], dtype=np.uint8)
    square[top : top + image.height, left : left + image.width] = np.array(image)
    config = PixelConfig(30, 30, MEAN, STD, scale=1 / 255, pad=pad)
    assert_same_pixels(image, config, processor(30, 30), Image.fromarray(square))


@pytest.mark.parametrize("size", [64, {"shortest_edge": 64}])  # early files give numbers, later ones objects
@pytest.mark.parametrize("crop", [56, {"height": 56, "width": 56}])
def test_clip_pixels_are_those_of_transformers(tmp_path, size, crop):
    settings = dict(
        crop_size=crop, size=size, do_center_crop=True, do_normalize=True, do_resize=True, resample=3,
        image_mean=list(MEAN), image_std=list(STD), image_processor_type="CLIPImageProcessor",
    )  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    for shape in SHAPES:
        config = pixel_config(settings, "folder", "none")
        assert_same_pixels(picture(*shape), config, transformers.CLIPImageProcessorPil.from_pretrained(tmp_path))


def test_siglip_pixels_are_those_of_transformers_squashed_without_a_crop():
    theirs = transformers.SiglipImageProcessorPil(size={"height": 42, "width": 42}, resample=3)
    config = pixel_config(json.loads(theirs.to_json_string()), "folder", "none")
    for shape in SHAPES:
        assert_same_pixels(picture(*shape), config, theirs)


@pytest.mark.parametrize("kind", ["CLIP", "Bit", "Siglip"])
def test_a_processor_config_of_transformers_5_is_read(tmp_path, kind):
    """It nests the image processor, and counts beside an older preprocessor_config.json."""
    theirs = getattr(transformers, f"{kind}ImageProcessorPil")(image_mean=list(MEAN))
    nested = {"image_processor": theirs.to_dict(), "processor_class": f"{kind}Processor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested, default=dict))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    read_by_them = getattr(transformers, f"{kind}ImageProcessorPil").from_pretrained(tmp_path)
    assert_same_pixels(picture(101, 40), read_pixel_config(tmp_path, "none"), read_by_them)


def test_a_processor_config_without_an_image_processor_leaves_it_to_the_other_file(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    assert read_pixel_config(tmp_path, "mean") == pixel_config(SETTINGS, "folder", "mean")


FORMS = [  # of sizes, means and deviations
    ("Siglip", dict(size={"height": 56, "width": 56}, image_mean=0.5, image_std=0.5)),
    ("Siglip", dict(size=[42, 42], image_mean=0.25, image_std=[0.2, 0.3, 0.4])),
    ("Siglip", dict(size=42, default_to_square=True)),
    ("CLIP", dict(size={"shortest_edge": 50}, crop_size=[40, 40], rescale_factor=1 / 127.5)),
    ("Bit", dict(size={"shortest_edge": 50}, crop_size=40, do_pad=False, do_convert_rgb=False)),
]


@pytest.mark.parametrize(("kind", "settings"), FORMS)
def test_every_form_of_a_size_or_a_mean_gives_the_pixels_of_transformers(kind, settings):
    theirs = getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
    written = dict(image_mean=theirs.image_mean, image_std=theirs.image_std) | settings
    config = pixel_config(written | {"image_processor_type": f"{kind}ImageProcessor"}, "folder", "none")
    assert len(config.mean) == len(config.std) == 3
    for shape in SHAPES:
        assert_same_pixels(picture(*shape), config, theirs)


# what changes no pixel: the layout and place of the result; what padding would pad to; tokens of other models
NEUTRAL_PIXELS = ["data_format", "device", "disable_grouping", "image_processor_type", "image_seq_length",
                  "input_data_format", "pad_size", "return_tensors"]  # fmt: skip
REFUSED_PIXELS = ["do_pad"]


@pytest.mark.parametrize("kind", ["CLIP", "Bit", "Siglip"])
def test_every_setting_that_an_image_processor_knows_is_computed_neutral_or_refused(kind):
    theirs = getattr(transformers, f"{kind}ImageProcessorPil")
    ours = {field.name for field in fields(Preprocessor)}
    assert {*theirs.valid_kwargs.__annotations__, *theirs().to_dict()} <= {*ours, *NEUTRAL_PIXELS, *REFUSED_PIXELS}


def test_any_value_of_any_setting_is_accepted_or_refused_in_one_line():
    for name in {*(field.name for field in fields(Preprocessor)), "image_processor_type", "do_pad", "do_grayscale"}:
        for value in [*BAD, {"height": -1, "width": NESTED}, {"shortest_edge": 10**30}, {"longest_edge": 5}]:
            try:
                pixel_config(SETTINGS | {name: value}, "folder", "mean")
            except ValueError as error:
                assert str(error).startswith("folder/preprocessor_config.json") and name in str(error)
                assert "\n" not in str(error) and len(str(error)) < 250


def test_the_golden_preprocessor_is_the_one_that_transformers_reads():
    theirs = transformers.BitImageProcessorPil.from_pretrained(GOLDEN / "libra-7b" / "encoder-dinov2")
    assert_same_pixels(picture(61, 47), pixel_config(SETTINGS, "folder", "none"), theirs)


@pytest.mark.parametrize(("margin", "corner"), [(3, 2), (5, 2), (7, 4), (4, 2)])
def test_open_clip_rounds_the_corner_of_its_crop_half_to_even(margin, corner):
    image = picture(40, 40 + margin)
    pixels = preprocess(image, replace(open_clip_pixels(40, "none"), mean=(0, 0, 0), std=(1, 1, 1)))
    expected = np.array(image)[corner : corner + 40]
    assert torch.equal((pixels * 255).round(), torch.from_numpy(expected).permute(2, 0, 1).float())


def test_settings_come_from_preprocessor_config_json():
    changed = SETTINGS | dict(size={"shortest_edge": 64}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    scale = SETTINGS["rescale_factor"]
    expected = PixelConfig(64, 56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), scale=scale, pad="black")
    assert pixel_config(changed, "folder", "black") == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [("do_center_crop", False), ("do_resize", False), ("do_rescale", False), ("do_normalize", False), ("resample", 2),
     ("size", {"height": 56, "width": 56}), ("size", None), ("size", {"longest_edge": 56}), ("crop_size", None),
     ("crop_size", {"height": 56, "width": 42}), ("crop_size", {"height": 70, "width": 70}), ("image_mean", None),
     ("image_std", 0), ("image_std", [0.5, 0, 0.5]), ("image_std", -0.5), ("image_mean", [0.5, 0.5]),
     ("image_mean", math.nan), ("rescale_factor", 0), ("rescale_factor", -1), ("rescale_factor", None),
     ("do_pad", True), ("do_grayscale", True), ("do_flip_channel_order", True), ("crop_pct", 0.9),
     ("resample", "bicubic"), ("size", {"shortest_edge": 56, "longest_edge": 80}), ("size", {"shortest_edge": 10**9}),
     ("image_processor_type", "ViTImageProcessor"), ("image_processor_type", "ConvNextImageProcessor")],
)  # fmt: skip
def test_unsupported_preprocessing_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        pixel_config(SETTINGS | {field: value}, "folder", "mean")
