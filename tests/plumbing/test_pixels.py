"""The oracle is arithmetic: how many pixels an image would become."""

import dataclasses

import pytest
from conftest import load
from PIL import Image

from plumbing.pixels import frame


@pytest.mark.parametrize("pad", ["black", "mean", "none"])
@pytest.mark.parametrize("size", [(40000, 2), (2, 40000), (89000, 1)])
def test_an_image_too_narrow_for_the_memory_is_refused_before_it_grows(size, pad):
    config = dataclasses.replace(load("libra-7b").pixels, pad=pad, size=518)
    with pytest.raises(ValueError, match=rf"{size[0]} × {size[1]} pixels is too narrow: it would become"):
        frame(Image.new("RGB", size), config)


@pytest.mark.parametrize("pad", ["black", "mean", "none"])
def test_a_long_image_is_shown(pad):
    config = dataclasses.replace(load("libra-7b").pixels, pad=pad)
    assert frame(Image.new("RGB", (40, 4000)), config).shape == (config.crop, config.crop, 3)
