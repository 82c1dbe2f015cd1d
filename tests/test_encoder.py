import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, cases, load, read, relative, study_of
from PIL import Image
from safetensors.torch import load_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

import checkpoint
from encoder import Encoder, PixelConfig, encoder_config, encoder_names, pixel_config, preprocess


@pytest.mark.parametrize(("family", "case"), cases(), ids=lambda value: getattr(value, "name", value))
def test_golden_pixels_and_features(family, case):
    libra, expected = load(family), load_file(case / "expected.safetensors")
    images = study_of(read(family, case.name, "expected.json")).images()
    pixels = libra.preprocess([*images, *images][:2])
    torch.testing.assert_close(pixels, expected["pixels"], atol=1e-6, rtol=0)
    assert relative(libra.features(pixels), expected["features"]) < 1e-4


# ------------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random DINOv2 of odd sizes in `transformers`, and ours, read from what it saves."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=36, num_hidden_layers=5, num_attention_heads=3, mlp_ratio=3, image_size=30, patch_size=6,
        layer_norm_eps=1e-3,
    )  # fmt: skip
    theirs = Dinov2Model(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("dinov2")
    theirs.save_pretrained(folder)
    source = checkpoint.locate(folder)
    settings = encoder_config(checkpoint.read_json(folder / "config.json"), source)
    stored = checkpoint.stored_tensors(source)
    tensors = {ours: stored[name] for ours, name in encoder_names(settings, stored).items()}
    with torch.device("meta"):
        ours = Encoder(settings)
    checkpoint.match(ours, tensors, folder)
    checkpoint.load(ours, tensors, torch.device("cpu"), torch.float32)
    return theirs, ours


@torch.no_grad()
def both(pair, *selection):
    """hidden states of `transformers` (L + 1, from the embeddings on), ours as selected."""
    theirs, ours = pair
    pixels = torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    return theirs(pixels, output_hidden_states=True).hidden_states, ours(pixels, *selection)


def test_every_block_equals_transformers(pair):
    hidden, features = both(pair, "all", "cls_patch")
    assert features.shape == (2, 5, 26, 36) and len(hidden) == 6
    for layer in range(5):
        assert relative(features[:, layer], hidden[layer + 1]) < 1e-5


def test_the_default_is_every_block_without_the_class_token(pair):
    hidden, features = both(pair)
    assert relative(features, torch.stack(hidden[1:], 1)[:, :, 1:]) < 1e-5


@pytest.mark.parametrize("layer", [-1, -2, 3, 0])
@pytest.mark.parametrize(("feature", "first"), [("patch", 1), ("cls_patch", 0)])
def test_one_layer_is_counted_from_the_embeddings(pair, layer, feature, first):
    hidden, features = both(pair, layer, feature)
    assert relative(features, hidden[layer][:, None, first:]) < 1e-5


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_swiglu_ffn", True), ("model_type", "sam"), ("hidden_act", "relu"), ("qkv_bias", False), ("num_channels", 1)],
)
def test_an_unsupported_encoder_is_refused_by_the_name_of_its_field(field, value):
    config = read("libra-7b", "encoder-dinov2", "config.json")
    with pytest.raises(ValueError, match=field):
        encoder_config(config | {field: value}, "folder")


def test_sizes_that_config_json_omits_are_those_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    ours, theirs = encoder_config({"model_type": "dinov2"}, tmp_path), Dinov2Config.from_pretrained(tmp_path)
    for name in ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.intermediate_size == theirs.mlp_ratio * theirs.hidden_size
    assert ours.layer_norm_eps == theirs.layer_norm_eps


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


def test_settings_come_from_preprocessor_config_json():
    changed = SETTINGS | dict(size={"shortest_edge": 64}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    assert pixel_config(changed, "folder", "black") == PixelConfig(
        64, 56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), SETTINGS["rescale_factor"], "black"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("do_center_crop", False), ("do_resize", False), ("do_rescale", False), ("do_normalize", False), ("resample", 2),
     ("size", {"height": 56, "width": 56}), ("crop_size", {"height": 56, "width": 42}),
     ("crop_size", {"height": 70, "width": 70})],
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
