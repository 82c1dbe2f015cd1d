"""Building the image cache that `data.ImageCache` describes and reads.

Frames are appended in the order of their names. Their lines follow once the frames are on the disk, in a file that
replaces the index at the end. After a kill, the next build resumes behind the last complete line and produces the same
bytes. A finished cache is extended in the same way.
"""

import json
import os
import sys
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from data import FRAMES, INDEX, ImageFolder, Records, cache_settings, image_names, parse_index, tell
from plumbing import checkpoint
from plumbing.cli import parallel, print_table, progress
from plumbing.fields import check_value
from plumbing.files import atomic, check_readable, only_writer, read_json, read_json_if_present, resumable
from plumbing.layout import libra_config
from plumbing.pixels import PREPROCESSOR_FILES, Edge, PixelConfig, open_clip_pixels, read_pixel_config


def build(records, image_folder, model, pad: str, out, workers: int, dicom_display: str | None = None):
    """Make, extend or resume the cache of the images that record files name. Raises ValueError if it does not fit."""
    # 1) which images, and how the model's encoder will see them
    source = checkpoint.locate(model)
    place = source.folder / "config.json"
    recorded = read_json_if_present(place).get("mm_dicom_display")
    recorded = check_value(recorded, Literal["standard", "jpg"] | None, "mm_dicom_display", place)
    config = replace(pixels_of(source, pad), dicom_display=dicom_display or recorded or "standard")
    images, names = ImageFolder(image_folder, config), names_in(records)

    # 2) append what the cache lacks, as the only process that writes it
    out = Path(out)
    index, growing = out / INDEX, out / f".{INDEX}.growing"
    for path in (index, growing, out / FRAMES):
        check_readable(path)
    out.mkdir(parents=True, exist_ok=True)
    with resumable(out), open(out / FRAMES, "ab") as frames, only_writer(frames, out):
        finished = resume(frames, growing, config)
        absent = sorted(names - finished)
        with open(growing, "ab") as lines:
            skipped = append(parallel(partial(read_frame, images), absent, workers), absent, frames, lines)
        os.replace(growing, index)

    # 3) say what was skipped, and what the cache holds now
    for name, problem in list(skipped.items())[:20]:
        print(f"skipped {name}: {problem}", file=sys.stderr)
    entries = parse_index(index.read_bytes(), config, index)
    grey = sum(entry["channels"] == 1 for entry in entries)
    lost = sum(problem.startswith("no image") for problem in skipped.values())
    print_table({
        "images": len(entries),
        "of one channel": grey,
        "there before": len(finished),
        "skipped, no file": lost,
        "skipped, other reasons": len(skipped) - lost,
    }.items())  # fmt: skip


def pixels_of(source: checkpoint.Source, pad: str) -> PixelConfig:
    """How an encoder, or the encoder of a checkpoint, is shown images. Needs no weights."""
    folder = source.folder
    json = read_json_if_present(folder / "config.json")
    if "mm_vision_tower" in json:
        config = libra_config(json, folder)
        # open_clip's settings are at this path, or in the folder of the checkpoint
        if config.mm_vision_tower_config:
            file = Path(folder, config.mm_vision_tower_config)
            file = file if file.is_file() else folder / file.name
            settings = check_value(read_json(file).get("vision_cfg"), dict, "vision_cfg", file)
            return open_clip_pixels(check_value(settings.get("image_size"), Edge, "image_size", file), pad)
        folder = checkpoint.locate(config.mm_vision_tower, folder).folder
    elif not any((folder / name).exists() for name in PREPROCESSOR_FILES):
        raise ValueError(f"{folder} has no preprocessor_config.json and names no encoder: give the encoder")
    return read_pixel_config(folder, pad)


def names_in(files) -> set[str]:
    """The images that record files name. Odd records are left out and counted; ValueError if a file has no others."""
    names = set()
    for records in map(Records, files):
        odd = []
        for number in range(len(records)):
            try:
                names.update(image_names(records[number]))
            except ValueError as error:
                place = f"{records.place(number)} "
                odd.append(place + str(error).removeprefix(place))
        if odd and len(odd) == len(records):
            raise ValueError(odd[0])
        if odd:
            tell(f"{records.path}: {len(odd):,} of {len(records):,} records are left out; the first: {odd[0]}")
    return names


def resume(frames, growing: Path, config: PixelConfig) -> set[str]:
    """Cut frames.bin and the growing index behind the last complete line. Returns the images that they hold."""
    # 1) the lines of an interrupted build, or else of a finished cache, or else the settings alone
    index = growing.with_name(INDEX)
    stored = next((path.read_bytes() for path in (growing, index) if path.exists()), b"")
    stored = stored[: stored.rfind(b"\n") + 1] or to_lines([cache_settings(config)])
    entries = parse_index(stored, config, index)

    # 2) there may be frames without a line, but no line without its frame
    end = sum(entry["channels"] for entry in entries) * config.crop**2
    if os.fstat(frames.fileno()).st_size < end:
        raise ValueError(f"{frames.name} is shorter than its index says: delete {index.parent} and make it again")
    with atomic(growing, "wb") as file:
        file.write(stored)
    frames.truncate(end)
    return {entry["image"] for entry in entries}


def append(results, names: list[str], frames, index) -> dict[str, str]:
    """Append the frames and their lines to two open files. Returns {image: problem} of those that cannot be read."""
    lines, skipped = [], {}
    flushed, show = time.monotonic(), progress("caching", "images")
    for number, (name, frame) in enumerate(zip(names, results, strict=True), 1):
        if isinstance(frame, str):
            skipped[name] = frame
        else:
            data = frame.tobytes()
            frames.write(data)
            lines.append({"image": name, "channels": frame.shape[2], "crc32": zlib.crc32(data)})
        # a kill costs the work of the last 0.25 seconds
        if number == len(names) or time.monotonic() - flushed > 0.25:
            # frames reach the disk before their lines
            frames.flush()
            os.fsync(frames.fileno())
            index.write(to_lines(lines))
            index.flush()
            os.fsync(index.fileno())
            lines, flushed = [], time.monotonic()
        show(number, len(names))
    return skipped


def read_frame(images: ImageFolder, name: str):
    """An image as the encoder will see it: uint8 [S, S, 1] if grey, else [S, S, 3]; or why it cannot be read."""
    try:
        frame = images.frame(name)  # [S, S, 3]
    except (ValueError, OSError) as error:
        return str(error)
    grey = (frame == frame[..., :1]).all()
    return frame[..., :1] if grey else frame


def to_lines(entries: list[dict]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
