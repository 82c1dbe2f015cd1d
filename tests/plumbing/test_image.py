"""The oracles: Pillow, numpy, the formulas of the DICOM standard pixel by pixel, files of other programs, a server."""

import io
import math
import struct
import subprocess
import sys
import threading
import time
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
from plumbing import image
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
    monkeypatch.setattr(image, "URL_BYTES", 2**20)
    refused(server.url + "/endless", "1 MB")
    monkeypatch.setattr(image, "URL_SECONDS", 0.5)  # a byte comes every 0.1 s, so that no single wait is long
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
