"""An image, wherever it comes from -> a PIL image in mode RGB: a file, an http(s) address, bytes, DICOM."""

import io
import re
import string
import threading
import time
import urllib.error
import urllib.request
import warnings
from concurrent import futures
from pathlib import Path
from urllib.parse import quote, urljoin

import numpy as np
from PIL import Image, ImageOps

URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.I)
URL_BYTES, URL_SECONDS, URL_REDIRECTS = 64 * 2**20, 20, 5  # the most that one image may take, all in all
DICOM_NAME = re.compile(r"\.(dcm|dicom)($|[?#])", re.I)
FORMATS = ("JPEG", "JPEG2000", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM")  # none that runs a program, as EPS does


def load_image(source) -> Image.Image:
    """A path, an http(s) address, the bytes of an image file or a PIL image -> a PIL image in mode RGB, upright.

    Grey of 16 bits is scaled by its full range to 8; an alpha channel is dropped, as published. DICOM (which needs
    pydicom) is shown as the file says: `_load_dicom`. OSError or ValueError with one line where the image is missing,
    empty, truncated, no image, or has more pixels than Pillow holds for safe.
    """
    name, file, head = "the image", None, b""
    if isinstance(source, bytes):
        file, head = io.BytesIO(source), source[:132]
    elif isinstance(source, str) and URL.match(source):
        name, data = source, _fetch(source)
        file, head = io.BytesIO(data), data[:132]
    elif not isinstance(source, Image.Image):
        name = file = Path(source)
        if not file.exists():
            raise FileNotFoundError(f"no image {file}: check the path")
        if not file.is_file():
            raise IsADirectoryError(f"{file} is a directory: give an image file")
        with file.open("rb") as opened:
            head = opened.read(132)
        if not head:
            raise ValueError(f"{file} is empty: fetch it again")
    # Without the magic a DICOM file begins with a tag of group 2 or 8, in either byte order.
    bare = DICOM_NAME.search(str(name)) and head[:2] in (b"\2\0", b"\0\2", b"\b\0", b"\0\b")
    if bare or head[128:132] == b"DICM":
        return _load_dicom(name, file.read_bytes() if isinstance(file, Path) else file.getvalue())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source if file is None else Image.open(file, formats=FORMATS)
            image = ImageOps.exif_transpose(image)
            image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS // 10**6
        raise ValueError(f"{name} has more than {limit} million pixels: scale it down first") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that can be read: give a JPEG, PNG, TIFF or DICOM") from None
    except Exception as error:  # Pillow's decoders raise whatever their formats come to
        raise ValueError(f"{name} is a damaged or truncated image ({error}): fetch it again") from None
    deep = image.mode == "I" or image.mode.startswith("I;16")  # Pillow would clip at 255
    values = np.asarray(image, dtype=np.float64) if deep else np.zeros(1)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name} has pixels that are not whole numbers of 8 or 16 bits: save it so")
    if deep:
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    return image.convert("RGB")


def _load_dicom(name, data: bytes) -> Image.Image:
    """The first frame of a DICOM file as it is meant to be seen, in mode RGB.

    Grey: see `_grey`; MONOCHROME1 is inverted after it. YBR becomes RGB, a palette is looked up, and colours of more
    than 8 bits are scaled by their full range. ValueError with one line where pixels or a package are missing.
    """
    try:
        import pydicom
        from pydicom import uid
        from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
    except ImportError:
        raise ValueError(f"{name} is a DICOM file, which pydicom 3 reads: pip install pydicom") from None
    advice = "fetch it again, or save it as PNG"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file that strays from the standard and can be read is fine
            if uid.DeflatedExplicitVRLittleEndian.encode() in data:  # pydicom would inflate it without a limit
                raise ValueError("it is deflated")
            dicom = pydicom.dcmread(io.BytesIO(data), force=True)
            if not dicom.get("PixelData"):
                raise ValueError("no pixel data")
            if dicom.Rows * dicom.Columns > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS // 10**6} million pixels")
            _, little = dicom.original_encoding
            plain = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian  # where the file does not say
            decoder = get_decoder(dicom.file_meta.setdefault("TransferSyntaxUID", plain).value)
            if "pydicom" not in decoder.available_plugins:  # which needs no other package
                packages = re.findall(r"pylibjpeg[\w-]*", " ".join(decoder.missing_dependencies))
                advice = f"pip install {' '.join(dict.fromkeys(packages))}" if packages else advice
            values, kind = pixel_array(dicom, index=0), dicom.PhotometricInterpretation
            if kind in ("MONOCHROME1", "MONOCHROME2"):
                shown = _grey(dicom, values, little)
                shown = 1 - shown if kind == "MONOCHROME1" else shown
            elif kind == "PALETTE COLOR":
                bits = dicom.RedPaletteColorLookupTableDescriptor[2]
                shown = apply_color_lut(values, dicom)[..., :3] / (2**bits - 1)
            elif kind in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"):
                shown = values / (2**dicom.BitsStored - 1)
            else:
                raise ValueError(f"its photometric interpretation is {kind}")
            image = Image.fromarray((255 * shown.clip(0, 1)).round().astype(np.uint8)).convert("RGB")
    except Exception as error:  # a damaged file comes to whatever pydicom and its decoders come to
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} is a DICOM file that cannot be read ({reason}): {advice}") from None
    if int(dicom.get("NumberOfFrames") or 1) > 1:
        warnings.warn(f"{name} has {dicom.NumberOfFrames} frames: the first is read", stacklevel=3)
    return image


