import io
import struct
import zlib

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image

from data import Study
from plumbing.image import load_image

GREY = np.random.default_rng(0).integers(0, 256, (9, 13), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (200, 300), dtype=np.uint16)
DEEP[0, :8] = 0, 1, 127, 128, 129, 385, 386, 65535  # 128 of 257 rounds down, 129 up


def pixels(source):
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values):
    return np.repeat(values[..., None], 3, 2)


def written(image, kind, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refused(source, *words):
    """load_image refuses the source with one line that holds the words."""
    with pytest.raises((ValueError, OSError)) as caught:
        load_image(source)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


# ------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_and_colour_of_8_bits_are_kept(kind):
    assert (pixels(written(Image.fromarray(GREY), kind)) == grey(GREY)).all()
    assert (pixels(written(Image.fromarray(COLOUR), kind)) == COLOUR).all()


def test_jpeg_is_decoded_as_pillow_does():
    for values in (GREY, COLOUR):
        data = written(Image.fromarray(values), "JPEG", quality=90)
        assert (pixels(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_an_alpha_channel_is_dropped():
    alpha = np.random.default_rng(3).integers(0, 256, (9, 13, 1), dtype=np.uint8)
    assert (pixels(written(Image.fromarray(np.dstack((COLOUR, alpha))), "PNG")) == COLOUR).all()
    assert (pixels(written(Image.fromarray(np.dstack((GREY, alpha))), "PNG")) == grey(GREY)).all()


@pytest.mark.parametrize("transparency", [{}, {"transparency": 3}])
def test_a_palette_gives_its_colours(transparency):
    image = Image.fromarray(GREY % 16, "P")
    image.putpalette(COLOUR.flatten()[:48].tobytes())
    assert (pixels(written(image, "PNG", **transparency)) == COLOUR.reshape(-1, 3)[GREY % 16]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_1_bit_becomes_black_and_white(kind):
    assert (pixels(written(Image.fromarray(GREY > 99), kind)) == grey(np.uint8(255) * (GREY > 99))).all()


def big_endian_tiff(values):
    """An uncompressed 16-bit TIFF with the bytes of a Motorola machine, by hand."""
    rows, columns = values.shape
    tags = {256: columns, 257: rows, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: rows, 279: values.size * 2}
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack(">2sHI", b"MM", 42, 8 + values.size * 2) + values.astype(">u2").tobytes() + (
        struct.pack(">H", len(tags)) + entries + bytes(4)
    )  # fmt: skip


DEEP_FILES = {
    "PNG": lambda: written(Image.fromarray(DEEP), "PNG"),
    "TIFF": lambda: written(Image.fromarray(DEEP), "TIFF"),
    "compressed TIFF": lambda: written(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"),
    "big-endian TIFF": lambda: big_endian_tiff(DEEP),
    "TIFF of 32 bits": lambda: written(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
    "PIL": lambda: Image.fromarray(DEEP),
}


@pytest.mark.parametrize("file", DEEP_FILES)
def test_grey_of_16_bits_is_scaled_by_its_full_range(file):
    expected = ((DEEP.astype(int) + 128) // 257).astype(np.uint8)  # v / 257, rounded
    assert (pixels(DEEP_FILES[file]()) == grey(expected)).all()


TURNS = {  # EXIF orientation -> what shows the stored pixels upright
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation_is_applied(kind, orientation):
    image, exif = Image.fromarray(COLOUR), Image.Exif()
    exif[274] = orientation
    stored = np.asarray(Image.open(io.BytesIO(written(image, kind))))
    assert (pixels(written(image, kind, exif=exif)) == TURNS[orientation](stored)).all()


# ----------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("number", range(6))
def test_path_string_bytes_and_pil_give_the_same_pixels(number):
    path = GOLDEN / "images" / f"{number}.png"
    image = Image.open(path)
    expected = np.asarray(image.convert("RGB"))
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        assert (pixels(source) == expected).all()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_pil_image_is_left_as_it_was(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.open(io.BytesIO(written(Image.fromarray(COLOUR), "PNG", exif=exif)))
    load_image(image).paste((1, 2, 3), (0, 0, 5, 5))
    assert image.getexif()[274] == orientation
    assert (np.asarray(image) == COLOUR).all()


def test_a_study_gives_current_and_prior_in_this_order_and_one_image_without_a_prior(tmp_path):
    file = tmp_path / "current.png"
    file.write_bytes(written(Image.fromarray(COLOUR), "PNG"))
    images = Study(file, Image.fromarray(GREY)).images()
    assert all((np.asarray(image) == values).all() for image, values in zip(images, (COLOUR, grey(GREY)), strict=True))
    (alone,) = Study(file.read_bytes()).images()
    assert (np.asarray(alone) == COLOUR).all()


# ------------------------------------------------------------------------------------------------ errors


def test_missing_empty_and_directory_name_the_path(tmp_path):
    empty = tmp_path / "empty.png"
    empty.touch()
    refused(tmp_path / "none.png", str(tmp_path / "none.png"), "check the path")
    refused(str(tmp_path), str(tmp_path), "give an image file")
    refused(empty, str(empty), "empty")
    refused(b"", "give a JPEG, PNG, TIFF or DICOM")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_cut_file_is_refused(tmp_path, kind, share):
    noise = np.random.default_rng(4).integers(0, 256, (300, 300), dtype=np.uint8)
    data = written(Image.fromarray(noise), kind)
    file = tmp_path / "cut"
    file.write_bytes(data[: int(share * len(data))])
    refused(file, str(file), "fetch it again" if kind != "TIFF" else "")
    refused(file.read_bytes())


def test_a_text_file_is_no_image(tmp_path):
    file = tmp_path / "report.png"
    file.write_text("FINDINGS: The heart is normal.\n")
    refused(file, str(file), "give a JPEG, PNG, TIFF or DICOM")


def test_a_format_that_another_program_would_have_to_run_is_refused():
    refused(written(Image.fromarray(GREY), "EPS"), "give a JPEG, PNG, TIFF or DICOM")


@pytest.mark.parametrize("side", [20000, 10000])  # Pillow raises above twice its limit, and warns above it
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(bytes(9)), b"IEND": b""}
    part = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    file = tmp_path / "bomb.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(part(*chunk) for chunk in chunks.items()))
    refused(file, str(file), "89 million pixels", "scale it down")


WRONG = {"real": DEEP / np.float32(65536), "-1": DEEP.astype(np.int32) - 1, "2^16": DEEP.astype(np.int32) + 1}


@pytest.mark.parametrize("values", WRONG.values(), ids=WRONG)
def test_pixels_that_are_no_whole_numbers_of_16_bits_are_refused(tmp_path, values):
    file = tmp_path / "values.tiff"
    file.write_bytes(written(Image.fromarray(values), "TIFF"))
    refused(file, str(file), "8 or 16 bits")


def test_a_damaged_pil_image_is_refused():
    data = written(Image.fromarray(COLOUR.repeat(30, 0)), "PNG")
    refused(Image.open(io.BytesIO(data[: len(data) // 2])), "truncated")
