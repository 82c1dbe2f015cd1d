"""A PIL image -> the pixels that an encoder takes: pad to a square, resize, crop, normalise."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class PixelConfig:
    """How an image becomes pixels, from `preprocessor_config.json`; pad is ours."""

    size: int  # the shortest edge is resized to it
    crop: int  # side of the centre crop
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float  # 1 / 255
    pad: str  # "mean" or "black": pad to a square first; "none"
    squash: bool = False  # both edges are resized to `size`
    rounds: bool = False  # the crop's corner is rounded, half to even, not down


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pixel_config(config: dict, source, pad: str) -> PixelConfig:
    """A parsed preprocessor_config.json -> PixelConfig; ValueError that names an unsupported field.

    Sizes are numbers (CLIP's first files) or objects. Where both edges are given (SigLIP), there is no crop.
    """
    supported = dict(do_resize=True, do_rescale=True, do_normalize=True, resample=3)
    where = f"{source}/preprocessor_config.json"
    for name, value in supported.items():
        if config.get(name, value) != value:
            raise ValueError(f"{where}: {name} {config[name]!r} is not supported, only {value!r}")
    size, crop = config.get("size"), config.get("crop_size")
    edges = size if isinstance(size, dict) else {"shortest_edge": size}
    squash = "height" in edges
    square = edges if squash else crop if isinstance(crop, dict) else {"height": crop, "width": crop}
    shortest, side = edges.get("height" if squash else "shortest_edge"), square.get("height")
    sizes_fit = isinstance(shortest, int) and isinstance(side, int) and 0 < side <= shortest
    if not sizes_fit or side != square.get("width") or squash == config.get("do_center_crop", not squash):
        crops = f"crop_size {crop!r} and do_center_crop {config.get('do_center_crop')!r}"
        raise ValueError(f"{where}: size {size!r} with {crops} is not supported")
    if lacking := [name for name in ("image_mean", "image_std") if name not in config]:
        raise ValueError(f"{where} lacks {' and '.join(lacking)}")
    mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    return PixelConfig(shortest, side, mean, std, config.get("rescale_factor", 1 / 255), pad, squash)


def open_clip_pixels(size: int, pad: str) -> PixelConfig:
    """open_clip's own preprocessing, which no file describes."""
    return PixelConfig(size, size, CLIP_MEAN, CLIP_STD, 1 / 255, pad, rounds=True)


def preprocess(image: Image.Image, config: PixelConfig) -> torch.Tensor:
    """A PIL image in mode RGB -> pixels [3, S, S]."""
    return normalise(frame(image, config), config)


def frame(image: Image.Image, config: PixelConfig) -> np.ndarray:
    """A PIL image in mode RGB -> uint8 [S, S, 3], what the encoder will see: pad to a square, bicubic resize, crop."""
    if config.pad != "none" and image.width != image.height:
        colour = tuple(int(255 * mean) for mean in config.mean) if config.pad == "mean" else (0, 0, 0)
        side = max(image.size)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    short, long = (1, 1) if config.squash else sorted(image.size)
    long = int(config.size * long / short)
    size = (config.size, long) if image.width <= image.height else (long, config.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    corner = (lambda margin: round(margin / 2)) if config.rounds else (lambda margin: margin // 2)
    left, top = (corner(side - config.crop) for side in size)
    return np.array(image.crop((left, top, left + config.crop, top + config.crop)))


def normalise(frame: np.ndarray, config: PixelConfig) -> torch.Tensor:
    """uint8 [S, S, 3] -> pixels [3, S, S], float32."""
    pixels = torch.from_numpy(frame).permute(2, 0, 1)  # [3, S, S]
    pixels = (pixels.double() * config.scale).float()  # published: rescaled in float64, normalised in float32
    return (pixels - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]