def _grey(dicom, values, little: bool):
    """Stored values -> what is to be seen of them, up to 0 black and from 1 on white; DICOM PS3.3, C.11.1 and C.11.2.

    The Modality LUT, or rescale slope and intercept; then the VOI LUT, or else the first window. Without either, the
    least value of the frame becomes 0 and the greatest 1, which is what MIMIC-CXR-JPG began with. pydicom's own
    functions are not used: a falling slope turns their windows upside down, and an 8-bit LUT wraps their indices.
    """
    if dicom.get("ModalityLUTSequence"):
        values, _ = _look_up(dicom.ModalityLUTSequence[0], values, little)
    else:
        values = values * float(dicom.get("RescaleSlope") or 1) + float(dicom.get("RescaleIntercept") or 0)
    if dicom.get("VOILUTSequence"):
        values, bits = _look_up(dicom.VOILUTSequence[0], values, little)
        return values / (2**bits - 1)
    center, width = (np.ravel(dicom.get(keyword))[0] for keyword in ("WindowCenter", "WindowWidth"))
    function = dicom.get("VOILUTFunction") or "LINEAR"
    if center is None or width is None or width <= 0:
        low, high = values.min(), values.max()
    elif function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    else:
        low, high = center - width / 2, center + width / 2 - (function == "LINEAR")
    return (values - low) / max(high - low, 1e-9)


def _look_up(item, values, little: bool):
    """Values through the lookup table of a sequence's item -> (entries, their bits)."""
    entries, first, bits = item.LUTDescriptor
    table = item.LUTData
    if isinstance(table, bytes):
        table = np.frombuffer(table, f"{'<' if little else '>'}u{len(table) // (entries or 2**16)}")
    places = values.astype(np.int64) - first
    return np.asarray(table)[places.clip(0, len(table) - 1)], bits


def _fetch(url: str) -> bytes:
    """What an http(s) address holds, in memory; OSError with one line where it is none, gone, slow or too large."""
    future = futures.Future()

    def work():
        try:
            future.set_result(_download(url))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # urllib limits the time of one read, not of names or headers
    try:
        return future.result(URL_SECONDS)
    except (TimeoutError, futures.TimeoutError):
        reason = f"not within {URL_SECONDS} s"
    except Exception as error:  # urllib's, http.client's and ssl's
        reason = " ".join(str(getattr(error, "reason", error)).split())
    raise OSError(f"no image from {url} ({reason}): check the address, or give a downloaded file")


def _download(url: str) -> bytes:
    """`_fetch` without its time limit; any Exception, whose text is a reason."""
    opener = urllib.request.OpenerDirector()  # without a way to files, ftp, or redirects that are not looked at
    for handler in ("ProxyHandler", "HTTPHandler", "HTTPSHandler", "HTTPDefaultErrorHandler", "HTTPErrorProcessor"):
        opener.add_handler(getattr(urllib.request, handler)())
    opener.addheaders = [("User-Agent", "nanolibra")]
    end = time.monotonic() + URL_SECONDS
    for _ in range(URL_REDIRECTS + 1):
        scheme = URL.match(url)
        if not scheme or scheme[1].lower() not in ("http", "https"):
            raise ValueError(f"{url} is not http(s)")
        try:
            response = opener.open(quote(url, safe=string.punctuation), timeout=URL_SECONDS)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if not (300 <= error.code < 400 and "Location" in error.headers):
                raise ValueError(f"{error.code} {error.reason}") from None
            url = urljoin(url, error.headers["Location"])
    else:
        raise ValueError(f"more than {URL_REDIRECTS} redirects")
    with response:
        length, data = response.length, bytearray()  # no length: it ends when it ends
        while max(len(data), length or 0) <= URL_BYTES and (part := response.read1(2**16)):
            data += part
            if time.monotonic() > end:
                raise TimeoutError  # nobody waits any more
    if max(len(data), length or 0) > URL_BYTES:
        raise ValueError(f"more than {URL_BYTES // 2**20} MB")
    if len(data) < (length or 1):
        raise ValueError(f"{len(data)} bytes of {length or 'some'}")
    if data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise ValueError("a page, not an image")
    return bytes(data)
