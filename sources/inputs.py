"""Finding and reading the published files: a folder, the one file of a pattern, the columns of a CSV file.

What is odd in them does not stop a command. It is counted in `skipped`, a Counter {reason: how often}.
"""

import csv
import gzip
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from plumbing.cli import progress


def directory(path) -> Path:
    """The path of an existing folder. Raises NotADirectoryError."""
    if not Path(path).is_dir():
        raise NotADirectoryError(f"no folder {path}: check the path")
    return Path(path)


def only_one(folder, pattern: str) -> Path:
    """The only file in a folder that matches the pattern. Raises ValueError if there are none or several."""
    matches = sorted(directory(folder).glob(pattern))
    if len(matches) != 1:
        names = ", ".join(path.name for path in matches) or "none"
        raise ValueError(f"{folder} must hold exactly one {pattern}, found {names}: check the folder")
    return matches[0]


def require(columns: Iterable[str], present: Iterable[str], where):
    """Raises ValueError if a column is missing; the message lists the columns that are present."""
    absent = [column for column in columns if column not in present]
    if absent:
        listed = ", ".join(map(str, present)) or "none"
        raise ValueError(f"{where} has no column {', '.join(absent)}; it has {listed}")


def read_csv(path: Path, columns: Iterable[str], skipped: Counter) -> Iterator[list[str]]:
    """Yields the named columns of every row of a CSV file, plain or gzip.

    Raises ValueError if a column is missing or if the file is truncated or damaged.
    """
    show = progress(f"reading {path.name}", "MB", 10**6)
    try:
        with open(path, "rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            lines = gzip.open(raw) if path.suffix == ".gz" else raw
            latin = f"lines of {path.name} in Latin-1"
            reader = csv.reader(decode(line, skipped, latin) for line in lines)

            # the header says where the columns are; it may begin with a byte order mark
            header = [name.strip().removeprefix("\ufeff") for name in next(reader, [])]
            require(columns, header, path)
            places = [header.index(name) for name in columns]

            for number, row in enumerate(reader):
                # progress is measured in bytes of the file, because nobody knows its number of rows
                if number % 4096 == 0:
                    show(raw.tell(), size)
                if len(row) != len(header):
                    skipped[f"rows of {path.name} with too few or too many fields"] += 1
                else:
                    yield [row[place].strip() for place in places]
            show(size, size)
    except (EOFError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): download it again") from None


def decode(data: bytes, counts: Counter, reason: str) -> str:
    """UTF-8 text, or else Latin-1, which is counted under `reason`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        counts[reason] += 1
        return data.decode("latin-1")


def one_line(text: str) -> str:
    """Text on one line. Reports are wrapped at about 80 characters, and their line breaks mean nothing."""
    return " ".join(text.split())
