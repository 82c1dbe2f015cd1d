"""The oracles: Pillow, numpy, the formulas of the DICOM standard pixel by pixel, files of other programs, a server."""

import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pydicom
import pytest
from conftest import GOLDEN, ROOT
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate

import sample
from data import Study
from plumbing import dicom as dicom_module
from plumbing import download, image
from plumbing.image import load_image

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(10, 240, (6, 9), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (6, 9, 3), dtype=np.uint8)
U12 = RANDOM.integers(100, 4096, (6, 9), dtype=np.uint16)
U16 = RANDOM.integers(0, 65536, (6, 9), dtype=np.uint16)
PNG = (GOLDEN / "images" / "0.png").read_bytes()


def pixels(source):
    loaded = load_image(source)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, 2)


def refused(source, culprit=""):
    """load_image refuses the source with one line that names the culprit."""
    with pytest.raises((ValueError, OSError)) as caught:
        load_image(source)
    assert "\n" not in str(caught.value) and culprit in str(caught.value)


def encode(values, kind="PNG", **options):
    """The bytes of an image file; values are an array or a PIL image."""
    file = io.BytesIO()
    picture = values if isinstance(values, Image.Image) else Image.fromarray(values)
    picture.save(file, kind, **options)
    return file.getvalue()


def dataset(values, syntax=uid.ExplicitVRLittleEndian, kind="MONOCHROME2", stored=None, **elements):
    """A DICOM data set of values [rows, columns] or [rows, columns, 3]; elements replace what is made here."""
    made = pydicom.Dataset()
    made.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    made.set_pixel_data(values, "RGB" if values.ndim == 3 else "MONOCHROME2", bits_stored=8 * values.itemsize)
    made.PhotometricInterpretation, made.file_meta.TransferSyntaxUID = kind, syntax
    made.BitsStored = stored or made.BitsAllocated
    made.HighBit = made.BitsStored - 1
    if syntax == uid.ExplicitVRBigEndian:
        made.PixelData = values.byteswap().tobytes()
    for name, value in elements.items():
        setattr(made, name, value)
    made["PixelData"].is_undefined_length = uid.UID(syntax).is_compressed
    return made


def to_bytes(made, **options) -> bytes:
    file = io.BytesIO()
    made.save_as(file, **{"enforce_file_format": True} | options)
    return file.getvalue()


def dicom(*arguments, **elements) -> bytes:
    return to_bytes(dataset(*arguments, **elements))


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def palette(indices, colours, **options):
    picture = Image.fromarray(indices, "P")
    picture.putpalette(colours.tobytes())
    return encode(picture, **options)


