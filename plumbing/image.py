"""An image file, an http(s) address, bytes or a DICOM file -> a PIL image in mode RGB."""

import ctypes
import functools
import io
import logging
import re
import threading
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from plumbing.dicom import DISPLAYS, MAX_PIXELS, read_dicom
from plumbing.download import HTTP, download
from plumbing.fields import printable
from plumbing.files import check_readable

# what Pillow and pydicom say beside their errors is for whoever sets up logging, not for stderr
for name in ("PIL", "pydicom"):
    logging.getLogger(name).addHandler(logging.NullHandler())

FILE_BYTES = 2**30  # the largest file that is read
DICOM_NAME = re.compile(r"\.(dcm|dicom)($|[?#])", re.I)
# not EPS and others for which Pillow runs another program
FORMATS = ("JPEG", "JPEG2000", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
# tags of TIFF (TIFF 6.0, section 8)
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE, PLANAR = 258, 262, 281, 284
# decoders silence warnings, which Python does for all threads at once
_decoding = threading.Lock()


def load_image(source, dicom_display: str = "standard", public_only: bool = False) -> Image.Image:
    """Loads a path, an http(s) address, the bytes of a file or a PIL image, upright and in mode RGB.

    Grey of more than 8 bits is scaled to 8, and alpha is dropped, as published.

    dicom_display: "standard" shows DICOM as the file says, "jpg" as the images of MIMIC-CXR-JPG were made.
    public_only: refuse addresses, also after redirects, that are not on the public internet. A program that takes
    addresses from strangers needs it. Raises OSError or ValueError, one line each.
    """
    if dicom_display not in DISPLAYS:
        raise ValueError(f"dicom_display {dicom_display!r} is none of {', '.join(DISPLAYS)}")
    # 1) read the file; what comes from outside must not reach a terminal as it is
    name = data = source
    if isinstance(source, bytes | Image.Image):
        name = "the image"
    elif isinstance(source, str) and HTTP.match(source):
        name = printable(source, 500)
        try:
            data = download(source, public_only)
        except Exception as error:  # urllib, http.client and ssl raise errors of their own
            raise OSError(f"no image from {name} ({printable(error, 500)}): check the address") from None
    else:
        name = printable(source, 500)
        data = _read(source, name)

    # 2) decode it
    try:
        with _decoding:
            if _is_dicom(source, data):
                return Image.fromarray(read_dicom(name, data, dicom_display)).convert("RGB")
            return _decode(name, data)
    except ImportError:
        raise ValueError(f"{name} is a DICOM file, which needs pydicom 3: pip install pydicom") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is {_describe(data)}: give a JPEG, PNG, TIFF or DICOM") from None
    except Exception as error:  # each decoder raises errors of its own
        reason = printable(error, 500)
        raise ValueError(f"{name} is a damaged or unsupported image ({reason}): fetch it again or convert it") from None


def _read(path, name: str) -> bytes:
    check_readable(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"no image {name}: check the path")
    with open(path, "rb") as file:
        data = file.read(FILE_BYTES + 1)
    if len(data) > FILE_BYTES:
        raise ValueError(f"{name} is larger than {FILE_BYTES // 2**30} GB: is it an image?")
    return data


def _describe(data: bytes) -> str:
    if not data:
        return "empty"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "a TIFF of a kind that Pillow does not read (bits, byte order, photometric interpretation)"
    return "not an image"


def _is_dicom(source, data) -> bool:
    """Whether it has DICM behind 128 bytes (PS3.10, 7.1), or a DICOM file's name and a first tag of group 2 or 8."""
    if isinstance(data, Image.Image):
        return False
    is_tag = data[:2] in (b"\2\0", b"\0\2", b"\b\0", b"\0\b")
    has_name = not isinstance(source, bytes) and DICOM_NAME.search(str(source))
    return data[128:132] == b"DICM" or bool(is_tag and has_name)


def _decode(name: str, source) -> Image.Image:
    """Decodes the bytes of a file, or takes a PIL image, and turns it upright."""
    # 1) look at the header
    image = source
    if isinstance(source, bytes):
        with warnings.catch_warnings():
            # our own limit follows
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source), formats=FORMATS)
        if getattr(image, "is_animated", False):
            warnings.warn(f"{name} has several pictures: the first is read", stacklevel=3)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"too many pixels: {image.width} × {image.height}")
    tags = getattr(image, "tag_v2", {})
    white_is_zero = image.format == "TIFF" and tags.get(PHOTOMETRIC, 0) == 0
    # a grey value's bits, as the file states them: 0 if it does not
    bits = _stated_bits(image, tags, source)
    tiles = str(getattr(image, "tile", ""))  # what Pillow will decode, and how
    if image.format == "TIFF":
        _check_tiff(tags, tiles)

    # 2) decode
    with _libtiff_errors() as errors:
        image = ImageOps.exif_transpose(image)
        image.load()
    if errors:
        raise ValueError(errors[0])

    # 3) 8 bits
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _to_8_bits(name, image, bits, white_is_zero).convert("RGB")
    image = image.convert("RGB")
    # Pillow has kept the upper 8 bits of each colour
    brightest = max(high for _, high in image.getextrema())
    if ";16" in tiles and 0 < brightest < 16:
        raise ValueError("its 16-bit colours are all below a sixteenth of white: are they of 12 bits?")
    return image


