"""A study on disk -> images and text."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FINDINGS_PROMPT = "Provide a detailed description of the findings in the radiology image."  # as published


@dataclass(frozen=True)
class Study:
    """A current image, the patient's prior image or None, and a question about them.

    Images are paths, PIL images, or the bytes of an image file. id names the study where draws are made, so that a
    sample does not depend on what it is batched with; by default its place in the list.
    """

    current: str | Path | Image.Image | bytes
    prior: str | Path | Image.Image | bytes | None = None
    query: str = FINDINGS_PROMPT
    id: str | None = None

    def images(self) -> list[Image.Image]:
        """[current, prior], or [current] where there is no prior, in mode RGB."""
        return [load_image(image) for image in (self.current, self.prior) if image is not None]


def load_image(source) -> Image.Image:
    """A path, the bytes of an image file or a PIL image -> a PIL image in mode RGB, upright.

    Grey of 16 bits is scaled by its full range to 8; an alpha channel is dropped, as published. OSError or ValueError
    with one line where it is missing, empty, truncated, no image, or has more pixels than Pillow holds for safe.
    """
    if isinstance(source, Image.Image):
        name, file = "the image", None
    elif isinstance(source, bytes):
        name, file = "the image", io.BytesIO(source)
    else:
        name = file = Path(source)
        if not file.exists():
            raise FileNotFoundError(f"no image {file}: check the path")
        if not file.is_file():
            raise IsADirectoryError(f"{file} is a directory: give an image file")
        if not file.stat().st_size:
            raise ValueError(f"{file} is empty: fetch it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source if file is None else Image.open(file)
            image = ImageOps.exif_transpose(image)
            image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS // 10**6
        raise ValueError(f"{name} has more than {limit} million pixels: scale it down first") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that can be read: give a JPEG, PNG or TIFF") from None
    except Exception as error:  # Pillow's decoders raise whatever their formats come to
        raise ValueError(f"{name} is a damaged or truncated image ({error}): fetch it again") from None
    deep = image.mode == "I" or image.mode.startswith("I;16")  # Pillow would clip at 255
    values = np.asarray(image, dtype=np.float64) if deep else np.zeros(1)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name} has pixels that are not whole numbers of 8 or 16 bits: save it so")
    if deep:
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    return image.convert("RGB")
