"""DICOM against the standard's formulas, applied here pixel by pixel, and http addresses against a server."""

import io
import math
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pydicom
import pytest
from conftest import GOLDEN, ROOT
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)
from test_data import pixels, refused

import sample
from plumbing import image

RANDOM = np.random.default_rng(0)
U8 = RANDOM.integers(10, 240, (6, 9), dtype=np.uint8)
U12 = RANDOM.integers(100, 4096, (6, 9), dtype=np.uint16)
U16 = RANDOM.integers(0, 65536, (6, 9), dtype=np.uint16)
S12 = RANDOM.integers(-2048, 2048, (6, 9), dtype=np.int16)
S16 = RANDOM.integers(-32768, 32768, (6, 9), dtype=np.int16)
COLOUR = RANDOM.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def dataset(values, syntax=ExplicitVRLittleEndian, kind="MONOCHROME2", stored=None, **elements):
    """A DICOM data set of values [rows, columns] or [rows, columns, 3]; elements go over what is made here."""
    little = syntax != ExplicitVRBigEndian
    made = pydicom.Dataset()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    made.Rows, made.Columns = values.shape[:2]
    made.SamplesPerPixel = 3 if values.ndim == 3 else 1
    if values.ndim == 3:
        made.PlanarConfiguration = 0
    made.PhotometricInterpretation = kind
    made.BitsAllocated = 8 * values.itemsize
    made.BitsStored = stored or made.BitsAllocated
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, int(values.dtype.kind == "i")
    made.PixelData = values.astype(values.dtype.newbyteorder("<" if little else ">")).tobytes()
    made["PixelData"].VR = "OB" if values.itemsize == 1 else "OW"
    for name, value in elements.items():
        setattr(made, name, value)
    return made


def lut(entries, first, bits, little=True):
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries) % 2**16, first, bits]
    item.add_new("LUTData", "OW", np.asarray(entries, "<u2" if little else ">u2").tobytes())
    return [item]


def written(made, **options) -> bytes:
    file = io.BytesIO()
    made.save_as(file, enforce_file_format=True, **options)
    return file.getvalue()


def shows(source, expected, tolerance=0.5 + 1e-9):
    """The image is the expected grey levels 0..255 [rows, columns], rounded either way where they are halves."""
    got = pixels(source)
    assert (got == got[..., :1]).all() and got.shape[:2] == np.shape(expected)
    assert np.abs(got[..., 0] - np.asarray(expected, float)).max() <= tolerance


# ------------------------------------------------------------------------------------------- DICOM, grey


def linear(x, c, w):
    """PS3.3, C.11.2.1.2.1, to 0..255"""
    if x <= c - 0.5 - (w - 1) / 2:
        return 0
    return 255 if x > c - 0.5 + (w - 1) / 2 else ((x - (c - 0.5)) / (w - 1) + 0.5) * 255


def linear_exact(x, c, w):
    """PS3.3, C.11.2.1.3.2, to 0..255"""
    return 0 if x <= c - w / 2 else 255 if x > c + w / 2 else ((x - c) / w + 0.5) * 255


def sigmoid(x, c, w):
    """PS3.3, C.11.2.1.3.1, to 0..255"""
    return 255 / (1 + math.exp(-4 * (x - c) / w))


def each(function, values, *arguments):
    return [[function(x, *arguments) for x in row] for row in np.asarray(values).tolist()]


def stretched(values):
    low, high = int(values.min()), int(values.max())
    return each(lambda x: (x - low) * 255 / (high - low), values)


def window(center, width, function=None):
    return {"WindowCenter": center, "WindowWidth": width} | ({"VOILUTFunction": function} if function else {})


SYNTAXES = {"explicit": ExplicitVRLittleEndian, "implicit": ImplicitVRLittleEndian, "big": ExplicitVRBigEndian}
DEPTHS = {"u8": (U8, None), "u12": (U12, 12), "u16": (U16, None), "s12": (S12, 12), "s16": (S16, None)}


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
@pytest.mark.parametrize(("values", "stored"), DEPTHS.values(), ids=DEPTHS)
def test_every_depth_and_byte_order_with_and_without_a_window(values, stored, syntax):
    center, width = int(values.mean()), (int(values.max()) - int(values.min())) // 2
    make = lambda **elements: written(dataset(values, syntax, stored=stored, **elements))
    shows(make(), stretched(values))
    shows(make(kind="MONOCHROME1"), 255 - np.array(stretched(values)))
    shows(make(**window(center, width)), each(linear, values, center, width))
    shows(make(kind="MONOCHROME1", **window(center, width)), 255 - np.array(each(linear, values, center, width)))


