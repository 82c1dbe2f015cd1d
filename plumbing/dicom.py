"""A DICOM file -> the grey or colour levels that a screen shows, 0 to 255; needs pydicom 3.

`standard` shows a file as it says (PS3.3: Modality LUT, VOI LUT or window). `jpg` shows it as MIMIC-CXR-JPG was made
(Johnson et al. 2019, arXiv 1901.07042, "Methods"): stored values from lowest to highest, and the histogram equalised.

A picture has millions of pixels and at most 65,536 different values. So the level of each value is computed once, and
the pixels are looked up.
"""

import io
import struct
import warnings

import numpy as np

DISPLAYS = ("standard", "jpg")
MAX_PIXELS = 2**30 // 12  # of any image that is decoded; Pillow's default limit
RLE_BYTES = 2**25  # of a run-length frame, which may grow 64-fold
STRIP = 2**20  # values that are looked up at once, because numpy needs 8 bytes for each
COLOURS = ("Red", "Green", "Blue")


def read_dicom(name, data: bytes, display: str) -> np.ndarray:
    """Returns the first frame of a DICOM file: uint8 [rows, columns] if grey, [rows, columns, 3] if colour.

    display: one of DISPLAYS. name: what a warning calls the file. Raises ValueError, or whatever a decoder raises.
    """
    from pydicom import dcmread, uid

    with warnings.catch_warnings():
        # many files stray from the standard and can still be read
        warnings.simplefilter("ignore")
        dicom = dcmread(_NotDeflated(data), force=True)
        if not dicom.get("PixelData"):
            raise ValueError("no pixel data")
        # a bare data set does not name its transfer syntax, but pydicom has found its byte order
        syntax = uid.ExplicitVRLittleEndian if _byte_order(dicom) == "<" else uid.ExplicitVRBigEndian
        dicom.file_meta.setdefault("TransferSyntaxUID", syntax)
        _check_size(dicom)
        shown = _show(dicom, _stored_values(dicom), display)
    if int(dicom.get("NumberOfFrames") or 1) > 1:
        warnings.warn(f"{name} has {dicom.NumberOfFrames} frames: the first is read", stacklevel=4)
    return shown


class _NotDeflated(io.BytesIO):
    def read(self, size=-1):
        # pydicom reads all that is left only to inflate a deflated data set (PS3.5, A.5), to any size
        if size is None or size < 0:
            raise ValueError("it is deflated")
        return super().read(size)


def _byte_order(dicom) -> str:
    _, little_endian = dicom.original_encoding
    return "<" if little_endian else ">"


# ------------------------------------------------------------------------------------------ stored values


def _check_size(dicom):
    """ValueError if the decoded frame would be too large, as the data set says or as the compressed frame says."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    pixels, samples = dicom.Rows * dicom.Columns, dicom.get("SamplesPerPixel") or 1
    if pixels > MAX_PIXELS or pixels * samples * dicom.BitsAllocated > 32 * MAX_PIXELS:
        raise ValueError(f"too many pixels: {dicom.Columns} × {dicom.Rows}")
    syntax = dicom.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        return
    offsets = dicom.get("ExtendedOffsetTable"), dicom.get("ExtendedOffsetTableLengths")
    offsets = offsets if all(offsets) else None
    frames = int(dicom.get("NumberOfFrames") or 1)
    frame = get_frame(dicom.PixelData, 0, number_of_frames=frames, extended_offsets=offsets)
    if syntax == RLELossless and len(frame) > RLE_BYTES:
        raise ValueError(f"a run-length frame of more than {RLE_BYTES // 2**20} MB")
    if _values_in(frame) > pixels * samples:
        raise ValueError(f"its compressed frame is larger than {dicom.Columns} × {dicom.Rows}")


def _values_in(frame: bytes) -> int:
    """Pixels × components that a JPEG, JPEG-LS or JPEG 2000 frame declares by itself; decoders believe it. 0: none."""
    # JPEG 2000 (ISO 15444-1, A.5.1): the SIZ segment begins behind the first marker, perhaps inside a JP2 file
    most, start = 0, frame.find(b"\xff\x4f\xff\x51")
    while start >= 0 and not frame.startswith(b"\xff\xd8"):
        siz = frame[start + 8 : start + 42].ljust(34, b"\0")
        right, bottom, left, top, *_, components = struct.unpack(">8IH", siz)
        most = max(most, (right - left) * (bottom - top) * components)
        start = frame.find(b"\xff\x4f\xff\x51", start + 1)
    if most:
        return most

    # JPEG and JPEG-LS: from marker to marker, up to the one that begins a frame (ISO 10918-1, B.2.2)
    position = 2
    while frame[position : position + 1] == b"\xff":
        marker, length = frame[position + 1 : position + 2], frame[position + 2 : position + 4]
        if marker in (b"\xc4", b"\xc8", b"\xcc") or not (b"\xc0" <= marker <= b"\xcf" or marker == b"\xf7"):
            # fill bytes come before a marker; any other segment tells its length
            position += 1 if marker == b"\xff" else 2 + int.from_bytes(length, "big")
            continue
        height, width, components = struct.unpack(">HHB", frame[position + 5 : position + 10].ljust(5, b"\0"))
        return height * width * components
    return 0


def _stored_values(dicom) -> np.ndarray:
    """The first frame's values, [rows, columns] or [rows, columns, 3]; YBR has become RGB."""
    from pydicom.pixels import pixel_array
    from pydicom.uid import RLELossless

    # PS3.5, 8.1.1: a value ends at the high bit of its cell. pydicom takes it for the last of the stored bits.
    syntax = dicom.file_meta.TransferSyntaxUID
    unused = dicom.get("HighBit", dicom.BitsStored - 1) - (dicom.BitsStored - 1)
    if unused == 0 or (syntax.is_compressed and syntax != RLELossless):
        return pixel_array(dicom, index=0)
    if unused < 0 or dicom.HighBit >= dicom.BitsAllocated:
        raise ValueError(f"high bit {dicom.HighBit} for {dicom.BitsStored} of {dicom.BitsAllocated} bits")
    stored = dicom.BitsStored
    dicom.BitsStored = dicom.HighBit + 1
    values = pixel_array(dicom, index=0) >> unused
    dicom.BitsStored = stored
    return values


