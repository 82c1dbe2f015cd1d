"""An image file, an http(s) address, bytes or a DICOM file -> a PIL image in mode RGB."""

import io
import re
import time
import urllib.request
import warnings
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

HTTP = re.compile(r"https?://", re.I)
URL_LETTERS = "!#$%&'()*+,/:;=?@[]~"  # that mean something in an address (RFC 3986)
URL_BYTES, URL_SECONDS = 64 * 2**20, 20  # the most that one image may take
DICOM_NAME = re.compile(r"\.(dcm|dicom)($|[?#])", re.I)
# not EPS and others for which Pillow runs another program
FORMATS = ("JPEG", "JPEG2000", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM")


def load_image(source) -> Image.Image:
    """Load a path, an http(s) address, the bytes of a file or a PIL image, upright and in mode RGB.

    Grey of 16 bits is scaled to 8, and alpha is dropped, as published. Raises OSError or ValueError, one line each.
    """
    # 1) read the file
    name = data = source
    if isinstance(source, bytes | Image.Image):
        name = "the image"
    elif isinstance(source, str) and HTTP.match(source):
        data = _download(source)
    elif Path(source).exists():
        data = Path(source).read_bytes()
    else:
        raise FileNotFoundError(f"no image {source}: check the path")

    # 2) decode it
    try:
        return _decode_dicom(name, data) if _is_dicom(name, data) else _decode(data)
    except ImportError:
        raise ValueError(f"{name} is a DICOM file, which needs pydicom 3: pip install pydicom") from None
    except UnidentifiedImageError:
        problem = "not an image" if data else "empty"
        raise ValueError(f"{name} is {problem}: give a JPEG, PNG, TIFF or DICOM") from None
    except Exception as error:  # each decoder raises errors of its own
        reason = _one_line(error)
        raise ValueError(f"{name} is a damaged or unsupported image ({reason}): fetch it again or convert it") from None


def _one_line(error) -> str:
    return " ".join(str(error).split())


def _is_dicom(name, data) -> bool:
    """Whether it has DICM behind 128 bytes (PS3.10, 7.1), or a DICOM file's name and a first tag of group 2 or 8."""
    if isinstance(data, Image.Image):
        return False
    is_tag = data[:2] in (b"\2\0", b"\0\2", b"\b\0", b"\0\b")
    return data[128:132] == b"DICM" or bool(is_tag and DICOM_NAME.search(str(name)))


class _HTTPRedirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(self, request, response, code, message, headers, url):
        # urllib would read its body, however long
        response.close()
        # and it would follow an address to FTP
        if not HTTP.match(url):
            raise ValueError(f"it redirects to {url}")
        return super().redirect_request(request, response, code, message, headers, url)


def _download(url: str) -> bytes:
    """Return what an http(s) address holds; an OSError of one line says why it cannot."""
    opener = urllib.request.build_opener(_HTTPRedirects)
    opener.addheaders = [("User-Agent", "nanolibra")]
    deadline, data = time.monotonic() + URL_SECONDS, bytearray()
    try:
        # piece by piece, because urllib limits neither the size nor the whole time, only each wait
        with opener.open(quote(url, safe=URL_LETTERS), timeout=URL_SECONDS) as response:
            while piece := response.read1(2**16):
                data += piece
                if len(data) > URL_BYTES or time.monotonic() > deadline:
                    raise ValueError(f"more than {URL_BYTES // 2**20} MB or {URL_SECONDS} s")
            if response.length:
                raise ValueError(f"{response.length} bytes are missing")
    except Exception as error:  # urllib, http.client and ssl raise errors of their own
        raise OSError(f"no image from {url} ({_one_line(error)}): check the address") from None
    return bytes(data)


def _decode(source) -> Image.Image:
    """Decode the bytes of a file, or take a PIL image, and turn it upright."""
    with warnings.catch_warnings():
        # Pillow only warns of a large image, and raises for a huge one
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(source), formats=FORMATS) if isinstance(source, bytes) else source
        image = ImageOps.exif_transpose(image)
        image.load()

    # 16 bits -> 8 bits, which Pillow would clip at 255
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels are not whole numbers of 8 or 16 bits")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    return image.convert("RGB")