# ------------------------------------------------------------------------------------------ grey of more than 8 bits


def _check_tiff(tags, tiles: str):
    """ValueError for two kinds of TIFF that Pillow 12.1 decodes to noise."""
    is_compressed = "libtiff" in tiles
    has_planes = tags.get(PLANAR) == 2 and np.max(tags.get(BITS_PER_SAMPLE, 1)) > 8
    if has_planes and not is_compressed:
        raise ValueError("16-bit colours in separate planes")
    if is_compressed and "BS'" in tiles:
        raise ValueError("compressed, signed and big-endian")


def _stated_bits(image: Image.Image, tags, source) -> int:
    """How many bits a grey value has, as the file states it besides its pixel format; 0 if it does not."""
    # these two formats scale by the depth that their header states
    if image.format in ("JPEG2000", "PPM"):
        return 16
    # only a number like 4095 states a depth; others are statistics (TIFF 6.0, section 8)
    highest = int(np.max(tags.get(MAX_SAMPLE, 0)))
    if highest and highest & (highest + 1) == 0:
        return highest.bit_length()
    stored = int(np.max(tags.get(BITS_PER_SAMPLE, 0)))
    if stored in range(9, 16):
        return stored
    if isinstance(source, bytes) and image.format == "PNG":
        return _png_significant_bits(source)
    return 0


def _png_significant_bits(data: bytes) -> int:
    """The first number of a PNG's sBIT chunk, 0 without one (PNG, 11.3.2.7)."""
    # signature; then each chunk's length, name, content and checksum. sBIT comes before the pixels
    position = 8
    while (kind := data[position + 4 : position + 8]) and kind != b"IDAT":
        if kind == b"sBIT":
            return data[position + 8]
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return 0


def _to_8_bits(name: str, image: Image.Image, bits: int, white_is_zero: bool) -> Image.Image:
    """A grey image of up to 16 bits -> mode L. bits: what the file states, or 0."""
    values = np.asarray(image)
    lowest, highest = values.min(), values.max()
    if image.mode == "F" or lowest < 0 or highest > 65535:
        raise ValueError("its pixels are not whole numbers of 8 or 16 bits")

    # 12 bits are the usual depth of X-ray detectors; files often hold them in 16 bits without a word
    pixel_bits = 32 if image.mode == "I" else 16
    guess = 12 if highest < 4096 else 16
    if not bits and guess < pixel_bits and highest:
        force = "Image.open(FILE).save('new.tif', tiffinfo={281: 2**BITS - 1})"
        text = f"{name} has {pixel_bits} bits per pixel but no value above {highest}: shown as {guess} bits"
        warnings.warn(f"{text}; if that is wrong, have Pillow write the depth into the file: {force}", stacklevel=4)
    bits = bits or guess
    # PNG states the depth before values were scaled to 16 bits (if they were)
    if highest >= 2**bits:
        bits = 16

    levels = (np.arange(2**bits) * 255 / (2**bits - 1)).round().astype(np.uint8)
    if white_is_zero:
        levels = 255 - levels
    return Image.fromarray(levels[values])


# ------------------------------------------------------------------------------------------ libtiff

_heard = threading.local()


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
def _hear(module, text, _):
    # text is a format of printf, whose arguments we leave alone
    with suppress(AttributeError):
        _heard.errors.append(f"{module.decode(errors='replace')}: {text.decode(errors='replace').split('%')[0]}")


@functools.cache
def _listen_to_libtiff():
    """libtiff prints errors and warnings, and decodes on after some errors. This has it call us instead."""
    # Pillow offers no way; where its library does not show these functions, all stays as it is
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(Image.core.__file__)
        library.TIFFSetErrorHandler(_hear)
        library.TIFFSetWarningHandler(None)


@contextmanager
def _libtiff_errors():
    """Yields the list of the errors that libtiff reports in this block, in this thread."""
    _listen_to_libtiff()
    _heard.errors = []
    try:
        yield _heard.errors
    finally:
        del _heard.errors
