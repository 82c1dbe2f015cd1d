"""Record and question files: writing them, describing them in a table, and checking somebody's own.

A command plans its files first (`plan`) and never touches one that exists. A new file appears when it is complete, so
running a command again after an interruption makes exactly what is missing.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from data import ImageFolder, Question, Record, Records
from data import check as check_records
from plumbing.cli import print_table, progress
from plumbing.files import atomic
from tokenizer import IMAGE_TEXT

# which kinds of files are made from a split: training takes records, evaluation takes questions
SPLITS = {"train": ("records",), "validate": ("records", "questions"), "test": ("questions",)}


class Output(NamedTuple):
    """A file that a command makes."""

    name: str  # findings, impression, diff_vqa, …
    split: str
    kind: str  # "records" or "questions"
    path: Path


class Example(NamedTuple):
    """One line of the outputs that have its name and split. Its answer may be None in a question file."""

    name: str
    split: str
    id: str
    images: list[str]  # [current, prior] or [current]
    question: str
    answer: str | None

    def as_record(self) -> dict:
        human = {"from": "human", "value": f"{IMAGE_TEXT}\n{self.question}"}
        gpt = {"from": "gpt", "value": self.answer}
        return {"id": self.id, "image": self.images, "conversations": [human, gpt]}

    def as_question(self) -> dict:
        question = {"question_id": self.id, "image": self.images, "text": self.question}
        if self.answer is not None:
            question["reference"] = self.answer
        return question


def plan(out, names: Iterable[str], splits: dict[str, tuple[str, ...]] = SPLITS) -> list[Output]:
    """The files of a command: NAME_SPLIT.jsonl for records, NAME_SPLIT_questions.jsonl for questions."""
    outputs = []
    for split, kinds in splits.items():
        for name in names:
            for kind in kinds:
                ending = "_questions" if kind == "questions" else ""
                outputs.append(Output(name, split, kind, Path(out) / f"{name}_{split}{ending}.jsonl"))
    return outputs


def missing(outputs: list[Output], split: str | None = None) -> list[Output]:
    """The outputs that do not exist yet, of one split or of all."""
    return [output for output in outputs if split in (None, output.split) and not output.path.exists()]


def announce(outputs: list[Output]):
    """Say which of the planned files exist and will be kept."""
    existing = [output.path.name for output in outputs if output.path.exists()]
    if existing:
        print(f"keeping existing files: {', '.join(existing)} (delete a file to make it again)", file=sys.stderr)


@contextmanager
def writer(outputs: list[Output]) -> Iterator[Callable[[Example], None]]:
    """Yields write(example), which adds an example to the missing outputs that have its name and split.

    All files appear together at the end, unless an error occurs. An output without any example is not created.
    """
    todo, files = missing(outputs), {}
    with ExitStack() as stack:

        def write(example: Example):
            for output in todo:
                if (output.name, output.split) != (example.name, example.split):
                    continue
                # a file is opened for its first example
                if output not in files:
                    output.path.parent.mkdir(parents=True, exist_ok=True)
                    files[output] = stack.enter_context(atomic(output.path))
                line = example.as_record() if output.kind == "records" else example.as_question()
                files[output].write(json.dumps(line) + "\n")

        yield write


# ------------------------------------------------------------------------------------------------- tables


def kind_of(records: Records) -> type[Record] | type[Question]:
    return Question if "question_id" in records[0] else Record


def describe(records: Records) -> dict[str, object]:
    """One row of the final table, {column: cell}, for a file without errors.

    Patients and studies are recognised by MIMIC-CXR's folder names.
    """
    kind, show = kind_of(records), progress(f"counting {records.path.name}", "records")
    patients, studies, pairs = set(), set(), set()
    questions = answers = words = with_prior = 0
    for number, raw in enumerate(records, 1):
        # 1) whose images are these?
        record = kind.parse(raw)
        folders = re.match(r"files/(p\d+/p\d+)/s\d+/", record.images[0] if record.images else "")
        if folders:
            patients.add(folders[1])
            studies.add(folders[0])
        # a hash takes a tenth of the memory of two paths
        pairs.add(hash(tuple(record.images)))
        with_prior += len(record.images) == 2

        # 2) what is asked and answered about them?
        turns = record.turns if kind is Record else [(record.text, record.reference)]
        for _, answer in turns:
            questions += 1
            if answer is not None:
                answers += 1
                words += len(answer.split())
        show(number, len(records))
    return {
        "file": records.path.name,
        "patients": len(patients) or "-",
        "studies": len(studies) or "-",
        "records": len(records),
        "with prior": f"{with_prior:,} ({with_prior / len(records):.0%})",
        "questions per image pair": f"{questions / len(pairs):.1f}",
        "words per answer": f"{words / answers:.1f}" if answers else "-",
    }


def print_descriptions(files: Iterable[Records]):
    rows = [describe(records) for records in files]
    print_table([rows[0].keys(), *(row.values() for row in rows)])


def finish(outputs: list[Output], skipped: Counter, kinds: dict[str, Counter] | None = None):
    """Print the table of all planned files that exist, the kinds of questions, and what was left out.

    Raises ValueError if no file exists, because then nothing in the input could be used.
    """
    reasons = sorted(((count, reason) for reason, count in skipped.items() if count), reverse=True)
    existing = [output.path for output in outputs if output.path.exists()]
    if not existing:
        listed = "; ".join(f"{count} {reason}" for count, reason in reasons)
        raise ValueError(f"no record could be made: {listed or 'the input is empty'}")

    print_descriptions(map(Records, existing))
    for name, counts in (kinds or {}).items():
        if counts:
            print(f"\n{name}: " + ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))

    print("\nleft out or special in this run:" if reasons else "\nnothing was left out in this run")
    for count, reason in reasons:
        print(f"{count:>9}  {reason}")


def check(file, image_folder=None):
    """Check every record of a file, and that its images exist if their folder is given; then describe the file.

    Raises ValueError that lists the problems by line.
    """
    records = Records(file)
    if not len(records):
        raise ValueError(f"{records.path} holds no record")
    find = ImageFolder(image_folder, None).find if image_folder else lambda name: None
    show = progress(f"checking {records.path.name}", "records")
    checked = check_records(records, kind_of(records), find, show)
    print_descriptions([records])
    print(f"\nno problem in {len(records):,} records; {checked.duplicates:,} have the id of an earlier record")