# ------------------------------------------------------------------------------------------ shown levels


def _show(dicom, values: np.ndarray, display: str) -> np.ndarray:
    """Stored values of any shape -> shown levels, uint8 of the same shape; a palette adds a dimension of 3."""
    # 1) the different values [n], and where they are: stored[places(values)] == values
    values, shape = values.reshape(-1), values.shape
    lowest, highest = int(values.min()), int(values.max())
    if highest - lowest < STRIP:
        stored = np.arange(lowest, highest + 1)
        places = lambda strip: strip.astype(np.int64) - lowest
    else:  # values of 32 bits
        stored = np.unique(values)
        places = lambda strip: np.searchsorted(stored, strip)

    # 2) the level of each, [n] or [n, 3]
    strips = [slice(start, start + STRIP) for start in range(0, len(values), STRIP)]
    counts = sum(np.bincount(places(values[strip]), minlength=len(stored)) for strip in strips)
    levels = _levels(dicom, stored, counts, display)

    # 3) the level of each pixel
    shown = np.empty((len(values), *levels.shape[1:]), np.uint8)
    for strip in strips:
        shown[strip] = levels[places(values[strip])]
    return shown.reshape(*shape, *levels.shape[1:])


def _levels(dicom, stored: np.ndarray, counts: np.ndarray, display: str) -> np.ndarray:
    """Stored values [n], which occur counts [n] times -> uint8 [n], or [n, 3] from a palette."""
    kind = dicom.PhotometricInterpretation  # PS3.3, C.7.6.3.1.2
    is_grey = kind in ("MONOCHROME1", "MONOCHROME2")
    if is_grey and display == "jpg":
        return _jpg_levels(stored, counts, inverted=kind == "MONOCHROME1")
    if is_grey:
        levels = _grey(dicom, stored, counts > 0)
        levels = 1 - levels if kind == "MONOCHROME1" else levels
    elif kind == "PALETTE COLOR":
        levels = _palette(dicom, stored)
    elif kind in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"):
        levels = stored / (2**dicom.BitsStored - 1)
    else:
        raise ValueError(f"its photometric interpretation is {kind}")
    if not np.isfinite(levels).all():
        raise ValueError("its rescale or window is no number")
    return (255 * levels.clip(0, 1)).round().astype(np.uint8)


def _jpg_levels(stored: np.ndarray, counts: np.ndarray, inverted: bool) -> np.ndarray:
    """MIMIC-CXR-JPG's recipe: values from lowest to highest become 0 to 255, cut to whole numbers, then equalised."""
    grey = ((stored - stored[0]) / max(stored[-1] - stored[0], 1) * 255).astype(np.uint8)
    grey = 255 - grey if inverted else grey
    histogram = np.bincount(grey, weights=counts, minlength=256).astype(np.int64)
    return equalise(histogram)[grey]


def equalise(histogram: np.ndarray) -> np.ndarray:
    """A histogram [256] of grey levels -> the new level of each, uint8 [256], as OpenCV's equalizeHist computes it.

    Level v becomes 255 · (pixels at most v - pixels of the lowest level) / (all pixels - pixels of the lowest level).
    """
    occurring = np.flatnonzero(histogram)
    lowest, total = occurring[0], histogram.sum()
    if len(occurring) == 1:  # a picture of one level keeps it
        return np.arange(256, dtype=np.uint8)
    above = histogram.cumsum() - histogram[lowest]
    # in float32, as there
    scale = np.float32(255) / np.float32(total - histogram[lowest])
    return np.rint(above.clip(0).astype(np.float32) * scale).astype(np.uint8)


