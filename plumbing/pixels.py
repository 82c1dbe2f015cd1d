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


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# fields that change the result -> the values that we compute with
SUPPORTED = dict(
    do_resize=(True,), do_rescale=(True,), do_normalize=(True,),
    resample=(3,),  # bicubic
)  # fmt: skip


def pixel_config(config: dict, source, pad: str) -> PixelConfig:
    """Turn a parsed preprocessor_config.json into a PixelConfig; a ValueError names a field that is not supported."""
    where = f"{source}/preprocessor_config.json"
    check_supported(config, SUPPORTED, where)

    # a number (CLIP's first files) stands for the shortest edge, and for both sides of the crop
    size, crop = config.get("size"), config.get("crop_size")
    if not isinstance(size, dict):
        size = {"shortest_edge": size}
    if not isinstance(crop, dict):
        crop = {"height": crop, "width": crop}

    # a file that gives both edges (SigLIP) resizes to them, and leaves nothing to crop
    squash = "height" in size
    if squash:
        crop = size
    shortest = size.get("height" if squash else "shortest_edge")
    side = crop.get("height")

    # the crop must be a square within the resized image
    crops = config.get("do_center_crop", not squash)
    are_numbers = isinstance(shortest, int) and isinstance(side, int)
    fits = are_numbers and side == crop.get("width") and 0 < side <= shortest
    if not fits or crops == squash:
        given = {name: config.get(name) for name in ("size", "crop_size", "do_center_crop")}
        raise ValueError(f"{where}: this combination is not supported: {given}")

    mean, std = config.get("image_mean"), config.get("image_std")
    if mean is None or std is None:
        raise ValueError(f"{where} lacks image_mean or image_std")
    scale = config.get("rescale_factor", 1 / 255)
    return PixelConfig(shortest, side, tuple(mean), tuple(std), scale=scale, pad=pad, squash=squash)


def open_clip_pixels(size: int, pad: str) -> PixelConfig:
    """Return open_clip's preprocessing, which none of its files describes."""
    return PixelConfig(size, crop=size, mean=CLIP_MEAN, std=CLIP_STD, scale=1 / 255, pad=pad, rounds=True)


def preprocess(image: Image.Image, config: PixelConfig) -> torch.Tensor:
    """A PIL image in mode RGB -> pixels [3, S, S], float32."""
    return normalise(frame(image, config), config)


def frame(image: Image.Image, config: PixelConfig) -> np.ndarray:
    """A PIL image in mode RGB -> what the encoder sees of it, uint8 [S, S, 3]: padded, resized and cropped."""
    # 1) pad to a square, with the image in its centre; an odd pixel goes right or below
    if config.pad != "none" and image.width != image.height:
        means = config.mean if config.pad == "mean" else (0, 0, 0)
        colour = tuple(int(255 * mean) for mean in means)
        side = max(image.size)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, (left, top))
        image = square

    # 2) resize the shortest edge to the size; the longest is rounded down, as in `transformers`
    width = height = config.size
    if not config.squash and image.width > image.height:
        width = int(config.size * image.width / image.height)
    elif not config.squash:
        height = int(config.size * image.height / image.width)
    image = image.resize((width, height), Image.Resampling.BICUBIC)

    # 3) cut a square out of the centre
    left, top = (width - config.crop) / 2, (height - config.crop) / 2
    rounded = round if config.rounds else int
    left, top = rounded(left), rounded(top)
    box = (left, top, left + config.crop, top + config.crop)
    return np.array(image.crop(box))


def normalise(frame: np.ndarray, config: PixelConfig) -> torch.Tensor:
    """What the encoder sees, uint8 [S, S, 3] -> pixels [3, S, S], float32."""
    pixels = torch.from_numpy(frame).permute(2, 0, 1)  # [3, S, S]
    # as published: rescaled in float64, normalised in float32
    pixels = (pixels.double() * config.scale).float()
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    return (pixels - mean[:, None, None]) / std[:, None, None]
