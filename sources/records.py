"""What the data sets share: reading published files, writing record and question files, describing them.

A command keeps the planned files that exist, writes the others, and returns (outputs, skipped, kinds): the plan, what
is not in the files as {reason: how often}, and {column: {kind of question: how often}}.
"""

import csv
import gzip
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data import Question, Record, Records
from plumbing.files import atomic
from tokenizer import IMAGE_TEXT

# endings of the files that are made of a split: training reads records, evaluation reads questions
SPLITS = {"train": [""], "validate": ["", "_questions"], "test": ["_questions"]}


def directory(path) -> Path:
    """The path of a folder. Raises NotADirectoryError if there is none."""
    if not Path(path).is_dir():
        raise NotADirectoryError(f"no folder {path}: check the path")
    return Path(path)


def only_one(folder: Path, pattern: str) -> Path:
    """The only file in a folder that matches a pattern. Raises ValueError if there are none or several."""
    matches = sorted(folder.glob(pattern))
    if len(matches) != 1:
        names = ", ".join(path.name for path in matches) or "none"
        raise ValueError(f"{folder} must hold one {pattern}, found {names}: check the folder")
    return matches[0]


def require(columns, present, where):
    """Raises ValueError, which lists the columns that are present, if one is missing."""
    absent = ", ".join(column for column in columns if column not in present)
    if absent:
        raise ValueError(f"{where} has no column {absent}; it has {', '.join(map(str, present)) or 'none'}")


def read_csv(path: Path, columns, skipped: Counter):
    """Yields the columns of every row of a CSV file, plain or gzip. Raises ValueError if it lacks one or is damaged."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            reader = csv.reader(map(decode, file))
            # the first line names the columns, perhaps behind a byte order mark
            header = [name.strip().removeprefix("\ufeff") for name in next(reader, [])]
            require(columns, header, path)
            places = [header.index(name) for name in columns]
            for row in reader:
                if len(row) == len(header):
                    yield [row[place].strip() for place in places]
                else:
                    skipped[f"rows of {path.name} with too few or too many fields"] += 1
    except (EOFError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch it again") from None


def decode(data: bytes) -> str:
    """UTF-8 text, or else Latin-1."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def one_line(text: str) -> str:
    """Text on one line. Reports are wrapped at about 80 characters, so their line breaks mean nothing."""
    return " ".join(text.split())


def plan(out, names, splits=SPLITS) -> list[Path]:
    """The files NAME_SPLIT.jsonl and NAME_SPLIT_questions.jsonl. Says on stderr which of them exist."""
    outputs = []
    for split, endings in splits.items():
        for name in names:
            outputs += [Path(out) / f"{name}_{split}{ending}.jsonl" for ending in endings]
    existing = ", ".join(path.name for path in outputs if path.exists())
    if existing:
        print(f"kept, because they exist: {existing} (delete a file to make it again)", file=sys.stderr)
    return outputs


@contextmanager
def writer(outputs: list[Path]):
    """Yields write, which adds a line to the missing files of NAME_SPLIT.

    images: [current, prior] or [current]. answer: None for a question without a reference. The files appear together
    at the end; one without a line does not appear.
    """
    todo, files = {path.stem: path for path in outputs if not path.exists()}, {}
    with ExitStack() as stack:

        def add(stem: str, line: dict):
            if stem not in todo:
                return
            if stem not in files:
                todo[stem].parent.mkdir(parents=True, exist_ok=True)
                files[stem] = stack.enter_context(atomic(todo[stem]))
            files[stem].write(json.dumps(line) + "\n")

        def write(name_split, id, images, question, answer):
            human = {"from": "human", "value": f"{IMAGE_TEXT}\n{question}"}
            gpt = {"from": "gpt", "value": answer}
            add(name_split, {"id": id, "image": images, "conversations": [human, gpt]})
            reference = {} if answer is None else {"reference": answer}
            add(f"{name_split}_questions", {"question_id": id, "image": images, "text": question, **reference})

        yield write


def kind_of(records: Records) -> type[Record] | type[Question]:
    """What a file holds, by its first record that tells."""
    for number in range(len(records)):
        try:
            record = records[number]
        except ValueError:
            continue
        if "question_id" in record:
            return Question
        if "conversations" in record or "text" in record:
            return Record if "conversations" in record else Question
    return Record


def summary(records: Records, numbers: Sequence[int]) -> dict[str, object]:
    """{column: cell} of some records of a file, which are not odd. MIMIC-CXR's folders name patients and studies."""
    kind = kind_of(records)
    patients, studies, pairs, words = set(), set(), set(), []
    questions, with_prior = 0, 0
    for record in map(kind.parse, map(records.__getitem__, numbers)):
        # files/p10/p10000032/s50414267/…
        folders = re.match(r"files/(p\d+/p\d+)/s\d+/", "".join(record.images[:1]))
        if folders:
            patients.add(folders[1])
            studies.add(folders[0])
        # a hash takes a tenth of the memory of two paths
        pairs.add(hash(tuple(record.images)))
        with_prior += len(record.images) == 2
        # a question is a conversation of one turn, whose answer may be unknown
        turns = record.turns if kind is Record else [(record.text, record.reference)]
        questions += len(turns)
        words += [len(answer.split()) for _, answer in turns if answer is not None]
    return {
        "file": records.path.name,
        "patients": len(patients) or "-",
        "studies": len(studies) or "-",
        "records": len(numbers),
        "with prior": f"{with_prior:,} ({with_prior / len(numbers):.0%})",
        "questions per image pair": f"{questions / len(pairs):.1f}",
        "words per answer": f"{sum(words) / len(words):.1f}" if words else "-",
    }
