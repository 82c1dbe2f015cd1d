"""Building the image cache: every image padded, resized and cropped once, so that training need not decode it again.

`data.ImageCache` reads it and documents its two files. Frames are appended to frames.bin in the order of their names.
Their lines in the index follow once the frames are on the disk, in a file that replaces the index at the end. If a
build is killed, the next one resumes behind the last such line and produces the same bytes. Images that a finished
cache lacks are appended in the same way.
"""

import json
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data import FRAMES, INDEX, ImageFolder, Records, cache_settings, image_names, parse_index
from plumbing import checkpoint
from plumbing.cli import parallel, print_table, progress
from plumbing.files import atomic, only_writer, read_json, resumable
from plumbing.pixels import PixelConfig, open_clip_pixels, pixel_config

FLUSH_EVERY = 0.25  # seconds of work that a kill may cost
SHOWN = 20  # skipped images that are named


def build(records, image_folder, model, pad: str, out, workers: int):
    """Make, extend or resume the cache of all images that the record files name, and print what is in it.

    Raises ValueError if the cache was made with other settings, is damaged, or is being written.
    """
    # 1) how the model's encoder is shown images, and which ones
    config = pixels_of(checkpoint.locate(model), pad)
    images = ImageFolder(image_folder, config)
    names = names_in(records)

    # 2) append the frames that the cache lacks
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    growing = out / f".{INDEX}.growing"
    begin = time.monotonic()
    with resumable(out), open(out / FRAMES, "ab") as frames, only_writer(frames, out):
        finished = resume(frames, growing, config)
        absent = sorted(names - finished)
        with open(growing, "ab") as index:
            skipped = append(absent, images, Appender(frames, index), workers)
        os.replace(growing, out / INDEX)

    # 3) say what could not be read, and what is in the cache now
    for name, problem in list(skipped.items())[:SHOWN]:
        print(f"skipped {name}: {problem}", file=sys.stderr)
    entries = parse_index((out / INDEX).read_bytes(), config, out / INDEX)
    channels = Counter(entry["channels"] for entry in entries)
    without_file = sum(problem.startswith("no image") for problem in skipped.values())
    table = {
        "images": len(entries),
        "of one channel": channels[1],
        "of three channels": channels[3],
        "there before": len(finished),
        "skipped, no file": without_file,
        "skipped, other reasons": len(skipped) - without_file,
        "bytes": (out / FRAMES).stat().st_size,
        "seconds": round(time.monotonic() - begin),
    }
    print_table(table.items())


def pixels_of(source: checkpoint.Source, pad: str) -> PixelConfig:
    """How an encoder, or the encoder of a checkpoint, is shown images. No weights are needed.

    Raises ValueError if the folder describes neither.
    """
    folder = source.folder
    if not (folder / "preprocessor_config.json").exists():
        config = read_json(folder / "config.json")
        # BiomedCLIP: open_clip's own settings, at the path that the checkpoint names or in its folder
        if config.get("mm_vision_tower_config"):
            file = Path(folder, config["mm_vision_tower_config"])
            if not file.is_file():
                file = folder / file.name
            return open_clip_pixels(read_json(file)["vision_cfg"]["image_size"], pad)
        if not config.get("mm_vision_tower"):
            raise ValueError(f"{folder} has no preprocessor_config.json and names no encoder: give the encoder")
        folder = checkpoint.locate(config["mm_vision_tower"], folder).folder
    return pixel_config(read_json(folder / "preprocessor_config.json"), folder, pad)


def names_in(files: Iterable) -> set[str]:
    """The images that record files name. Raises ValueError with the place of a record that names none properly."""
    names = set()
    for records in map(Records, files):
        for number, record in enumerate(records):
            try:
                names.update(image_names(record))
            except ValueError as error:
                raise ValueError(f"{records.place(number)}: {error}") from None
    return names


def resume(frames, growing: Path, config: PixelConfig) -> set[str]:
    """Bring frames.bin and the growing index to the state of the last complete line; the images they hold.

    An interrupted build is preferred to the finished cache that it extends. Raises ValueError if the cache was made
    with other settings, or if frames are missing.
    """
    folder = growing.parent
    stored = b""
    for path in (growing, folder / INDEX):
        if path.exists():
            stored = path.read_bytes()
            break
    # a kill may have torn the last line; the first line holds the settings
    stored = stored[: stored.rfind(b"\n") + 1] or _line(cache_settings(config))
    entries = parse_index(stored, config, folder / INDEX)

    end = sum(entry["channels"] for entry in entries) * config.crop**2
    if os.fstat(frames.fileno()).st_size < end:
        raise ValueError(f"{folder / FRAMES} is shorter than its index says: delete {folder} and make it again")
    with atomic(growing, "wb") as file:
        file.write(stored)
    frames.truncate(end)
    return {entry["image"] for entry in entries}


class Frame(NamedTuple):
    """uint8 [S, S] as bytes with one channel, [S, S, 3] with three; or the problem with the image."""

    channels: int
    data: bytes
    problem: str = ""


class Appender:
    """Appends frames to one open file and their lines to another. No line is on the disk before its frame."""

    def __init__(self, frames, index):
        self.frames, self.index = frames, index
        self.lines, self.flushed = [], time.monotonic()

    def add(self, name: str, frame: Frame):
        self.frames.write(frame.data)
        self.lines.append(_line({"image": name, "channels": frame.channels, "crc32": zlib.crc32(frame.data)}))
        if time.monotonic() - self.flushed > FLUSH_EVERY:
            self.flush()

    def flush(self):
        _sync(self.frames)
        self.index.write(b"".join(self.lines))
        _sync(self.index)
        self.lines, self.flushed = [], time.monotonic()


def append(names: list[str], images: ImageFolder, appender: Appender, workers: int) -> dict[str, str]:
    """Append the frames of the images. Returns {image: problem} of those that cannot be read."""
    skipped, show = {}, progress("caching", "images")
    frames = parallel(partial(read_frame, images), names, workers)
    for number, (name, frame) in enumerate(zip(names, frames, strict=True), 1):
        if frame.problem:
            skipped[name] = frame.problem
        else:
            appender.add(name, frame)
        show(number, len(names))
    appender.flush()
    return skipped


def read_frame(images: ImageFolder, name: str) -> Frame:
    """One image as the encoder will see it. Runs in a worker process."""
    try:
        frame = images.frame(name)  # [S, S, 3]
    except (ValueError, OSError) as error:
        return Frame(0, b"", str(error))
    grey = (frame == frame[..., :1]).all()
    if grey:
        return Frame(1, frame[..., 0].tobytes())
    return Frame(3, frame.tobytes())


def _line(entry: dict) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _sync(file):
    file.flush()
    os.fsync(file.fileno())