def _grey(dicom, stored: np.ndarray, occurs: np.ndarray) -> np.ndarray:
    """Stored values [n] -> shown values [n]: up to 0 black, from 1 white. occurs [n]: which ones are in the picture.

    pydicom's own functions turn windows upside down when the slope falls, and wrap around in 8-bit lookup tables.
    """
    # 1) Modality LUT (PS3.3, C.11.1): a lookup table, or else slope and intercept
    if dicom.get("ModalityLUTSequence"):
        values, _ = _look_up(dicom, dicom.ModalityLUTSequence[0], stored)
    else:
        values = stored * float(dicom.get("RescaleSlope") or 1) + float(dicom.get("RescaleIntercept") or 0)

    # 2) VOI LUT (PS3.3, C.11.2): a lookup table, or else a window, or else the frame's own range
    if dicom.get("VOILUTSequence"):
        values, bits = _look_up(dicom, dicom.VOILUTSequence[0], values)
        return values / (2**bits - 1)
    function = dicom.get("VOILUTFunction") or "LINEAR"
    window = _first_window(dicom)
    if window is None:
        # padding is no part of the picture; a frame of nothing else shows as it is
        pictured = occurs & ~_is_padding(dicom, stored)
        pictured = values[pictured if pictured.any() else occurs]
        low, high = pictured.min(), pictured.max()
    elif function == "SIGMOID":
        center, width = window
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    else:
        # C.11.2.1: LINEAR_EXACT is as wide as it says, LINEAR one value less
        center, width = window
        low, high = center - width / 2, center + width / 2 - (function == "LINEAR")
    return (values - low) / max(high - low, 1e-9)


def _first_window(dicom) -> tuple[float, float] | None:
    """Center and width of the first window that has both, and is of some width."""
    # each is None, a number, or a list of numbers and empty texts
    centers, widths = (np.ravel(np.array(dicom.get(name), object)) for name in ("WindowCenter", "WindowWidth"))
    for center, width in zip(centers, widths, strict=False):
        if center in (None, "") or width in (None, ""):
            continue
        if float(width) > 0:
            return float(center), float(width)
    return None


def _is_padding(dicom, stored: np.ndarray) -> np.ndarray:
    """Which stored values fill the area around the picture (PS3.3, C.7.5.1.1.2), bool [n]."""
    first = dicom.get("PixelPaddingValue")
    last = dicom.get("PixelPaddingRangeLimit", first)
    if first is None or last is None:
        return np.zeros(len(stored), bool)
    # some files write them with the other sign: 63536 for -2000
    period = 2**dicom.BitsAllocated
    lowest = -period // 2 if dicom.get("PixelRepresentation") == 1 else 0
    first, last = sorted((value - lowest) % period + lowest for value in (first, last))
    return (stored >= first) & (stored <= last)


# ------------------------------------------------------------------------------------------ lookup tables


def _look_up(dicom, item, values: np.ndarray) -> tuple[np.ndarray, int]:
    """Looks values [n] up in the table of a LUT sequence's item. Returns the entries and how many bits they have."""
    return _take(dicom, item.LUTDescriptor, item.LUTData, values)


def _palette(dicom, stored: np.ndarray) -> np.ndarray:
    """Stored values [n] -> colours from 0 to 1, [n, 3] (PS3.3, C.7.6.3.1.5)."""
    from pydicom.pixels import apply_color_lut

    if "RedPaletteColorLookupTableData" not in dicom:  # its tables are in segments
        bits = dicom.RedPaletteColorLookupTableDescriptor[2]
        return apply_color_lut(stored, dicom)[..., :3] / (2**bits - 1)
    channels = []
    for colour in COLOURS:
        descriptor, data = (dicom[f"{colour}PaletteColorLookupTable{part}"].value for part in ("Descriptor", "Data"))
        entries, bits = _take(dicom, descriptor, data, stored)
        channels.append(entries / (2**bits - 1))
    return np.stack(channels, axis=-1)


def _take(dicom, descriptor, table, values: np.ndarray) -> tuple[np.ndarray, int]:
    """Entries of a lookup table for values [n], and their bits. Values outside take its first or last entry.

    descriptor (PS3.3, C.11.1.1.1): number of entries, the value of the first, bits of an entry.
    """
    # the first and the last are never negative, whatever type they are written in; 0 stands for 2**16
    entries, first, bits = descriptor[0] % 2**16 or 2**16, descriptor[1], descriptor[2] % 2**16
    if isinstance(table, bytes):
        # words of 16 bits: an entry each, or two entries of 8 bits, the first in the lower half
        words = np.frombuffer(table + bytes(len(table) % 2), f"{_byte_order(dicom)}u2").astype("<u2")
        table = words.view("<u2" if len(table) >= 2 * entries else "u1")
    else:  # pydicom has parsed it
        table = np.ravel(table) % 2**16
    if len(table) < entries:
        raise ValueError(f"a lookup table is shorter than its {entries} entries")
    return np.take(table[:entries], values.astype(np.int64) - first, mode="clip"), bits
