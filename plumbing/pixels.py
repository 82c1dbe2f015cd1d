"""A PIL image -> the pixels that an encoder takes: pad to a square, resize, crop, normalise."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from plumbing.files import check_supported


@dataclass(frozen=True)
class PixelConfig:
    """How an image becomes pixels. All but `pad`, `squash` and `rounds` are fields of `preprocessor_config.json`."""

    size: int  # the shortest edge after resizing
    crop: int  # side of the centre crop
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]
    scale: float  # 1 / 255
    pad: str  # "mean" or "black": pad to a square of this colour first; "none"
    squash: bool = False  # resize both edges to `size`, whatever the shape
    rounds: bool = False  # round the corner of the crop half to even, instead of down
    dicom_display: str = "standard"  # how `load_image` shows DICOM


MAX_PIXELS = 2**28  # of a padded or resized image: 1 GB

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# fields that change the result -> the values that we compute with
SUPPORTED = {"do_resize": [True], "do_rescale": [True], "do_normalize": [True]}
SUPPORTED["resample"] = [3]  # bicubic


def pixel_config(config: dict, source, pad: str) -> PixelConfig:
    """Turn a parsed preprocessor_config.json into a PixelConfig; a ValueError names a field that is not supported."""
    where = f"{source}/preprocessor_config.json"
    check_supported(config, SUPPORTED, where)
    for name in ("image_mean", "image_std"):
        if config.get(name) is None:
            raise ValueError(f"{where} lacks {name}")

    # a number (CLIP's first files) stands for the shortest edge, and for both sides of the crop
    size, crop = config.get("size"), config.get("crop_size")
    if not isinstance(size, dict):
        size = {"shortest_edge": size}
    if not isinstance(crop, dict):
        crop = {"height": crop, "width": crop}

    # a file that gives both edges (SigLIP) resizes to them, and leaves nothing to crop
    squash = "height" in size
    if squash:
        size, crop = {"shortest_edge": size["height"]}, size
    crops = config.get("do_center_crop", not squash)

    # the crop must be a square within the resized image
    try:
        fits = 0 < crop["height"] == crop["width"] <= size["shortest_edge"]
    except (KeyError, TypeError):
        fits = False
    if not fits or crops == squash:
        raise ValueError(f"{where}: not supported together: size {size}, crop_size {crop}, do_center_crop {crops}")
    mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    scale = config.get("rescale_factor", 1 / 255)
    size = size["shortest_edge"]
    crop = crop["height"]
    return PixelConfig(size, crop, mean, std, scale=scale, pad=pad, squash=squash)


def open_clip_pixels(size: int, pad: str) -> PixelConfig:
    """Return open_clip's preprocessing, which none of its files describes."""
    return PixelConfig(size, size, CLIP_MEAN, CLIP_STD, scale=1 / 255, pad=pad, rounds=True)


def preprocess(image: Image.Image, config: PixelConfig) -> torch.Tensor:
    """A PIL image in mode RGB -> pixels [3, S, S], float32."""
    return normalise(frame(image, config), config)


def frame(image: Image.Image, config: PixelConfig) -> np.ndarray:
    """A PIL image in mode RGB -> what the encoder sees of it, uint8 [S, S, 3]: padded, resized and cropped.

    ValueError if the image is so narrow that it would not fit the memory on the way.
    """
    # 1) pad to a square, with the image in its centre; an odd pixel goes right or below
    if config.pad != "none":
        colour = "black"
        if config.pad == "mean":
            colour = tuple(int(255 * mean) for mean in config.mean)
        side = max(image.size)
        _check_size(image, (side, side))
        square = Image.new("RGB", (side, side), colour)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        square.paste(image, (left, top))
        image = square

    # 2) resize the shortest edge to the size; the longest is rounded down, as in `transformers`
    width = height = config.size
    if not config.squash:
        shortest = min(image.size)
        width = config.size * image.width // shortest
        height = config.size * image.height // shortest
        _check_size(image, (width, height))
    image = image.resize((width, height), Image.Resampling.BICUBIC)

    # 3) cut a square out of the centre
    crop = config.crop
    to_int = round if config.rounds else int
    left = to_int((width - crop) / 2)
    top = to_int((height - crop) / 2)
    return np.array(image.crop((left, top, left + crop, top + crop)))


def _check_size(image: Image.Image, size: tuple[int, int]):
    width, height = size
    if width * height > MAX_PIXELS:
        shape = f"{image.width} × {image.height} pixels"
        raise ValueError(f"an image of {shape} is too narrow: it would become {width} × {height}")


def normalise(frame: np.ndarray, config: PixelConfig) -> torch.Tensor:
    """What the encoder sees, uint8 [S, S, 3] -> pixels [3, S, S], float32."""
    # as published: rescaled in float64, normalised in float32
    pixels = torch.from_numpy(frame).double() * config.scale
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    pixels = (pixels.float() - mean) / std  # [S, S, 3]
    return pixels.permute(2, 0, 1)
