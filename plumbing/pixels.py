"""A PIL image -> the pixels that an encoder takes: pad to a square, resize, crop, normalise."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image

from plumbing.fields import Range, Share, check_fields, check_value, misfit
from plumbing.files import read_json, read_json_if_present


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

# where `transformers` keeps an image processor. Its version 5 nests it in the first; that one counts where both have it
PREPROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")

Edge = Annotated[int, Range(1, 4096)]
PerChannel = tuple[Share, Share, Share]
Std = Annotated[float, Range(1e-6, 1000)]
OFF = Literal[False] | None


@dataclass(frozen=True)
class Preprocessor:
    """The fields of an image processor that change pixels, with the values that we compute with."""

    size: Edge | tuple[Edge, Edge] | dict
    crop_size: Edge | tuple[Edge, Edge] | dict | None
    image_mean: Share | PerChannel
    image_std: Std | tuple[Std, Std, Std]
    rescale_factor: Annotated[float, Range(1e-6, 1)] = 1 / 255
    do_center_crop: bool | None = None
    default_to_square: bool | None = False
    # steps that are always taken
    do_resize: Literal[True] = True
    do_rescale: Literal[True] = True
    do_normalize: Literal[True] = True
    resample: Literal[3] = 3  # bicubic
    # a step that `transformers` takes, and RGB images do not need
    do_convert_rgb: bool | None = True
    # of other image processors: never taken
    crop_pct: OFF = None
    rescale_offset: OFF = None
    use_square_size: OFF = None


def read_pixel_config(folder, pad: str) -> PixelConfig:
    """How the encoder in a folder is shown images; see `pixel_config`."""
    processor = read_json_if_present(Path(folder, PREPROCESSOR_FILES[0])).get("image_processor")
    if processor is None:
        return pixel_config(read_json(Path(folder, PREPROCESSOR_FILES[1])), folder, pad)
    where = f"{folder}/{PREPROCESSOR_FILES[0]}"
    return pixel_config(check_value(processor, dict, "image_processor", where), folder, pad, PREPROCESSOR_FILES[0])


def pixel_config(config: dict, source, pad: str, file: str = PREPROCESSOR_FILES[1]) -> PixelConfig:
    """Turns a parsed preprocessor_config.json into a PixelConfig; a ValueError names a field that is not supported."""
    # 1) a processor that we know, what it needs, and no step that we do not take
    where = f"{source}/{file}"
    kind = config.get("image_processor_type") or config.get("feature_extractor_type")
    known = re.fullmatch(r"(?P<kind>CLIP|Bit|Siglip)(ImageProcessor(Fast|Pil)?|FeatureExtractor)", str(kind)[:80])
    if kind is not None and not known:
        raise misfit(kind, "image_processor_type", where, "an image processor of CLIP, Bit or Siglip")
    for name in ("size", "image_mean", "image_std"):
        if config.get(name) is None:
            raise ValueError(f"{where} lacks {name}")
    values = Preprocessor(**dict(crop_size=None) | check_fields(config, Preprocessor, where))
    ours = [field.name for field in fields(Preprocessor)]
    for name in config:
        if name.startswith("do_") and name not in ours:
            check_value(config[name], OFF, name, where)

    # 2) the edges. A number is the shortest one, and both sides of the crop; where a file gives both edges (SigLIP),
    #    the image is resized to them, and nothing is left to crop
    size = _edges(values.size, "size", where, "height" if values.default_to_square else "shortest_edge")
    squash = "height" in size
    crop = size if squash else _edges(values.crop_size, "crop_size", where, "height")
    crops = values.do_center_crop
    if crops is None:
        crops = known["kind"] != "Siglip" if known else not squash
    edge = size["height" if squash else "shortest_edge"]

    # 3) what the encoder sees is a square within the resized image
    is_square = crop.keys() == {"height", "width"} and crop["height"] == crop["width"] <= edge
    if not is_square or crops == squash:
        raise ValueError(f"{where}: not supported together: size {size}, crop_size {crop}, do_center_crop {crops}")
    mean, std = (x if isinstance(x, tuple) else (x,) * 3 for x in (values.image_mean, values.image_std))
    return PixelConfig(edge, crop["height"], mean, std, scale=values.rescale_factor, pad=pad, squash=squash)


def _edges(value, name: str, where: str, meaning: str) -> dict[str, int]:
    """{"shortest_edge"} or {"height", "width"} of a field in any of its forms; meaning: what a number stands for."""
    if isinstance(value, tuple):
        value = {"height": value[0], "width": value[1]}
    if isinstance(value, int):
        value = {"shortest_edge": value} if meaning == "shortest_edge" else {"height": value, "width": value}
    edges = {key: edge for key, edge in (value or {}).items() if edge is not None}
    if edges.keys() not in ({"shortest_edge"}, {"height", "width"}):
        raise misfit(value, name, where, "shortest_edge alone, or height and width")
    return {key: check_value(edge, Edge, f"{name}.{key}", where) for key, edge in edges.items()}


def open_clip_pixels(size: int, pad: str) -> PixelConfig:
    """Returns open_clip's preprocessing, which none of its files describes."""
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
