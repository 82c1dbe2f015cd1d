"""From raw data sets to what training and evaluation read.

    python prepare.py cache --records train.json --image-folder files --model X-iZhang/libra-v1.0-7b --out cache
"""

import argparse
import os
import sys

from cli import Parser, atomic, guard, progress


def parse(arguments=None):
    parser = Parser(prog="prepare.py", description="Prepare data for training and evaluation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    settings = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    about = "pad, resize and crop every image once, so that training need not decode it again"
    add = commands.add_parser("cache", help=about, description=about.capitalize() + ".", **settings).add_argument
    add("--records", nargs="+", required=True, metavar="FILE", help="record or question files, JSON or JSONL")
    add("--image-folder", required=True, metavar="DIR", help="where the images that they name are")
    add("--model", required=True, metavar="ID_OR_DIR", help="checkpoint or image encoder: a folder or a hub id")
    add("--pad", default="black", choices=("black", "mean", "none"),
        help="how images become square: black as in training, the mean colour as in inference, or cropped")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="where the cache is made, added to, or gone on with")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that decode images")
    arguments = parser.parse_args(arguments)
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers} is not at least 1")
    return arguments


if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    ARGUMENTS = parse()

# ruff: noqa: E402
import errno
import fcntl
import json
import multiprocessing
import signal
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import checkpoint
from data import FRAMES, INDEX, ImageFolder, Records, cache_settings, image_names, parse_index
from encoder import pixel_config


def parallel(function: Callable, items: Iterable, workers: int) -> Iterator:
    """function(item) of every item, in their order, from worker processes that run a little ahead.

    The workers end with this process, even where it is killed. OSError where one of them dies.
    """
    # forked where that is safe, which is at once; elsewhere each worker imports everything anew
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _follow_parent)
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process was killed (out of memory?): run again with fewer --workers, what is done is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent():
    def end_with(parent):
        wait([parent.sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends in order
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def table(rows: dict):
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}")


# ----------------------------------------------------------------------------------------------- cache


def cache(arguments):
    """Every image of the records as a frame in one file, see `data.ImageCache`.

    Frames are appended in the order of their names. The lines of the index follow when the frames they speak of are on
    the disk, in a file that takes the index's place at the end: whenever this is killed, the next run goes on behind
    the last such line, to the same bytes. Images that a finished cache lacks are appended in the same way.
    """
    source = checkpoint.locate(arguments.model)
    if not (source.folder / "preprocessor_config.json").exists():
        tower = checkpoint.read_json(source.folder / "config.json").get("mm_vision_tower")
        if not tower:
            raise ValueError(f"{source.folder} has no preprocessor_config.json and names no encoder: give the encoder")
        source = checkpoint.locate(tower, source.folder)
    settings = checkpoint.read_json(source.folder / "preprocessor_config.json")
    config = pixel_config(settings, source.folder, arguments.pad)
    images = ImageFolder(arguments.image_folder, config)
    wanted = set()
    for records in map(Records, arguments.records):
        for number, record in enumerate(records):
            try:
                wanted.update(image_names(record))
            except ValueError as error:
                raise ValueError(f"{records.place(number)}: {error}") from None

    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    index, growing = out / INDEX, out / f".{INDEX}.growing"
    begin = time.monotonic()
    with open(out / FRAMES, "ab") as frames:
        try:
            fcntl.lockf(frames, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with this process, however it ends
        except OSError:
            raise ValueError(f"{out} is being written by another process: wait for it, or use another --out") from None
        stored = next((path.read_bytes() for path in (growing, index) if path.exists()), b"")
        stored = stored[: stored.rfind(b"\n") + 1] or _line(cache_settings(config))  # a last line may be torn
        entries = parse_index(stored, config, index)
        end = sum(entry["channels"] for entry in entries) * config.crop**2
        if os.fstat(frames.fileno()).st_size < end:
            raise ValueError(f"{out / FRAMES} is shorter than its index says: delete {out} and make it again")
        missing = sorted(wanted - {entry["image"] for entry in entries})
        try:
            with atomic(growing, "wb") as file:
                file.write(stored)
            frames.truncate(end)
            with open(growing, "ab") as file:
                skipped = append(missing, images, frames, file, arguments.workers)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise OSError(f"{out}: {error.strerror}: make room and run this again, what is done is kept") from None
        os.replace(growing, index)

    entries = parse_index(index.read_bytes(), config, index)
    for name, reason in list(skipped.items())[:20]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    channels = Counter(entry["channels"] for entry in entries)
    table({
        "images": len(entries),
        "of one channel": channels[1],
        "of three channels": channels[3],
        "there before": len(entries) - len(missing) + len(skipped),
        "skipped, no file": sum(reason.startswith("no image") for reason in skipped.values()),
        "skipped, other reasons": sum(not reason.startswith("no image") for reason in skipped.values()),
        "bytes": (out / FRAMES).stat().st_size,
        "seconds": round(time.monotonic() - begin),
    })  # fmt: skip


def append(names: list[str], images: ImageFolder, frames, index, workers: int) -> dict[str, str]:
    """Append the frames of the images, and lines about them to the index; the images that cannot be read, and why."""
    lines, skipped, flushed = [], {}, time.monotonic()
    show = progress("caching", "images")

    def flush():
        for file, data in ((frames, b""), (index, b"".join(lines))):  # a line is never on the disk before its frame
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        lines.clear()

    results = parallel(partial(_frame, images), names, workers)
    for number, (name, (channels, data)) in enumerate(zip(names, results, strict=True), 1):
        if channels:
            frames.write(data)
            lines.append(_line({"image": name, "channels": channels, "crc32": zlib.crc32(data)}))
        else:
            skipped[name] = data
        if number == len(names) or time.monotonic() - flushed > 0.25:  # seconds
            flush()
            flushed = time.monotonic()
        show(number, len(names))
    return skipped


def _line(entry: dict) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _frame(images: ImageFolder, name: str) -> tuple[int, bytes | str]:
    """Channels and bytes of a frame; 0 and the reason where there is none."""
    try:
        frame = images.frame(name)
    except (ValueError, OSError) as error:
        return 0, str(error)
    grey = (frame == frame[..., :1]).all()
    return (1, frame[..., 0].tobytes()) if grey else (3, frame.tobytes())


def main(arguments) -> int:
    return guard("prepare.py", {"cache": cache}[arguments.command], arguments)


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
