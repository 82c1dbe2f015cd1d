"""Scores -> tables on stdout, JSON, and CSV files."""

import csv
import io
import json
import os
from pathlib import Path

from evaluation.answering import CONDITIONS
from evaluation.metrics import Interval
from evaluation.prior import BETTER, WORSE, Cell
from plumbing.cli import print_table
from plumbing.fields import shorten
from plumbing.files import atomic, check_writable, read_text


def print_json(result: dict):
    """Prints one object; intervals and differences in it become objects of their fields."""
    print(json.dumps(result, default=vars))


def print_scores(scores: dict[str, dict[str, Interval]], columns: dict[str, str]):
    """Prints a line for each score and a column for each name in `columns`, {name: heading}.

    A `Cell` with a difference to the true prior has it on a second line.
    """
    lines = [["", *columns.values()]]
    for key, cells in scores.items():
        lines.append([key, *(cells.get(name, "") for name in columns)])
        gaps = [getattr(cells.get(name), "difference", None) for name in columns]
        if any(gaps):
            lines.append(["  minus true", *(gap.format("+") if gap else "" for gap in gaps)])
    print_table(lines)


def print_differences(scores: dict[str, dict[str, dict]], sizes: dict[str, int]):
    """Prints a table for each group of studies."""
    for group, size in sizes.items():
        print(f"\n{group} ({size:,})")
        lines = [["", "A", "B", "B - A [95 % interval, paired]"]]
        for key, groups in scores.items():
            found = groups[group]
            lines.append([key, Interval(found["a"]), Interval(found["b"]), found["difference"]])
        print_table(lines)


def describe_empty(empty: dict[str, dict[str, int]]) -> str:
    """The counts of `pairs.count_empty_by_group` as a text; "all" comes first and is not named."""
    texts = []
    for group, counts in empty.items():
        texts.append(f"{group}: {counts['answers']:,} answers, {counts['references']:,} references")
    return "; ".join(texts).removeprefix("all: ")


def print_prior_notes(conditions: list[str]):
    """Prints what the conditions are and what `evaluation.prior` counts, as it is no published score."""
    print("; ".join(f"{condition}: {CONDITIONS[condition]}" for condition in conditions))
    print("directions flipped: share of the words of direction in the reports under true that the other report lacks")
    print("while it has a word of the opposite direction that the first lacks")
    print(f"worse: {', '.join(sorted(WORSE))}\nbetter: {', '.join(sorted(BETTER))}")


ENDS = ("value", "low", "high")
PRIOR_COLUMNS = ("Model Name", "score", "prior", *ENDS, *(f"difference {end}" for end in ENDS))


def write_prior_csv(path, name: str, scores: dict[str, dict[str, Cell]]):
    """Writes one row for each score and condition, in place of an older file with these columns."""
    with atomic(path) as file:
        read_csv(path, PRIOR_COLUMNS)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(PRIOR_COLUMNS)
        for key, cells in scores.items():
            for condition, cell in cells.items():
                # the fields of a difference that is not there stay empty
                gap = cell.difference or Interval(None)
                numbers = [cell.value, cell.low, cell.high, gap.value, gap.low, gap.high]
                writer.writerow([name, key, condition, *numbers])


def read_csv(path, columns) -> str:
    """The text of a CSV file, "" if it is absent. ValueError if it has other columns: then it is somebody else's."""
    check_writable(path)
    # nothing is to be read from a device
    if not Path(path).is_file():
        return ""
    text = read_text(path)
    try:
        header = next(csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline="")), list(columns))
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file ({error}): give another file") from None
    if header != list(columns):
        raise ValueError(f"{path} has the columns {shorten(header)}, not {', '.join(columns)}: give another file")
    return text


def check_distinct(outputs: list, inputs: list):
    """ValueError if a file to write is also read, or written twice: one would be lost. None stands for no file."""
    # pipes and devices keep nothing; --ids may be a list
    taken = {os.path.realpath(path) for path in inputs if path is not None and os.path.isfile(path)}
    for path in outputs:
        if path is None or (os.path.exists(path) and not os.path.isfile(path)):
            continue
        target = os.path.realpath(path)
        if target in taken:
            raise ValueError(f"{path} is given twice, once to be written: give another file")
        taken.add(target)


def check_replaceable(path, start: str, kind: str):
    """ValueError if a file holds something else than what we write there, which begins with `start`. Case is ignored.

    An empty file, such as mktemp makes, may be replaced.
    """
    check_writable(path)
    # nothing is to be read from a device
    if not Path(path).is_file():
        return
    with open(path, "rb") as file:
        begin = file.read(len(start))
    if begin and begin.lower() != start.lower().encode():
        raise ValueError(f"{path} is no {kind}, and would be replaced: give another file, or delete it")


def append_csv(path, row: dict):
    """Adds a row, with a header if the file is new. Errors as `read_csv`."""
    # read under the writer's lock, so that no row of another process is lost
    with atomic(path) as file:
        text = read_csv(path, row)
        file.write(text)
        if text and not text.endswith("\n"):
            file.write("\n")
        writer = csv.writer(file, lineterminator="\n")
        if not text:
            writer.writerow(row)
        writer.writerow(row.values())