def dicom_palette(indices, colours, bits):
    elements = {}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        entries = colours[:, channel] if bits == 8 else colours[:, channel].astype("<u2") * 257
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [len(entries), 0, bits]
        elements[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    return dicom(indices, kind="PALETTE COLOR", **elements)


DEEP = RANDOM.integers(0, 65536, (200, 300), dtype=np.uint16)
DEEP[0, :8] = 0, 1, 127, 128, 129, 385, 386, 65535  # 128 of 257 rounds down, 129 up
MOTOROLA = Image.frombytes("I;16B", (300, 200), DEEP.astype(">u2").tobytes())
SCALED = grey((DEEP.astype(int) + 128) // 257)  # v / 257, rounded
COLOURS = RANDOM.integers(0, 256, (256, 3), dtype=np.uint8)
PLANES = dict(PlanarConfiguration=1, PixelData=COLOUR.transpose(2, 0, 1).tobytes())
JPEG = encode(COLOUR, "JPEG", quality=90)
GREY_JPEG = encode(GREY, "JPEG", quality=90)
IMAGES = {  # a source, and what it shows
    "JPEG": (JPEG, by_pillow(JPEG)),
    "grey JPEG": (GREY_JPEG, by_pillow(GREY_JPEG)),
    "grey PNG": (encode(GREY), grey(GREY)),
    "grey TIFF": (encode(GREY, "TIFF"), grey(GREY)),
    "colour PNG": (encode(COLOUR), COLOUR),
    "colour TIFF": (encode(COLOUR, "TIFF"), COLOUR),
    "1 bit PNG": (encode(GREY > 99), grey(np.uint8(255) * (GREY > 99))),
    "1 bit TIFF": (encode(GREY > 99, "TIFF"), grey(np.uint8(255) * (GREY > 99))),
    "an alpha channel is dropped": (encode(np.dstack((COLOUR, GREY))), COLOUR),
    "an alpha channel beside grey": (encode(np.dstack((GREY, COLOUR[..., 0]))), grey(GREY)),
    "palette": (palette(GREY % 16, COLOURS), COLOURS[GREY % 16]),
    "palette with a transparent colour": (palette(GREY % 16, COLOURS, transparency=3), COLOURS[GREY % 16]),
    "16-bit PNG": (encode(DEEP), SCALED),
    "16-bit TIFF": (encode(DEEP, "TIFF"), SCALED),
    "16-bit compressed TIFF": (encode(DEEP, "TIFF", compression="tiff_lzw"), SCALED),
    "16-bit big-endian TIFF": (encode(MOTOROLA, "TIFF"), SCALED),
    "32-bit TIFF of 16-bit values": (encode(DEEP.astype(np.int32), "TIFF"), SCALED),
    "16-bit PIL": (Image.fromarray(DEEP), SCALED),
    "DICOM RGB": (dicom(COLOUR, kind="RGB"), COLOUR),
    "DICOM RGB of 16 bits": (dicom(COLOUR.astype(np.uint16) * 257, kind="RGB"), COLOUR),
    "DICOM RGB in planes": (dicom(COLOUR, kind="RGB", **PLANES), COLOUR),
    "DICOM palette of 8 bits": (dicom_palette(GREY, COLOURS, 8), COLOURS[GREY]),
    "DICOM palette of 16 bits": (dicom_palette(GREY, COLOURS, 16), COLOURS[GREY]),
}


@pytest.mark.parametrize(("source", "expected"), IMAGES.values(), ids=IMAGES)
def test_an_image_shows_what_was_stored(source, expected):
    assert (pixels(source) == expected).all()


def test_exif_orientation_is_applied_and_the_original_is_left_alone():
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    original = Image.open(io.BytesIO(encode(COLOUR, exif=exif)))
    loaded = load_image(original)
    assert (np.asarray(loaded) == np.rot90(COLOUR, -1)).all()
    loaded.paste((1, 2, 3), (0, 0, 5, 5))
    assert original.getexif()[274] == 6 and (np.asarray(original) == COLOUR).all()


@pytest.mark.parametrize("number", range(6))
def test_path_string_bytes_and_pil_give_the_same_pixels(number):
    path = GOLDEN / "images" / f"{number}.png"
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        assert (pixels(source) == by_pillow(path.read_bytes())).all()


def test_a_study_gives_current_and_prior_in_this_order_and_one_image_without_a_prior(tmp_path):
    (tmp_path / "current.png").write_bytes(encode(COLOUR))
    current, prior = Study(tmp_path / "current.png", Image.fromarray(GREY)).images()
    assert (np.asarray(current) == COLOUR).all() and (np.asarray(prior) == grey(GREY)).all()
    (alone,) = Study(encode(COLOUR)).images()
    assert (np.asarray(alone) == COLOUR).all()


# ------------------------------------------------------------------------------------------- more than 8 bits


RAMP = np.append(np.linspace(0, 4095, 76), 4095).astype(np.uint16).reshape(7, 11)  # 12 bits, rows of half bytes


def tiff(values, bits=16, order="<", compressed=False, **tags):
    """A TIFF of values [rows, columns], packed in `bits` each (TIFF 6.0, sections 2 and 3); tags replace ours."""
    if bits % 8:
        # rows end at a byte
        unpacked = values[..., None] >> np.arange(bits)[::-1] & 1  # [rows, columns, bits]
        data = np.packbits(unpacked.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()
    else:
        data = values.astype(f"{order}u{bits // 8}").tobytes()
    data = zlib.compress(data) if compressed else data
    rows, columns = values.shape
    fields = {256: columns, 257: rows, 258: bits, 259: 8 if compressed else 1, 262: 1, 277: 1, 278: rows}
    fields |= {279: len(data), 339: 1} | {int(name[1:]): value for name, value in tags.items()}
    fields[273] = 8 + 2 + 12 * (len(fields) + 1) + 4  # where the data begin
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(fields.items())]
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(f"{order}IH", 8, len(entries))
    return head + b"".join(entries) + bytes(4) + data


def png_chunk(data, name, content):
    """The PNG with another chunk behind its header."""
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data[:33] + chunk + data[33:]


def graymap(values, highest):
    rows, columns = values.shape
    return b"P5 %d %d %d\n" % (columns, rows, highest) + values.astype(">u2").tobytes()


def scaled(values, bits):
    return (np.asarray(values, float) * 255 / (2**bits - 1)).round()


DEPTHS_STATED = {  # a file that states its depth, and what it shows
    "12 packed bits": (tiff(RAMP, 12), scaled(RAMP, 12)),
    "12 packed bits, compressed": (tiff(RAMP, 12, compressed=True), scaled(RAMP, 12)),
    "12 packed bits of a dark image": (tiff(RAMP // 64, 12), scaled(RAMP // 64, 12)),
    "16 bits, white is zero": (tiff(DEEP, t262=0), 255 - scaled(DEEP, 16)),
    "16 bits, white is zero, compressed": (tiff(DEEP, compressed=True, t262=0), 255 - scaled(DEEP, 16)),
    "8 bits, white is zero": (tiff(GREY, 8, t262=0), 255 - GREY),
    "4 bits, white is zero": (tiff(GREY % 16, 4, t262=0), 255 - 17 * (GREY % 16)),
    "MaxSampleValue 4095": (tiff(RAMP, t281=4095), scaled(RAMP, 12)),
    "MaxSampleValue 4095 in big endian": (tiff(RAMP, order=">", t281=4095), scaled(RAMP, 12)),
    "MaxSampleValue 4095, white is zero": (tiff(RAMP, t281=4095, t262=0), 255 - scaled(RAMP, 12)),
    "MaxSampleValue 1023": (tiff(RAMP // 4, t281=1023), scaled(RAMP // 4, 10)),
    "MaxSampleValue 65535 of a dark image": (tiff(RAMP, t281=65535), scaled(RAMP, 16)),
    "MaxSampleValue that is only the brightest value": (tiff(DEEP // 2, t281=30000), scaled(DEEP // 2, 16)),
    "sBIT 12": (png_chunk(encode(RAMP), b"sBIT", b"\x0c"), scaled(RAMP, 12)),
    "sBIT 12 of values that were scaled": (png_chunk(encode(DEEP), b"sBIT", b"\x0c"), scaled(DEEP, 16)),
    "sBIT 16 of a dark image": (png_chunk(encode(RAMP), b"sBIT", b"\x10"), scaled(RAMP, 16)),
    "a graymap up to 4095": (graymap(RAMP, 4095), scaled(RAMP, 12)),
    "a dark graymap up to 4095": (graymap(RAMP // 64, 4095), scaled(RAMP // 64, 12)),
    "a dark JPEG 2000": (encode(RAMP, "JPEG2000"), scaled(RAMP, 16)),
}


@pytest.mark.parametrize(("data", "expected"), DEPTHS_STATED.values(), ids=DEPTHS_STATED)
def test_a_depth_that_the_file_states_is_used(data, expected, recwarn):
    assert (pixels(data) == grey(expected)).all()
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_that_hold_12_are_shown_as_12_with_a_warning_that_helps(tmp_path, kind, recwarn):
    file = tmp_path / "chest.image"
    file.write_bytes(encode(RAMP, kind))
    assert (pixels(file) == grey(scaled(RAMP, 12))).all()
    (warning,) = recwarn.list
    assert f"{file} has 16 bits per pixel but no value above 4095: shown as 12 bits" in str(warning.message)
    # what the warning says forces another depth
    for bits in (14, 16):
        Image.open(file).save(tmp_path / "new.tif", tiffinfo={281: 2**bits - 1})
        assert (pixels(tmp_path / "new.tif") == grey(scaled(RAMP, bits))).all()
    assert len(recwarn.list) == 1


@pytest.mark.parametrize("level", [0, 4096])
def test_an_image_that_is_black_or_brighter_is_not_taken_for_12_bits(level, recwarn):
    values = np.full((4, 5), level, np.uint16)
    assert (pixels(encode(values)) == grey(scaled(values, 16))).all()
    assert not recwarn.list


def tiff_in_planes(values):
    """A TIFF of values [rows, columns, 3], 16 bits, a plane after the other (PlanarConfiguration 2)."""
    file = io.BytesIO(tiff(np.concatenate(np.moveaxis(values, 2, 0)), t257=len(values), t262=2, t277=3, t284=2))
    return file.getvalue()


def png_of_colours(values):
    """A PNG of 16-bit colours [rows, columns, 3], which Pillow cannot write; each row begins with its filter, 0."""
    rows, columns, _ = values.shape
    lines = [b"\0" + line.astype(">u2").tobytes() for line in values]
    chunks = {b"IHDR": struct.pack(">IIBBBBB", columns, rows, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(b"".join(lines))}
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in (chunks | {b"IEND": b""}).items():
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data


def test_colours_of_16_bits_keep_their_upper_8():
    values = RANDOM.integers(0, 65536, (6, 9, 3))
    assert (pixels(png_of_colours(values)) == values >> 8).all()


UNREAD = "a TIFF of a kind that Pillow does not read"
MISREAD = {  # what Pillow reads wrongly or not at all, and what the refusal says
    "12 bits, white is zero": (tiff(RAMP, 12, t262=0), UNREAD),
    "12 bits in big endian": (tiff(RAMP, 12, order=">"), UNREAD),
    "10 bits": (tiff(RAMP // 4, 10), UNREAD),
    "16 bits in big endian, white is zero": (tiff(DEEP, order=">", t262=0), UNREAD),
    "signed, compressed and in big endian": (tiff(RAMP, order=">", compressed=True, t339=2), "signed"),
    "colours of 16 bits in planes": (tiff(DEEP, t262=2, t277=3, t284=2), "planes"),
    "colours of 12 bits in 16": (png_of_colours(np.dstack([RAMP] * 3)), "sixteenth"),
}


@pytest.mark.parametrize(("data", "reason"), MISREAD.values(), ids=MISREAD)
def test_what_would_be_noise_is_refused_by_its_kind(data, reason):
    refused(data, reason)


def test_the_first_of_several_pages_is_read_with_a_warning():
    pages = encode(Image.fromarray(GREY), "TIFF", save_all=True, append_images=[Image.fromarray(GREY + 1)])
    with pytest.warns(UserWarning, match="the image has several pictures: the first is read"):
        assert (pixels(pages) == grey(GREY)).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "group4"])
def test_the_errors_of_libtiff_are_our_one_line(compression, capfd):
    picture = Image.fromarray(DEEP.view(np.uint8))
    data = bytearray(encode(picture.convert("1" if compression == "group4" else "L"), "TIFF", compression=compression))
    data[1000:1400] = b"\xff" * 400
    refused(bytes(data), "damaged")
    assert capfd.readouterr().err == ""


def test_a_pipe_a_device_and_a_huge_file_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "pipe")
    refused("/dev/zero", "device")
    monkeypatch.setattr(image, "FILE_BYTES", len(PNG) - 1)
    (tmp_path / "huge.png").write_bytes(PNG)
    refused(tmp_path / "huge.png", "larger than")


def test_control_characters_of_a_name_do_not_reach_the_message(tmp_path):
    for name in ("\x1b[31mred.png", "\u202egnp.png", "a\0b.png"):
        with pytest.raises((OSError, ValueError)) as caught:
            load_image(str(tmp_path / name))
        assert str(caught.value).isprintable()


# ------------------------------------------------------------------------------------------- DICOM


def shows(source, expected, tolerance=0.5 + 1e-9):
    """The image is the expected grey levels 0..255 [rows, columns], rounded either way where they are halves."""
    levels = pixels(source)
    assert (levels == levels[..., :1]).all() and levels.shape[:2] == np.shape(expected)
    assert np.abs(levels[..., 0] - np.asarray(expected, float)).max() <= tolerance


def linear_exact(x, c, w):
    """PS3.3, C.11.2.1.3.2, to 0..255"""
    if x <= c - w / 2:
        return 0
    return 255 if x > c + w / 2 else ((x - c) / w + 0.5) * 255


def linear(x, c, w):
    """PS3.3, C.11.2.1.2.1, to 0..255"""
    return linear_exact(x, c - 0.5, w - 1)


def sigmoid(x, c, w):
    """PS3.3, C.11.2.1.3.1, to 0..255"""
    return 255 / (1 + math.exp(-4 * (x - c) / w))


def each(function, values):
    return np.array([[function(x) for x in row] for row in np.asarray(values).tolist()])


def stretched(values):
    low, high = int(values.min()), int(values.max())
    return each(lambda x: (x - low) * 255 / (high - low), values)


def window(center, width, function="LINEAR"):
    return {"WindowCenter": center, "WindowWidth": width, "VOILUTFunction": function}


def rescale(slope, intercept):
    return {"RescaleSlope": slope, "RescaleIntercept": intercept}


def lut(kind, entries, first, bits, order="<"):
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries) % 2**16, first, bits]
    item.add_new("LUTData", "OW", np.asarray(entries, f"{order}u2").tobytes())
    return {f"{kind}LUTSequence": [item]}


SYNTAXES = dict(explicit=uid.ExplicitVRLittleEndian, implicit=uid.ImplicitVRLittleEndian, big=uid.ExplicitVRBigEndian)
DEPTHS = {"u8": (GREY, None), "u12": (U12, 12), "u16": (U16, None)}
DEPTHS |= {"s12": ((U12 - 2048).view(np.int16), 12), "s16": (U16.view(np.int16), None)}


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
@pytest.mark.parametrize(("values", "stored"), DEPTHS.values(), ids=DEPTHS)
def test_every_depth_and_byte_order_with_and_without_a_window(values, stored, syntax):
    make = lambda **elements: dicom(values, syntax, stored=stored, **elements)
    center, width = int(values.mean()), (int(values.max()) - int(values.min())) // 2
    windowed = each(lambda x: linear(x, center, width), values)
    shows(make(), stretched(values))
    shows(make(kind="MONOCHROME1"), 255 - stretched(values))
    shows(make(WindowCenter=center, WindowWidth=width), windowed)
    shows(make(kind="MONOCHROME1", WindowCenter=center, WindowWidth=width), 255 - windowed)


NARROW = lut("VOI", [i // 16 for i in range(4096)], 0, 8)
MODALITY, VOI = lut("Modality", range(0, 8000, 2), 90, 16), lut("VOI", range(1000, 4000), 200, 12)
GREY_RULES = {  # elements, and the grey level of a stored value
    "exact": (window(2000, 900, "LINEAR_EXACT"), lambda x: linear_exact(x, 2000, 900)),
    "sigmoid": (window(2000, 900, "SIGMOID"), lambda x: sigmoid(x, 2000, 900)),
    "named": (window(2000, 900), lambda x: linear(x, 2000, 900)),
    "width 1": (window(2000.5, 1), lambda x: linear(x, 2000.5, 1)),
    "about 0": (window(0, 900), lambda x: linear(x, 0, 900)),
    "fractions": (window("2000.25", "900.5"), lambda x: linear(x, 2000.25, 900.5)),
    "the first of several": (window([1000, 2000], [500, 900]), lambda x: linear(x, 1000, 500)),
    "rescale": (rescale("1.5", "-1024") | window(2000, 900), lambda x: linear(1.5 * x - 1024, 2000, 900)),
    "a falling rescale": (rescale(-1, 4095) | window(2000, 900), lambda x: linear(4095 - x, 2000, 900)),
    "Modality LUT": (MODALITY | window(3000, 900), lambda x: linear(min(max(2 * (x - 90), 0), 7998), 3000, 900)),
    "VOI LUT": (VOI, lambda x: (1000 + min(max(x - 200, 0), 2999)) * 255 / 4095),
    "VOI LUT after rescale": (rescale(2, 0) | VOI, lambda x: (1000 + min(max(2 * x - 200, 0), 2999)) * 255 / 4095),
    "VOI LUT of more than it says": (lut("VOI", range(4096), 0, 10), lambda x: min(x * 255 / 1023, 255)),
    "VOI LUT of 8 bits": (NARROW, lambda x: x // 16),
    "VOI LUT before the window": (NARROW | window(2000, 900), lambda x: x // 16),
}


@pytest.mark.parametrize(("elements", "formula"), GREY_RULES.values(), ids=GREY_RULES)
def test_lookup_tables_rescale_and_windows(elements, formula):
    edges = [[1999, 2000, 2001, 1550, 2450, 750, 1250, 0, 4095]]
    values = np.append(U12, edges, 0).astype(np.uint16)
    shows(dicom(values, stored=12, **elements), each(formula, values))


def test_lookup_tables_of_big_endian_files():
    voi = lut("VOI", range(4096), 0, 12, order=">")
    shows(dicom(U12, uid.ExplicitVRBigEndian, stored=12, **voi), U12 * (255 / 4095))


@pytest.mark.parametrize("elements", [window(100, 0), window(None, None), {"WindowCenter": 100}], ids=str)
def test_without_a_window_of_some_width_the_frame_is_stretched(elements):
    overlaid = U12 | (U16 & 0xF000)  # bits that are not stored do not show
    shows(dicom(overlaid, stored=12, **elements), stretched(U12))
    shows(dicom(np.full((4, 5), 77, np.uint16), **elements), np.zeros((4, 5)))


def test_ybr_becomes_rgb():
    y, b, r = COLOUR[..., 0], COLOUR[..., 1] - 128.0, COLOUR[..., 2] - 128.0  # PS3.3, C.7.6.3.1.2, solved for RGB
    expected = np.dstack((y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b))
    assert np.abs(pixels(dicom(COLOUR, kind="YBR_FULL")) - expected.clip(0, 255)).max() <= 1


def test_jpeg_in_dicom_is_decoded_as_pillow_does():  # but for the last bit: another decoder may be installed
    made = dicom(GREY, uid.JPEGBaseline8Bit, PixelData=encapsulate([GREY_JPEG]), **window(128, 256))
    shows(made, by_pillow(GREY_JPEG)[..., 0], tolerance=1)


SAME = [("MR_small", f"MR_small_{form}") for form in ("RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian")]
SAME += [("MR_small", "MR_small_implicit"), ("SC_rgb_gdcm_KY", "SC_rgb_jpeg_gdcm")]  # the last is lossless JPEG


@pytest.mark.parametrize(("plain", "other"), SAME)
def test_one_image_in_files_of_other_programs_shows_the_same(plain, other):
    plain, other = (get_testdata_file(f"{name}.dcm", download=False) for name in (plain, other))
    assert (pixels(other) == pixels(plain)).all()


def test_the_first_of_several_frames_is_read_with_a_warning(tmp_path):
    file = tmp_path / "frames.dcm"
    file.write_bytes(dicom(GREY, NumberOfFrames=2, PixelData=GREY.tobytes() + bytes(GREY.size)))
    with pytest.warns(UserWarning, match=r"frames.dcm has 2 frames"):
        shows(file, stretched(GREY))


@pytest.mark.parametrize("suffix", [".dcm", ".DICOM"])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_without_preamble_the_suffix_tells(tmp_path, syntax, suffix):
    made = dataset(U16, SYNTAXES[syntax])
    del made.file_meta
    form = dict(implicit_vr=syntax == "implicit", little_endian=syntax != "big", enforce_file_format=False)
    file = tmp_path / f"image{suffix}"
    file.write_bytes(to_bytes(made, **form))
    shows(file, stretched(U16))
    refused(file.read_bytes(), "not an image")


def test_with_preamble_the_content_tells(tmp_path):
    (tmp_path / "image.png").write_bytes(dicom(U16))
    (tmp_path / "image.dcm").write_bytes(PNG)
    shows(tmp_path / "image.png", stretched(U16))
    assert (pixels(tmp_path / "image.dcm") == pixels(PNG)).all()


# ------------------------------------------------------------------------------------------- odd DICOM


def padded(values, padding):
    """The values with a frame of padding around them."""
    return np.pad(values, 2, constant_values=padding)


S16 = (U12 - 2048).view(np.int16)
PADDING = {  # values, and the elements that name their padding
    "a value": (padded(U12, 65535), {"PixelPaddingValue": 65535}),
    "a value below": (padded(U12, 0), {"PixelPaddingValue": 0}),
    "a range": (padded(padded(U12, 65535), 60000), {"PixelPaddingValue": 60000, "PixelPaddingRangeLimit": 65535}),
    "a range downwards": (padded(padded(U12, 5), 9), {"PixelPaddingValue": 9, "PixelPaddingRangeLimit": 0}),
    "a signed value": (padded(S16, -32768), {"PixelPaddingValue": -32768}),
}


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
@pytest.mark.parametrize(("values", "elements"), PADDING.values(), ids=PADDING)
def test_padding_is_no_part_of_the_range_without_a_window(values, elements, syntax):
    picture = values[2:-2, 2:-2] if "Limit" not in str(elements) else values[4:-4, 4:-4]
    low, high = int(picture.min()), int(picture.max())
    expected = ((values.astype(float) - low) * 255 / (high - low)).clip(0, 255)
    shows(dicom(values, syntax, **elements), expected)


OTHER_SIGN = {"63536 for -2000": (S16, -2000, "US", 63536), "-1 for 65535": (U12, 65535, "SS", -1)}


@pytest.mark.parametrize(("picture", "padding", "kind", "written"), OTHER_SIGN.values(), ids=OTHER_SIGN)
def test_padding_may_be_written_with_the_other_sign(picture, padding, kind, written):
    picture = np.maximum(picture, picture.dtype.type(-1990 if kind == "US" else 0))
    made = dataset(padded(picture, padding))
    made.add_new("PixelPaddingValue", kind, written)
    low, high = int(picture.min()), int(picture.max())
    shows(to_bytes(made), ((padded(picture, padding).astype(float) - low) * 255 / (high - low)).clip(0, 255))


def test_a_frame_of_nothing_but_padding_is_shown_as_it_is():
    shows(dicom(U12, PixelPaddingValue=0, PixelPaddingRangeLimit=65535), stretched(U12))


def test_padding_does_not_change_a_window():
    values = padded(U12, 65535)
    shows(dicom(values, PixelPaddingValue=65535, **window(2000, 900)), each(lambda x: linear(x, 2000, 900), values))


@pytest.mark.parametrize("first", [("", ""), (1000, ""), ("", 500), (1000, 0)])
def test_the_first_window_that_is_whole_counts(first):
    center, width = first
    shows(dicom(U12, WindowCenter=[center, 2000], WindowWidth=[width, 900]), each(lambda x: linear(x, 2000, 900), U12))


def test_a_window_that_is_nowhere_whole_is_none():
    shows(dicom(U12, WindowCenter=["", 2000], WindowWidth=[900, ""]), stretched(U12))


def test_the_deflate_syntax_counts_only_where_the_file_names_its_syntax():
    text = f"converted from {uid.DeflatedExplicitVRLittleEndian}"
    shows(dicom(U12, ImageComments=text), stretched(U12))


@pytest.mark.parametrize("syntax", [*SYNTAXES.values(), uid.RLELossless], ids=[*SYNTAXES, "rle"])
@pytest.mark.parametrize("values", [U12, S16], ids=["unsigned", "signed"])
def test_values_end_at_the_high_bit(values, syntax):
    in_upper_bits = values << 4 | 7  # PS3.5, 8.1.1; the lower bits may hold anything
    plain = uid.ExplicitVRLittleEndian if syntax == uid.RLELossless else syntax
    made = dataset(in_upper_bits, plain, stored=16, **window(int(values.mean()), 900))
    if syntax == uid.RLELossless:
        made.compress(uid.RLELossless)
    made.BitsStored, made.HighBit = 12, 15
    shows(to_bytes(made), each(lambda x: linear(x, int(values.mean()), 900), values))


@pytest.mark.parametrize("high", [3, 16])
def test_a_high_bit_outside_of_the_cell_is_refused(high):
    refused(dicom(U12, stored=12, HighBit=high), f"high bit {high}")


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
@pytest.mark.parametrize("bits", [8, 16])
def test_palettes_in_every_byte_order(syntax, bits):
    order = ">u2" if syntax == uid.ExplicitVRBigEndian else "<u2"
    elements = {}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        words = COLOURS[:, channel].astype("u2") * 257
        if bits == 8:
            # two entries in a word, the first in its lower half (PS3.3, C.7.6.3.1.6)
            words = COLOURS[::2, channel] + 256 * COLOURS[1::2, channel].astype("u2")
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 3, bits]
        elements[f"{name}PaletteColorLookupTableData"] = words.astype(order).tobytes()
    shown = pixels(dicom(U16 % 300, syntax, kind="PALETTE COLOR", **elements))
    assert (shown == COLOURS[(U16 % 300).astype(int).clip(3, 258) - 3]).all()


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
def test_a_lookup_table_of_more_entries_than_a_signed_number_holds(syntax):
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    values = RANDOM.integers(-30000, 30000, (6, 9)).astype(np.int16)
    table = np.arange(40000) + 20000
    made = dataset(values, syntax)
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "SS", [40000, -25000, 16])
    item.add_new("LUTData", "OW", table.astype(f"{order}u2").tobytes())
    made.VOILUTSequence = [item]
    shows(to_bytes(made), (values.astype(float) + 25000).clip(0, 39999) * 255 / 65535 + 20000 * 255 / 65535)


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept", "WindowCenter"])
@pytest.mark.parametrize("number", [b"nan ", b"inf "])
def test_a_rescale_or_window_that_is_no_number_is_refused(name, number):
    # long, because the file also has identifiers of random digits
    written = "1234567890.12345"
    data = dicom(U12, **window(2000, 900) | rescale(1, 0) | {name: written})
    # pydicom does not write such a number
    assert data.count(written.encode()) == 1
    refused(data.replace(written.encode(), number.ljust(len(written))), "no number")


def test_a_lookup_table_that_is_cut_is_refused():
    made = lut("VOI", range(100), 0, 8)
    made["VOILUTSequence"][0].LUTDescriptor = [4096, 0, 8]
    refused(dicom(U12, **made), "shorter than its 4096 entries")


def larger(data: bytes, marker: bytes, offset: int, form: str) -> bytes:
    """A compressed image whose header is changed to say 60,000 × 60,000."""
    start = data.find(marker) + offset
    size = struct.pack(form, 60000, 60000)
    return data[:start] + size + data[start + len(size) :]


HUGE = {
    "JPEG": (uid.JPEGBaseline8Bit, larger(GREY_JPEG, b"\xff\xc0", 5, ">HH")),
    "JPEG 2000": (uid.JPEG2000Lossless, larger(encode(GREY, "JPEG2000", no_jp2=True), b"\xff\x51", 6, ">II")),
    "JP2": (uid.JPEG2000Lossless, larger(encode(GREY, "JPEG2000"), b"\xff\x4f\xff\x51", 8, ">II")),
}


@pytest.mark.parametrize(("syntax", "frame"), HUGE.values(), ids=HUGE)
def test_a_compressed_frame_that_is_larger_than_the_data_set_says_is_refused(syntax, frame):
    refused(dicom(GREY, syntax, PixelData=encapsulate([frame])), "larger than 9 × 6")


def test_a_picture_takes_little_memory_beside_its_values():
    """Real numbers for every pixel would take 8 bytes each, several times."""
    values = np.tile(U12, (400, 400))
    made = dataset(values, **rescale(2, -5), **window(2000, 900))
    tracemalloc.start()
    shown = dicom_module._show(made, values, "standard")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert shown.shape == values.shape and peak < shown.nbytes + 64 * dicom_module.STRIP


# ------------------------------------------------------------------------------------------- as MIMIC-CXR-JPG


def test_equalising_gives_each_level_its_share_of_darker_pixels():
    """The oracle is OpenCV's definition of equalizeHist, pixel by pixel."""
    picture = np.minimum(RANDOM.integers(20, 200, (30, 40)), RANDOM.integers(20, 250, (30, 40)))
    darkest = (picture == picture.min()).sum()
    expected = [round(255 * ((picture <= level).sum() - darkest) / (picture.size - darkest)) for level in picture.flat]
    levels = dicom_module.equalise(np.bincount(picture.ravel(), minlength=256))
    assert (levels[picture].ravel() == expected).all()
    # by hand: of 4 pixels, 1 is darkest and 2 are at most 7; 255 · (2 - 1) / (4 - 1) = 85
    small = np.bincount([3, 7, 9, 9], minlength=256)
    assert dicom_module.equalise(small)[[3, 7, 9]].tolist() == [0, 85, 255]
    assert dicom_module.equalise(np.bincount([3, 3], minlength=256))[3] == 3


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_the_jpg_display_scales_inverts_and_equalises_the_stored_values(kind):
    """The oracle follows the MIMIC-CXR-JPG paper step by step (arXiv 1901.07042)."""
    values = U12.astype(float)
    scaled_values = np.floor((values - values.min()) / (values - values.min()).max() * 255)
    upright = 255 - scaled_values if kind == "MONOCHROME1" else scaled_values
    darkest = (upright == upright.min()).sum()
    share = lambda level: ((upright <= level).sum() - darkest) / (upright.size - darkest)
    expected = each(lambda level: round(255 * share(level)), upright)
    # neither a window nor a rescale counts
    data = dicom(U12, kind=kind, stored=12, **window(2000, 900), **rescale(-2, 7))
    assert (np.asarray(load_image(data, dicom_display="jpg")) == grey(expected)).all()


def test_the_jpg_display_leaves_colours_and_other_files_alone():
    for data in (dicom(COLOUR, kind="RGB"), PNG):
        assert (np.asarray(load_image(data, "jpg")) == pixels(data)).all()
    with pytest.raises(ValueError, match="dicom_display 'jpeg' is none of standard, jpg"):
        load_image(PNG, "jpeg")


def test_the_command_line_shows_dicom_as_the_model_learnt_it(tmp_path, capsys):
    stock = GOLDEN / "libra-7b" / "model"
    shutil.copytree(stock, tmp_path / "model")
    settings = json.loads((stock / "config.json").read_text())
    settings["mm_vision_tower"] = str(GOLDEN / "libra-7b" / "encoder-dinov2")
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings | {"mm_dicom_display": "jpg"}))
    values = np.tile(U12, (9, 8))
    (tmp_path / "chest.dcm").write_bytes(dicom(values, stored=12, **window(300, 200)))
    load_image(tmp_path / "chest.dcm", "jpg").save(tmp_path / "jpg.png")
    load_image(tmp_path / "chest.dcm").save(tmp_path / "standard.png")

    def report(model, image, *more):
        flags = ["--device", "cpu", "--max-new-tokens", "8", "--images", str(tmp_path / image)]
        assert sample.main(sample.parse(["--model", str(model), *flags, *more])) == 0
        return capsys.readouterr().out

    jpg, standard = report(stock, "jpg.png"), report(stock, "standard.png")
    assert jpg != standard
    # the model decides, and the flag before it
    assert report(stock, "chest.dcm") == standard
    assert report(tmp_path / "model", "chest.dcm") == jpg
    assert report(stock, "chest.dcm", "--dicom-display", "jpg") == jpg
    assert report(tmp_path / "model", "chest.dcm", "--dicom-display", "standard") == standard


# ------------------------------------------------------------------------------------------- mistakes


def png_of_size(side):
    """A PNG whose header says that it has side × side pixels."""
    header = b"IHDR" + struct.pack(">II", side, side) + PNG[24:29]
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


NOISE = DEEP & 0xFFF
RLE = dataset(NOISE, stored=12)
RLE.compress(uid.RLELossless)
MISTAKES = {  # what a file holds, and what its refusal says
    "empty": (b"", "empty"),
    "text": (b"FINDINGS: The heart is normal.\n", "not an image"),
    "a program, as EPS is": (encode(GREY, "EPS"), "not an image"),
    "too large": (png_of_size(10000), "pixels"),  # Pillow only warns of it
    "far too large": (png_of_size(20000), "pixels"),
    "real numbers": (encode(DEEP / np.float32(65536), "TIFF"), "8 or 16 bits"),
    "below 16 bits": (encode(DEEP.astype(np.int32) - 1, "TIFF"), "8 or 16 bits"),
    "above 16 bits": (encode(DEEP.astype(np.int32) + 1, "TIFF"), "8 or 16 bits"),
    "DICOM without pixels": (dicom(GREY, PixelData=b""), "no pixel data"),
    "DICOM of an unknown kind": (dicom(GREY, kind="HSV"), "HSV"),
    "DICOM that is too large": (dicom(GREY, Rows=20000, Columns=20000), "pixels"),
    "a DICOM video": (dicom(GREY, uid.MPEG2MPML, PixelData=encapsulate([GREY.tobytes()])), "MPEG2"),
    "a damaged DICOM frame": (dicom(GREY, uid.RLELossless, PixelData=encapsulate([bytes(64)])), "RLE"),
    "deflated DICOM": (dicom(np.zeros((3000, 3000), np.uint16), uid.DeflatedExplicitVRLittleEndian), "deflated"),
}
for kind in ("JPEG", "PNG", "TIFF"):
    MISTAKES[f"a cut {kind}"] = (encode(DEEP.view(np.uint8), kind)[:30000], "truncated")
for share in (0.005, 0.1, 0.6, 0.99):
    MISTAKES[f"DICOM cut at {share}"] = (dicom(NOISE)[: int(share * NOISE.nbytes)], "fetch it again")
    MISTAKES[f"compressed DICOM cut at {share}"] = (to_bytes(RLE)[: int(share * NOISE.nbytes)], "fetch it again")


@pytest.mark.parametrize(("data", "reason"), MISTAKES.values(), ids=MISTAKES)
def test_a_file_without_an_image_is_refused_by_its_name(tmp_path, data, reason):
    file = tmp_path / "image.png"
    file.write_bytes(data)
    refused(file, str(file))
    refused(data, reason)


def test_a_missing_file_a_directory_and_a_damaged_pil_image_are_refused(tmp_path):
    refused(tmp_path / "none.png", str(tmp_path / "none.png"))
    refused(str(tmp_path), str(tmp_path))
    refused(Image.open(io.BytesIO(encode(DEEP)[:5000])), "truncated")


def test_a_missing_package_is_named(monkeypatch):
    code = "import sys; sys.modules['pylibjpeg'] = None; from plumbing.image import load_image; load_image(sys.argv[1])"
    file = get_testdata_file("MR_small_jpeg_ls_lossless.dcm", download=False)
    run = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True, text=True)
    assert "pylibjpeg-libjpeg" in run.stderr.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "pydicom", None)
    refused(dicom(GREY), "pip install pydicom")


# ------------------------------------------------------------------------------------------- addresses

ANSWERS = {  # path -> status, body, headers beside Content-Length
    "/image.png": (200, PNG, {}),
    "/my%20image.png": (200, PNG, {}),
    "/length/unsaid": (200, PNG, {"Content-Length": None}),
    "/chest": (200, dicom(U12, stored=12), {}),
    "/page": (200, b"<!doctype html><title>x</title>", {}),
    "/empty": (200, b"", {}),
    "/missing": (404, b"<html>", {}),
    "/cut": (200, PNG[:2000], {"Content-Length": len(PNG)}),
    "/nowhere": (302, b"", {}),
    "/loop": (302, b"", {"Location": "/loop"}),
    "/to/file": (302, b"", {"Location": "file:///etc/passwd"}),
    "/to/ftp": (302, b"", {"Location": "ftp://127.0.0.1/image.png"}),
    "/redirect/1": (302, b"", {"Location": "../image.png?x"}),
    **{f"/redirect/{n}": (302, b"", {"Location": f"/redirect/{n - 1}"}) for n in range(2, 7)},
    "/slow": (200, b"", {"Content-Length": 10**6}),
    "/slow/redirect": (302, b"", {"Location": "/image.png", "Content-Length": None}),
    "/endless": (200, PNG, {"Content-Length": None}),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.seen.append(path)
        status, body, headers = ANSWERS[path]
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)
        with suppress(OSError):  # until the client leaves
            while path.startswith("/slow"):
                self.wfile.write(b"x")
                time.sleep(0.1)
            while path == "/endless":
                self.wfile.write(bytes(2**16))

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        server.seen, server.url = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    "path", ["/image.png", "/my image.png", "/length/unsaid", "/redirect/1", "/redirect/5", "/slow/redirect"]
)
def test_an_address_gives_what_its_file_gives(server, path):
    assert (pixels(server.url + path) == pixels(PNG)).all()
    assert (pixels(server.url.replace("http", "HTTP") + path) == pixels(PNG)).all()


@pytest.mark.parametrize(
    "path", ["/page", "/empty", "/missing", "/cut", "/nowhere", "/loop", "/to/file", "/to/ftp", "/redirect/6"]
)
def test_an_address_without_an_image_is_refused_by_its_name(server, path):
    refused(server.url + path, server.url + path)


@pytest.mark.parametrize("start", ["http://127.0.0.1:1", "http://127.0.0.1:x", "http://", "file://", "FTP://", "s3://"])
def test_an_address_where_nothing_answers_and_other_schemes_are_refused(start, server):
    refused(f"{start}{GOLDEN}/images/0.png", start)


def test_a_download_ends_at_its_limits_of_size_and_time(server, monkeypatch):
    monkeypatch.setattr(download, "URL_BYTES", 2**20)
    refused(server.url + "/endless", "1 MB")
    monkeypatch.setattr(download, "URL_SECONDS", 0.5)  # a byte comes every 0.1 s, so that no single wait is long
    refused(server.url + "/slow", "0.5 s")


def test_the_command_line_takes_addresses_and_dicom(server, tmp_path, capsys):
    model = ["--model", str(GOLDEN / "libra-7b" / "model"), "--device", "cpu", "--max-new-tokens", "5", "--images"]
    run = lambda *images: sample.main(sample.parse([*model, *images]))
    (tmp_path / "chest.dcm").write_bytes(ANSWERS["/chest"][1])
    server.seen.clear()
    assert run(f"{server.url}/image.png", f"{server.url}/chest") == 0
    assert server.seen == ["/image.png", "/chest"]  # each is fetched once
    report = capsys.readouterr().out
    assert run(str(GOLDEN / "images" / "0.png"), str(tmp_path / "chest.dcm")) == 0
    assert report.strip() and capsys.readouterr().out == report
    assert run(f"{server.url}/page") == 2
    assert capsys.readouterr().err.count("\n") == 1