def _decode_dicom(name, data: bytes) -> Image.Image:
    """Return the first frame of a DICOM file, shown as the file says, in mode RGB; needs pydicom."""
    from pydicom import dcmread, uid

    # pydicom would inflate a deflated data set (PS3.5, A.5) to any size
    if uid.DeflatedExplicitVRLittleEndian.encode() in data:
        raise ValueError("it is deflated")
    with warnings.catch_warnings():
        # many files stray from the standard and can still be read
        warnings.simplefilter("ignore")
        dicom = dcmread(io.BytesIO(data), force=True)
        if not dicom.get("PixelData"):
            raise ValueError("no pixel data")
        if dicom.Rows * dicom.Columns > Image.MAX_IMAGE_PIXELS:
            raise ValueError("too many pixels")
        # a bare data set does not name its transfer syntax, but pydicom has found its byte order
        syntax = uid.ExplicitVRLittleEndian if _byte_order(dicom) == "<" else uid.ExplicitVRBigEndian
        dicom.file_meta.setdefault("TransferSyntaxUID", syntax)
        values = 255 * _shown_values(dicom).clip(0, 1)
    if int(dicom.get("NumberOfFrames") or 1) > 1:
        warnings.warn(f"{name} has {dicom.NumberOfFrames} frames: the first is read", stacklevel=3)
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")


def _byte_order(dicom) -> str:
    _, little_endian = dicom.original_encoding
    return "<" if little_endian else ">"


def _shown_values(dicom):
    """Return the first frame from 0 (black) to 1 (white): [rows, columns] if grey, [rows, columns, 3] if colour."""
    from pydicom.pixels import apply_color_lut, pixel_array

    values = pixel_array(dicom, index=0)  # turns YBR into RGB
    kind = dicom.PhotometricInterpretation  # PS3.3, C.7.6.3.1.2
    if kind in ("MONOCHROME1", "MONOCHROME2"):
        grey = _grey(dicom, values)
        return 1 - grey if kind == "MONOCHROME1" else grey
    if kind == "PALETTE COLOR":
        bits = dicom.RedPaletteColorLookupTableDescriptor[2]
        return apply_color_lut(values, dicom)[..., :3] / (2**bits - 1)
    if kind in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"):
        return values / (2**dicom.BitsStored - 1)
    raise ValueError(f"its photometric interpretation is {kind}")


def _grey(dicom, values):
    """Stored values -> shown values: up to 0 black, from 1 white.

    pydicom's own functions turn windows upside down when the slope falls, and wrap around in 8-bit lookup tables.
    """
    # 1) Modality LUT (PS3.3, C.11.1): a lookup table, or else slope and intercept
    if dicom.get("ModalityLUTSequence"):
        values = _look_up(dicom, dicom.ModalityLUTSequence[0], values)
    else:
        values = values * float(dicom.get("RescaleSlope") or 1) + float(dicom.get("RescaleIntercept") or 0)

    # 2) VOI LUT (PS3.3, C.11.2): a lookup table, or else the first window, or else the frame's own range
    if dicom.get("VOILUTSequence"):
        table = dicom.VOILUTSequence[0]
        bits = table.LUTDescriptor[2]
        return _look_up(dicom, table, values) / (2**bits - 1)
    center, *_ = np.ravel(dicom.get("WindowCenter"))
    width, *_ = np.ravel(dicom.get("WindowWidth"))
    function = dicom.get("VOILUTFunction") or "LINEAR"
    if center is None or width is None or width <= 0:  # then as in MIMIC-CXR-JPG
        low, high = values.min(), values.max()
    elif function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    else:
        # C.11.2.1: LINEAR_EXACT is as wide as it says, LINEAR one value less
        low, high = center - width / 2, center + width / 2 - (function == "LINEAR")
    return (values - low) / max(high - low, 1e-9)


def _look_up(dicom, item, values):
    """Look values up in the table of a LUT sequence's item; values outside take its first or last entry."""
    entries, first, _ = item.LUTDescriptor
    table = item.LUTData
    if isinstance(table, bytes):  # else pydicom has parsed it
        entry_bytes = len(table) // (entries or 2**16)  # 0 stands for 2**16
        table = np.frombuffer(table, f"{_byte_order(dicom)}u{entry_bytes}")
    return np.take(table, values.astype(np.int64) - first, mode="clip")
