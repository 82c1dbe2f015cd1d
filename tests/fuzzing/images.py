"""Images that are damaged, or whose headers declare what is not there, for the fuzzer."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
from fuzzing.damage import damage_bytes, damage_whole
from PIL import Image
from pydicom import uid
from pydicom.dataelem import DataElement

FORMATS = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "gif": "GIF", "bmp": "BMP", "webp": "WEBP", "ppm": "PPM",
           "jp2": "JPEG2000"}  # fmt: skip
MODES = {"png": ("L", "RGB", "I;16", "P", "RGBA", "1", "LA"), "tif": ("L", "RGB", "I;16", "F", "CMYK", "1", "I")}
SIZES = (0, 1, 2, 40_000, 65_535, 200_000, 2**31 - 1, 2**32 - 1)
# elements of a DICOM file, and values that are odd for them
ELEMENTS = {
    "Rows": (0, 1, 65_535), "Columns": (0, 1, 65_535), "NumberOfFrames": ("0", "-1", "1000000000", "x", ""),
    "BitsAllocated": (0, 1, 7, 12, 32, 64, 65_535), "BitsStored": (0, 1, 7, 17, 64), "HighBit": (0, 3, 40),
    "PixelRepresentation": (1, 2, 65_535), "SamplesPerPixel": (0, 2, 3, 4, 65_535), "PlanarConfiguration": (1, 2),
    "PhotometricInterpretation": ("", "X", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "MONOCHROME1"),
    "WindowCenter": ("", "x", "1e308", "-1e308", "1\\2", "nan"), "WindowWidth": ("", "x", "0", "-5", "1e308", "\\3"),
    "RescaleSlope": ("", "0", "x", "1e308", "nan", "-1"), "RescaleIntercept": ("", "x", "1e308", "nan"),
    "VOILUTFunction": ("", "X", "SIGMOID"), "PixelPaddingValue": (0, 65_535), "PixelData": (b"", b"\0", b"\0" * 7),
}  # fmt: skip


def break_image(draw: random.Random, folder: Path) -> tuple[Path, str]:
    """Writes a bad image into a folder. Returns its path, and what is bad."""
    way = draw.choice(["damaged", "damaged", "header", "header", "dicom", "dicom", "long"])
    if way == "dicom":
        return _dicom(draw, folder)
    if way == "long":
        # some bytes on the disk, and gigabytes when it is made square
        size = draw.choice([(40_000, 2), (2, 60_000), (1, 89_000), (150_000, 1), (9_000, 9_000), (1, 1), (12_000, 500)])
        path = folder / f"image.{draw.choice(('png', 'gif', 'tif', 'jpg'))}"
        if max(size) > 65_500:
            path = path.with_suffix(".png")
        Image.new(draw.choice(("L", "RGB")), size).save(path)
        return path, f"{path.name} of {size[0]} × {size[1]} pixels"

    suffix = draw.choice(("png", "png", "jpg", "jpg", "tif", "tif", *FORMATS))
    path = folder / f"image.{suffix}"
    values = np.random.RandomState(draw.randrange(100)).randint(0, 255, (33, 40, 3), np.uint8)
    mode = draw.choice(MODES.get(suffix, ("L", "RGB")))
    image = Image.fromarray(values)
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    image = image if mode == "I;16" else image.convert("L").convert(mode) if mode in "IF" else image.convert(mode)
    image.save(path, FORMATS[suffix])
    if way == "header":
        return path, _declare(draw, path)
    where = damage_whole(draw, path) if draw.random() < 0.1 else damage_bytes(draw, path)
    return path, f"{mode} {where.text}"


def _declare(draw: random.Random, path: Path) -> str:
    """Changes the size in a header; returns what it says then."""
    data = bytearray(path.read_bytes())
    width, height = draw.choice(SIZES), draw.choice(SIZES)
    short = lambda number: number & 0xFFFF
    if path.suffix == ".png":
        # IHDR: width, height, and a checksum
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    elif path.suffix == ".jpg":
        place = max(data.find(b"\xff\xc0"), 0)
        data[place + 5 : place + 9] = struct.pack(">HH", short(height), short(width))
    elif path.suffix == ".tif":
        # a directory of entries of 12 bytes: tag, type, count, value
        (start,) = struct.unpack("<I", data[4:8])
        (count,) = struct.unpack("<H", data[start : start + 2])
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag = struct.unpack("<H", data[entry : entry + 2])[0]
            # the size, bits, compression, strips
            if tag in (256, 257) or (draw.random() < 0.1 and tag in (258, 259, 262, 273, 277, 278, 279)):
                number = {256: width, 257: height}.get(tag, draw.choice(SIZES))
                data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, number)
    elif path.suffix == ".gif":
        data[6:10] = struct.pack("<HH", short(width), short(height))
    elif path.suffix == ".bmp":
        data[18:26] = struct.pack("<II", width, height)
    elif path.suffix == ".ppm":
        data = data.replace(b"40 33", f"{width} {height}".encode(), 1)
    path.write_bytes(data)
    return f"{path.name} declares {width} × {height} pixels"


def _dicom(draw: random.Random, folder: Path) -> tuple[Path, str]:
    path = folder / "image.dcm"
    values = np.random.RandomState(0).randint(0, 4095, (33, 40)).astype(np.uint16)
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    dataset.set_pixel_data(values, "MONOCHROME2", bits_stored=12)
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    what = []
    for name in draw.sample(sorted(ELEMENTS), draw.randrange(4)):
        value = draw.choice(ELEMENTS[name])
        tag = pydicom.datadict.tag_for_keyword(name)
        kind = {"PixelData": "OW", "PixelPaddingValue": "US"}.get(name) or pydicom.datadict.dictionary_VR(tag)
        if draw.random() < 0.2:
            dataset.pop(tag, None)
            what.append(f"without {name}")
            continue
        # numbers in text are written as they are
        kind = "LO" if kind in ("DS", "IS") else kind
        dataset[tag] = DataElement(tag, kind, value, validation_mode=0)
        what.append(f"{name} {value!r}")
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    data = file.getvalue()
    for name in ("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept", "NumberOfFrames"):
        # … under their own type
        tag = pydicom.datadict.tag_for_keyword(name)
        head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
        data = data.replace(head + b"LO", head + pydicom.datadict.dictionary_VR(tag).encode())
    path.write_bytes(data)
    if not what:
        what.append(damage_bytes(draw, path).text)
    return path, f"image.dcm: {', '.join(what)}"