WINDOWS = {
    "exact": (window(2000, 900, "LINEAR_EXACT"), lambda x: linear_exact(x, 2000, 900)),
    "sigmoid": (window(2000, 900, "SIGMOID"), lambda x: sigmoid(x, 2000, 900)),
    "named": (window(2000, 900, "LINEAR"), lambda x: linear(x, 2000, 900)),
    "width 1": (window(2000.5, 1), lambda x: linear(x, 2000.5, 1)),
    "about 0": (window(0, 900), lambda x: linear(x, 0, 900)),
    "fractions": (window("2000.25", "900.5"), lambda x: linear(x, 2000.25, 900.5)),
    "the first of several": (window([1000, 2000], [500, 900]), lambda x: linear(x, 1000, 500)),
    "rescale": (
        {"RescaleSlope": "1.5", "RescaleIntercept": "-1024", **window(2000, 900)},
        lambda x: linear(1.5 * x - 1024, 2000, 900),
    ),
    "a falling rescale": (
        {"RescaleSlope": -1, "RescaleIntercept": 4095, **window(2000, 900)},
        lambda x: linear(4095 - x, 2000, 900),
    ),
    "Modality LUT": (
        {"ModalityLUTSequence": lut(range(0, 8000, 2), 90, 16), **window(3000, 900)},
        lambda x: linear(min(max(2 * (x - 90), 0), 7998), 3000, 900),
    ),
    "VOI LUT": (
        {"VOILUTSequence": lut(range(1000, 4000), 200, 12)},
        lambda x: (1000 + min(max(x - 200, 0), 2999)) * 255 / 4095,
    ),
    "VOI LUT of more than it says": ({"VOILUTSequence": lut(range(4096), 0, 10)}, lambda x: min(x * 255 / 1023, 255)),
    "VOI LUT of 8 bits": ({"VOILUTSequence": lut([i // 16 for i in range(4096)], 0, 8)}, lambda x: x // 16),
    "VOI LUT before the window": (
        {"VOILUTSequence": lut([i // 16 for i in range(4096)], 0, 8), **window(2000, 900)},
        lambda x: x // 16,
    ),
    "rescale and VOI LUT": (
        {"RescaleSlope": 2, "RescaleIntercept": -100, "VOILUTSequence": lut(range(8192), 0, 13)},
        lambda x: min(max(2 * x - 100, 0), 8191) * 255 / 8191,
    ),
}


@pytest.mark.parametrize(("elements", "formula"), WINDOWS.values(), ids=WINDOWS)
def test_lookup_tables_rescale_and_windows(elements, formula):
    values = np.append(U12, [[1999, 2000, 2001, 1550, 2450, 750, 1250, 0, 4095]], 0).astype(np.uint16)
    shows(written(dataset(values, stored=12, **elements)), each(formula, values))


def test_lookup_tables_of_big_endian_files():
    voi = lut(range(4096), 0, 12, little=False)
    shows(written(dataset(U12, ExplicitVRBigEndian, stored=12, VOILUTSequence=voi)), U12 * (255 / 4095))


@pytest.mark.parametrize("elements", [window(100, 0), window(None, None), {"WindowCenter": 100}])
def test_a_window_without_a_width_is_none(elements):
    shows(written(dataset(U12, stored=12, **elements)), stretched(U12))


def test_bits_that_are_not_stored_do_not_show():
    overlaid = U12 | (U16 & 0xF000)
    shows(written(dataset(overlaid, stored=12)), stretched(U12))


def test_an_even_image_is_black():
    shows(written(dataset(np.full((4, 5), 77, np.uint16))), np.zeros((4, 5)))


def test_of_several_frames_the_first_is_read_and_a_warning_says_so(tmp_path):
    file = tmp_path / "frames.dcm"
    file.write_bytes(written(dataset(U8, NumberOfFrames=2, PixelData=U8.tobytes() + COLOUR.tobytes()[: U8.size])))
    with pytest.warns(UserWarning, match=r"frames.dcm has 2 frames: the first is read"):
        shows(file, stretched(U8))


# ----------------------------------------------------------------------------------------- DICOM, colour


def test_colour():
    assert (pixels(written(dataset(COLOUR, kind="RGB"))) == COLOUR).all()
    planes = COLOUR.transpose(2, 0, 1).tobytes()
    assert (pixels(written(dataset(COLOUR, kind="RGB", PlanarConfiguration=1, PixelData=planes))) == COLOUR).all()
    deep = COLOUR.astype(np.uint16) * 257
    assert (pixels(written(dataset(deep, kind="RGB"))) == COLOUR).all()
    y, b, r = COLOUR[..., 0], COLOUR[..., 1] - 128.0, COLOUR[..., 2] - 128.0  # PS3.3, C.7.6.3.1.2, solved for RGB
    expected = np.dstack((y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b))
    assert np.abs(pixels(written(dataset(COLOUR, kind="YBR_FULL"))) - expected.clip(0, 255)).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_gives_its_colours(bits):
    table = RANDOM.integers(0, 256, (256, 3), dtype=np.uint8)
    elements = {}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        entries = table[:, channel] if bits == 8 else table[:, channel].astype("<u2") * 257
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        elements[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    assert (pixels(written(dataset(U8, kind="PALETTE COLOR", **elements))) == table[U8]).all()


# ------------------------------------------------------------------------------------- DICOM, compressed


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless], ids=["RLE", "JPEG 2000"])
@pytest.mark.parametrize(("values", "stored"), [(U8, None), (U12, 12), (S12, 12)], ids=["u8", "u12", "s12"])
def test_lossless_compression_changes_nothing(values, stored, syntax):
    values = np.tile(values, (12, 8))  # JPEG 2000 wants 64 pixels at least
    made = dataset(values, stored=stored, kind="MONOCHROME1")
    made.compress(syntax, generate_instance_uid=False)
    shows(written(made), 255 - np.array(stretched(values)))


def test_jpeg_is_decoded_as_pillow_does():  # but for the last bit: another decoder may be installed
    file = io.BytesIO()
    Image.fromarray(U8).save(file, "JPEG", quality=90)
    made = dataset(U8, JPEGBaseline8Bit, PixelData=encapsulate([file.getvalue()]), **window(128, 256))
    made["PixelData"].is_undefined_length = True
    shows(written(made), np.asarray(Image.open(file)), tolerance=1)


@pytest.mark.parametrize("other", ["RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian", "implicit"])
def test_other_programs_files_of_one_image_are_equal(other):
    plain, compressed = (get_testdata_file(f"MR_small{name}.dcm", download=False) for name in ("", f"_{other}"))
    assert (pixels(compressed) == pixels(plain)).all()


def test_lossless_jpeg_of_another_program():
    plain, compressed = (get_testdata_file(f"SC_rgb_{name}.dcm", download=False) for name in ("gdcm_KY", "jpeg_gdcm"))
    assert pydicom.dcmread(compressed).file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.70"
    assert (pixels(compressed) == pixels(plain)).all()


# ---------------------------------------------------------------------------------- DICOM, files as they are


def bare(made, implicit, little) -> bytes:
    """The data set alone, as files of before 1993 and some archives have it: no preamble, no magic, no syntax."""
    file = io.BytesIO()
    del made.file_meta
    made.save_as(file, implicit_vr=implicit, little_endian=little, enforce_file_format=False)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".dcm", ".DICOM"])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_without_preamble_the_suffix_tells(tmp_path, syntax, suffix):
    content = bare(dataset(U16, SYNTAXES[syntax]), syntax == "implicit", syntax != "big")
    assert content[128:132] != b"DICM"
    file = tmp_path / f"image{suffix}"
    file.write_bytes(content)
    shows(file, stretched(U16))
    refused(content, "not an image")


def test_with_preamble_the_content_tells(tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(written(dataset(U16)))
    for source in (file, str(file), file.read_bytes()):
        shows(source, stretched(U16))
    (tmp_path / "image.dcm").write_bytes((GOLDEN / "images" / "0.png").read_bytes())
    assert (pixels(tmp_path / "image.dcm") == pixels(GOLDEN / "images" / "0.png")).all()


def test_no_pixel_data_text_and_unknown_kinds_are_refused(tmp_path):
    file = tmp_path / "report.dcm"
    made = dataset(U8)
    del made.PixelData
    file.write_bytes(written(made))
    refused(file, str(file), "no pixel data")
    file.write_bytes(written(dataset(U8, PixelData=b"")))
    refused(file, "no pixel data")
    file.write_text("FINDINGS: The heart is normal.\n")
    refused(file, str(file), "not an image")
    refused(written(dataset(U8, kind="HSV")), "HSV")
    refused(written(dataset(U8, Rows=20000, Columns=20000)), "89 million pixels")
    video = dataset(U8, MPEG2MPML, PixelData=encapsulate([U8.tobytes()]))
    video["PixelData"].is_undefined_length = True
    refused(written(video), "MPEG2")


def test_a_damaged_frame_is_refused():
    made = dataset(U8, RLELossless, PixelData=encapsulate([bytes(64)]))
    made["PixelData"].is_undefined_length = True
    refused(written(made), "RLE", "fetch it again")


def test_a_deflated_file_is_refused_before_it_is_inflated():
    refused(written(dataset(np.zeros((3000, 3000), np.uint16), DeflatedExplicitVRLittleEndian)), "deflated", "save it")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6, 0.9, 0.99])
def test_a_cut_file_is_refused(tmp_path, share, compressed):
    made = dataset(RANDOM.integers(0, 4096, (100, 100), dtype=np.uint16), stored=12)
    if compressed:
        made.compress(RLELossless)
    content = written(made)
    file = tmp_path / "cut.dcm"
    file.write_bytes(content[: int(share * len(content))])
    refused(file, str(file), "fetch it again")


def test_a_missing_package_is_named(monkeypatch):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['pylibjpeg'] = None\n" + (
        "from plumbing.image import load_image\ntry: load_image(sys.argv[1])\nexcept ValueError as error: print(error)"
    )
    for name, package in (("jpeg_ls_lossless", "pylibjpeg-libjpeg"), ("RLE", "")):
        file = get_testdata_file(f"MR_small_{name}.dcm", download=False)
        run = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
        assert run.stdout.strip().endswith(f"pip install pylibjpeg {package}" if package else "") and not run.stderr
        assert bool(run.stdout.strip()) == bool(package)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    refused(written(dataset(U8)), "pip install pydicom")


# -------------------------------------------------------------------------------------------- addresses

PNG = (GOLDEN / "images" / "0.png").read_bytes()


class Handler(BaseHTTPRequestHandler):
    """What a path says: /redirect/N… goes on N times, the others are answered as ANSWERS has it."""

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.seen.append(path)
        if path.startswith("/redirect/"):
            left = int(path.split("/")[2])
            return self.answer(302, b"", Location=f"/redirect/{left - 1}" if left > 1 else "../image.png?x")
        ANSWERS[path](self)

    def answer(self, status, body, length=None, **headers):
        self.send_response(status)
        if length != "unsaid":
            self.send_header("Content-Length", str(length or len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def go_on(self, part, seconds):
        """Write part after part until the client or the test leaves."""
        try:
            while not self.server.leaving.wait(seconds):
                self.wfile.write(part)
        except OSError:
            pass

    def slow(self, begin):
        self.wfile.write(begin)
        self.go_on(b"x", 0.1)

    def log_message(self, *_):
        pass


ANSWERS = {
    "/image.png": lambda to: to.answer(200, PNG, "unsaid" if "unsaid" in to.path else None),
    "/my%20image.png": lambda to: to.answer(200, PNG),
    "/chest": lambda to: to.answer(200, written(dataset(U12, stored=12))),
    "/bare.dcm": lambda to: to.answer(200, bare(dataset(U12, stored=12), True, True)),
    "/page": lambda to: to.answer(200, b"\n<!doctype html><title>x</title>", **{"Content-Type": "text/html"}),
    "/text": lambda to: to.answer(200, b"no image"),
    "/empty": lambda to: to.answer(200, b""),
    "/missing": lambda to: to.answer(404, b"<html>"),
    "/loop": lambda to: to.answer(301, b"", Location="/loop"),
    "/nowhere": lambda to: to.answer(302, b""),
    "/to/file": lambda to: to.answer(302, b"", Location="file:///etc/passwd"),
    "/to/ftp": lambda to: to.answer(302, b"", Location="ftp://127.0.0.1/image.png"),
    "/to/data": lambda to: to.answer(302, b"", Location="data:image/png;base64,AAAA"),
    "/cut": lambda to: to.answer(200, PNG[:2000], len(PNG)),
    "/huge": lambda to: to.answer(200, PNG, 64 * 2**20 + 1),
    "/endless": lambda to: (to.answer(200, PNG, "unsaid"), to.go_on(bytes(2**16), 0)),
    "/slow/body": lambda to: to.slow(b"HTTP/1.0 200 OK\r\nContent-Length: 1000000\r\n\r\n"),
    "/slow/head": lambda to: to.slow(b"HTTP/1.0 200 OK\r\nX-Long: "),
    "/slow/redirect": lambda to: to.slow(b"HTTP/1.0 302 Found\r\nLocation: /image.png\r\n\r\n"),
    "/garbage": lambda to: to.wfile.write(b"\x00\x01 no HTTP at all\r\n\r\n"),
}


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        server.seen, server.leaving = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.leaving.set()
        server.shutdown()


@pytest.mark.parametrize(
    "path", ["/image.png", "/image.png?unsaid", "/my image.png", "/redirect/1", "/redirect/5", "/slow/redirect"]
)
def test_an_address_gives_what_its_file_gives(server, path):
    assert (pixels(server.url + path) == pixels(PNG)).all()
    assert (pixels(server.url.replace("http", "HTTP") + path) == pixels(PNG)).all()


@pytest.mark.parametrize("path", ["/chest", "/bare.dcm?key=1"])
def test_a_dicom_file_at_an_address(server, path):
    shows(server.url + path, stretched(U12))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/page", "a page, not an image"),
        ("/text", "is not an image that can be read"),
        ("/empty", "0 bytes"),
        ("/missing", "404 Not Found"),
        ("/loop", "more than 5 redirects"),
        ("/redirect/6", "more than 5 redirects"),
        ("/nowhere", "302 Found"),
        ("/to/file", "file:///etc/passwd is not http(s)"),
        ("/to/ftp", "ftp://127.0.0.1/image.png is not http(s)"),
        ("/to/data", "is not http(s)"),
        ("/cut", f"2000 bytes of {len(PNG)}"),
        ("/huge", "more than 64 MB"),
        ("/garbage", ""),
    ],
)
def test_an_address_without_an_image_is_refused(server, path, words):
    refused(server.url + path, server.url + path, words)


def test_a_body_without_end_is_cut_off_at_the_limit(server, monkeypatch):
    monkeypatch.setattr(image, "URL_BYTES", 2**20)
    refused(server.url + "/endless", "more than 1 MB")


@pytest.mark.parametrize("path", ["/slow/body", "/slow/head"])
def test_the_time_limit_is_for_the_whole(server, monkeypatch, path):
    monkeypatch.setattr(image, "URL_SECONDS", 0.5)  # a byte comes every 0.1 s, so that no single read is late
    begin = time.monotonic()
    refused(server.url + path, server.url + path, "not within 0.5 s")
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("scheme", ["file", "ftp", "FILE", "s3", "gopher"])
def test_other_schemes_are_refused_by_name(scheme):
    refused(f"{scheme}://{GOLDEN}/images/0.png", f"{scheme}://", "is not http(s)")


def test_an_address_where_nothing_listens_is_refused(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_port
    refused(f"http://127.0.0.1:{port}/image.png", f"http://127.0.0.1:{port}", "refused", "check the address")
    refused("http://127.0.0.1:port/image.png", "port")
    refused("http:///image.png", "http:///image.png")


# ------------------------------------------------------------------------------------------ command line


def test_the_command_line_takes_addresses_and_dicom(server, tmp_path, capsys):
    model = ["--model", str(GOLDEN / "libra-7b" / "model"), "--device", "cpu", "--max-new-tokens", "5", "--images"]
    run = lambda *images: sample.main(sample.parse([*model, *images]))
    chest = tmp_path / "chest.dcm"
    chest.write_bytes(written(dataset(U12, stored=12)))
    server.seen.clear()
    assert run(f"{server.url}/image.png", f"{server.url}/chest") == 0
    assert server.seen == ["/image.png", "/chest"]
    out = capsys.readouterr().out
    assert run(str(GOLDEN / "images" / "0.png"), str(chest)) == 0
    assert out.strip() and capsys.readouterr().out == out
    for place, words in ((f"{server.url}/page", "a page"), ("file:///etc/passwd", "not http(s)")):
        assert run(place) == 2
        printed = capsys.readouterr()
        assert not printed.out and printed.err.startswith("sample.py: ") and words in printed.err
        assert printed.err.count("\n") == 1
