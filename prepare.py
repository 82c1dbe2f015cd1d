"""Raw data sets -> record and question files that training and evaluation read.

    python prepare.py mimic-cxr --root mimic-cxr-jpg/2.0.0 --reports mimic-cxr-reports --out data

A split comes out as NAME_SPLIT.jsonl (training records: train, validate) and NAME_SPLIT_questions.jsonl (validate,
test), one JSON object a line, so that files are written and read one record at a time; image paths are relative to
ROOT/files. A file appears when it is whole, and one that is there is kept: a rerun makes what is missing.
"""

import argparse
import sys

from cli import Parser, atomic, guard, progress

SECTIONS = ("findings", "impression")


def parse(arguments=None):
    parser = Parser(prog="prepare.py", description="Raw data sets -> record and question files.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name, text):
        settings = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
        return commands.add_parser(name, help=text, description=text, **settings).add_argument

    def folders(add):
        add("--root", required=True, metavar="DIR", help="MIMIC-CXR: the folder of files/ and the metadata")
        add("--out", required=True, metavar="DIR", help="where the record and question files go")

    add = command("phantom", "draw a small synthetic hospital, laid out as MIMIC-CXR is")
    add("--out", required=True, metavar="DIR", help="where the hospital is built")
    add("--patients", type=int, default=200, metavar="N", help="number of patients")
    add("--seed", type=int, default=0, metavar="S", help="seed of everything that is drawn")
    add("--size", type=int, default=128, metavar="PX", help="side of the images, pixels")
    add("--workers", type=int, metavar="N", help="processes; without it one per core")
    add("--dicom", action="store_true", help="write DICOM files, too")
    add("--preview", action="store_true", help="draw some patients over time in OUT/preview.png, too")

    add = command("mimic-cxr", "reports and metadata -> findings and impressions beside current and prior image")
    folders(add)
    add("--reports", metavar="DIR", help="the folder of files/pNN/pNNNNNNNN/sNNNNNNNN.txt; without it ROOT")
    add("--section", default="both", choices=(*SECTIONS, "both"), help="what is to be written from the images")

    add = command("diff-vqa", "MIMIC-Diff-VQA: questions about a study beside its reference study")
    folders(add)
    add("--questions", required=True, metavar="CSV", help="mimic_pair_questions.csv, plain or gzip")

    add = command("cxr-vqa", "MIMIC-Ext-MIMIC-CXR-VQA: questions about one image")
    folders(add)
    add("--questions", required=True, metavar="DIR", help="the folder of train.json, valid.json and test.json")

    add = command("rrg", "the published evaluation set (Hugging Face, an extra: pip install datasets)")
    add("--source", default="X-iZhang/MIMIC-CXR-RRG", metavar="ID_OR_DIR", help="hub id, or a folder of parquet files")
    add("--configuration", default="findings_section", choices=("findings_section", "impression_section"),
        help="what is to be written from the images")  # fmt: skip
    add("--split", default="test", metavar="NAME", help="split of the data set")
    add("--reference", metavar="COLUMN", help="column of the true text; without it the questions have no reference")
    add("--out", required=True, metavar="DIR", help="where the question file and images/ go")

    add = command("check", "check a JSON or JSONL file of your own, record by record")
    add("file", metavar="FILE", help="training records or questions, in the published format")
    add("--image-folder", metavar="DIR", help="where the images are; without it they are not looked for")

    # cache: every image once, as the encoder will see it, in one memory-mapped file
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the rest is imported, so that --help and mistakes answer at once
    ARGUMENTS = parse()

# ruff: noqa: E402
import csv
import gzip
import hashlib
import io
import json
import os
import re
import sqlite3
import zlib
from array import array
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import FINDINGS_PROMPT
from tokenizer import IMAGE_TEXT

PROMPTS = {"findings": FINDINGS_PROMPT, "impression": FINDINGS_PROMPT.replace("findings", "impression")}
CONTEXT = ("indication", "history")  # sections that the published prompt repeats, in this order
SPLITS = {"train": ("records",), "validate": ("records", "questions"), "test": ("questions",)}

# ----------------------------------------------------------------------------------- reports -> sections

HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
HEADERS = {  # header -> section, where neither the header itself nor the two rules below say so
    header: name
    for name, headers in {
        "impression": "conclusion|impresson|imprression|imoression|impressoin|imprssion|impresion|imperssion|mpression|"
        "impession|ndication",
        "findings": "finding|findins|findindgs|findgings|findngs|findnings|finidngs",
        "indication": "reason for examination|reason for exam|idication",
        "comparison": "reference exam|comparision|comparsion|comparrison|comparisions",
        "history": "clinical information|pfi",
        "examination": "exam|type of examination",
        "recommendations": "recommendation(s)|recommendation",
        "wet read": "wetread",
    }.items()
    for header in headers.split("|")
}
CONTAINS = ("impression", "findings", "history", "comparison", "indication", "technique", "addendum")
FINDINGS = re.compile(  # a header that describes the images opens the findings
    "chest|portable|(?:pa|ap) and lateral|lateral and (?:pa|ap)|frontal and|two views|frontal view|pa view|ap view|"
    "one view|lateral view|bone window|frontal upright|frontal semi-upright|ribs|pa and lat"
)
MISPLACED = {  # study -> the section that its findings stand in
    study: name
    for name, studies in {
        "examination": "59363654 53356173 50743547 59215320 55157853",
        "history": "51491012",
        "indication": "57936451 50058765 51966317 55124749 54365831 54654948",
        "note": "56451190",
        "recommendations": "50913680 59768032 59067458 59087630 58157373 56482935 58375018",
        "technique": "59279892 53202765 50808053",
    }.items()
    for study in studies.split()
}
SPANS = {  # study -> the characters of its report that are its findings; the last eight have none
    "50525523": (201, 349), "57564132": (233, 554), "59982525": (313, 717), "53488209": (149, 475),
    "54875119": (234, 988), "50196495": (59, 399), "56579911": (59, 218), "52648681": (292, 631),
    "59889364": (172, 453), "53514462": (73, 377), "59505494": (59, 450), "53182247": (59, 412),
    "51410602": (47, 320), "56412866": (522, 822), "54986978": (59, 306), "59003148": (262, 505),
    "57150433": (61, 394), "56760320": (219, 457), "59562049": (158, 348), "52674888": (145, 296),
    "55258338": (192, 568), "59330497": (140, 655), "52119491": (179, 454),
    "58235663": (0, 0), "50798377": (0, 0), "54168089": (0, 0), "53071062": (0, 0),
    "56724958": (0, 0), "54231141": (0, 0), "53607029": (0, 0), "52035334": (0, 0),
}  # fmt: skip


class Part(NamedTuple):
    """A section of a report: its name, where its text starts, its text as it stands there."""

    name: str
    start: int
    text: str


def section_name(header: str) -> str:
    """The section that a header opens, by the official preparation's rules; a header of no rule names itself."""
    header = header.lower().strip()
    if header in HEADERS:
        return HEADERS[header]
    contained = next((name for name in CONTAINS if name in header), None)
    return contained or ("findings" if FINDINGS.search(header) else header)


def split_report(text: str) -> list[Part]:
    """A report, line ends translated -> its parts in order, as the official MIMIC-CXR preparation cuts it.

    The first part is the preamble, or the full report where there is no header. A header right below an empty one is
    text (the upper one has used up the line break), empty findings and impressions are dropped, and where neither is
    left the last part is cut at its first blank line.
    """
    headers = list(HEADER.finditer(text))
    if not headers:
        parts = [Part("full report", 0, text)]
    else:
        ends = [header.start() for header in headers[1:]] + [len(text)]
        parts = [Part("preamble", 0, text[: headers[0].start(1)])]
        parts += [Part(section_name(h[1]), h.end(), text[h.end() : end]) for h, end in zip(headers, ends, strict=True)]
    parts = [part for part in parts if part.name not in SECTIONS or part.text.strip()]
    last = parts[-1]
    if "\n \n" in last.text and not any(part.name in SECTIONS for part in parts):
        head, rest = last.text.split("\n \n", 1)
        parts[-1:] = [last._replace(text=head), Part("last_paragraph", last.start + len(head), rest)]
    return parts


def sections(text: str) -> dict[str, str]:
    """The stripped text of each section of a report; the last of a name rules."""
    return {part.name: part.text.strip() for part in split_report(text)}


def study_sections(study: str, text: str) -> tuple[dict[str, str], str]:
    """A study's sections and, where the published preparation treats it by its number, the kind of exception.

    Such a study has findings alone: its other sections hold them again, under another name.
    """
    if study in SPANS:
        start, end = SPANS[study]
        return ({"findings": text[start:end].strip()}, "findings by span") if end else ({}, "no findings by span")
    if study in MISPLACED:
        found = sections(text).get(MISPLACED[study])
        return ({}, "misplaced findings not there") if found is None else ({"findings": found}, "misplaced findings")
    return sections(text), ""


def prompt(section: str, found: dict[str, str]) -> str:
    """The published question for a section, with the study's clinical context where its report has any."""
    context = [f"{name.capitalize()}: {line(found[name])}" for name in CONTEXT if line(found.get(name, ""))]
    return " ".join([PROMPTS[section], *(["Following clinical context:", *context] if context else [])])


def line(text: str) -> str:
    """Text on one line: reports are wrapped at some 80 characters, and their breaks mean nothing."""
    return " ".join(text.split())


# -------------------------------------------------------------------------------------- images and priors


class Frontal(NamedTuple):
    """A frontal image. date: YYYYMMDD or ""; time: a number that grows within the day, or None; path: under files/."""

    date: str
    time: float | None
    dicom: str
    study: str = ""
    path: str = ""


def order(image: Frontal):
    return image.date, image.time is None, image.time or 0.0, image.dicom


def priors(images) -> list[tuple[Frontal, Frontal | None]]:
    """One patient's images in the order of time, each with its prior: the last image of the latest earlier date.

    Images of one date share a prior. Ties are broken by time (a missing one is the latest), then by dicom id; an image
    without a date has no prior and is none.
    """
    pairs, last, prior = [], None, None
    for image in sorted(images, key=order):
        if last and image.date != last.date:
            prior = last
        pairs.append((image, prior))
        last = image if image.date else None
    return pairs


def on_disk(folder: Path, stem: str) -> str | None:
    """The image file of a path without its suffix, relative to the folder; None where it is missing or empty."""
    for suffix in (".jpg", ".dcm"):
        try:
            if os.stat(f"{folder}/{stem}{suffix}").st_size:
                return stem + suffix
        except FileNotFoundError:
            pass
    return None


def stem_of(subject: str, study: str, dicom: str) -> str:
    return f"p{subject[:2]}/p{subject}/s{study}/{dicom}"


METADATA = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")
DIFF_VQA = ("study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split")
CXR_VQA = ("subject_id", "study_id", "image_id", "image_path", "question", "semantic_type", "content_type", "answer")
RRG = ("main_image", "prior_image", "default_prompt")


@contextmanager
def index(root: Path, skipped: Counter):
    """The metadata and split files as tables `image` and `split` of a data base in a temporary file.

    Its memory is bounded, whatever the number of images; the file is gone when the process is.
    """
    db = sqlite3.connect("")
    try:
        db.execute("PRAGMA cache_size = -65536")  # KiB
        db.execute("CREATE TABLE image(dicom PRIMARY KEY, subject, study, frontal, date, time) WITHOUT ROWID")
        db.execute("CREATE TABLE split(dicom PRIMARY KEY, study, split) WITHOUT ROWID")
        rows = metadata(read_csv(only_one(root, "mimic-cxr-*-metadata.csv*"), METADATA, skipped), skipped)
        kept = db.executemany("INSERT OR IGNORE INTO image VALUES (?, ?, ?, ?, ?, ?)", rows).rowcount
        skipped["metadata rows with the dicom id of an earlier row"] += skipped.pop("rows", 0) - kept
        split = only_one(root, "mimic-cxr-*-split.csv*")
        rows = read_csv(split, ("dicom_id", "study_id", "split"), skipped)
        db.executemany("INSERT OR IGNORE INTO split VALUES (?, ?, ?)", rows)
        db.execute("CREATE INDEX by_study ON image(study)")
        yield db
    except sqlite3.Error as error:
        raise OSError(f"the temporary data base failed ({error}): free space, or set SQLITE_TMPDIR") from None
    finally:
        db.close()


def metadata(rows, skipped: Counter):
    """Rows of the metadata file -> rows of the image table."""
    for dicom, subject, study, view, date, time in rows:
        if not (re.fullmatch(r"\w[\w.-]*", dicom) and subject.isdecimal() and study.isdecimal()):
            skipped["metadata rows without a readable dicom, subject or study id"] += 1
            continue
        skipped["rows"] += 1
        try:
            time = float(time)
        except ValueError:
            time = None
        yield dicom, subject, study, view in ("AP", "PA"), date if re.fullmatch(r"\d{8}", date) else "", time


def only_one(folder: Path, pattern: str) -> Path:
    found = sorted(directory(folder).glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{folder} must hold one {pattern}, found {names}: check the folder")
    return found[0]


def directory(path) -> Path:
    if not Path(path).is_dir():
        raise NotADirectoryError(f"no folder {path}: check the path")
    return Path(path)


# ------------------------------------------------------------------------------------------------ reading


def read_csv(path: Path, columns, skipped: Counter):
    """The named columns of every row of a CSV file, plain or gzip. ValueError where one is missing, or it is cut."""
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            show, size = progress(f"reading {path.name}", "MB", 10**6), os.fstat(raw.fileno()).st_size
            reader = csv.reader(decode(data, skipped, f"lines of {path.name} in Latin-1") for data in file)
            header = [name.strip().removeprefix("\ufeff") for name in next(reader, [])]
            require(columns, header, path)
            places = [header.index(name) for name in columns]
            for number, row in enumerate(reader):
                if number % 4096 == 0:
                    show(raw.tell(), size)
                if len(row) != len(header):
                    skipped[f"rows of {path.name} with too few or too many fields"] += 1
                else:
                    yield [row[place].strip() for place in places]
            show(size, size)
    except (EOFError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch it again") from None


def require(columns, there, where):
    """ValueError that lists what was found where a column is missing."""
    absent = [column for column in columns if column not in there]
    if absent:
        raise ValueError(f"{where} has no column {', '.join(absent)}; it has {', '.join(map(str, there)) or 'none'}")


def decode(data: bytes, counts: Counter, reason: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        counts[reason] += 1
        return data.decode("latin-1")


def read_json(path: Path):
    """(line number, value) of each element of a JSON list, or of each line of JSONL; one at a time.

    ValueError with the line where it is not JSON.
    """
    show, size = progress(f"reading {path.name}", "MB", 10**6), path.stat().st_size
    try:
        with open(path, encoding="utf-8-sig") as file:
            first = next((text for text in iter(lambda: file.read(1), "") if not text.isspace()), "")
            file.seek(0)
            for place, (number, value) in enumerate((json_list if first == "[" else json_lines)(file)):
                if place % 1024 == 0:
                    show(file.buffer.tell(), size)
                yield number, value
            show(size, size)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}, {error.object[error.start]:#x}): convert it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {error.lineno} is not JSON: {error.msg}") from None


def json_lines(file):
    for number, text in enumerate(iter(file.readline, ""), 1):
        if text.strip():
            try:
                yield number, json.loads(text)
            except json.JSONDecodeError as error:
                error.lineno = number
                raise


def json_list(file, size: int = 1 << 20):
    """The elements of the list in a file, which is read `size` characters at a time."""
    decoder, space, after = json.JSONDecoder(), re.compile(r"\s*"), re.compile(r"\s*([,\]])")
    text = ""
    while "[" not in text:
        text += file.read(size)
    at = text.index("[") + 1  # the next element is looked for from here, in line `number`
    number, closing = 1 + text.count("\n", 0, at), "["
    while closing != "]":
        start = space.match(text, at).end()
        if closing == "[" and text.startswith("]", start):
            at = start + 1
            break
        try:
            value, end = decoder.raw_decode(text, start)
            found = after.match(text, end)  # an element is whole when what follows it is in view
            behind = space.match(text, end).end()
            problem = None if found else json.JSONDecodeError("expecting ',' or ']'", text, behind)
        except json.JSONDecodeError as error:
            problem = error
        if problem:
            more = file.read(max(size, len(text)))
            if not more:
                problem.lineno = number + text.count("\n", at, problem.pos)
                raise problem
            text, at = text[at:] + more, 0
            continue
        number += text.count("\n", at, start)
        yield number, value
        at, closing = found.end(), found[1]
        number += text.count("\n", start, at)
    rest = text[at:] + file.read(size)
    if rest.strip():
        error = json.JSONDecodeError("something follows the list", rest, space.match(rest).end())
        error.lineno += number - 1
        raise error


# ------------------------------------------------------------------------------------------------ writing


def plan(out, names, splits=SPLITS) -> dict[tuple[str, str, str], Path]:
    """(name, split, kind) -> the file that holds it."""
    ends = {"records": "", "questions": "_questions"}
    return {
        (name, split, kind): Path(out) / f"{name}_{split}{ends[kind]}.jsonl"
        for split, kinds in splits.items()
        for name in names
        for kind in kinds
    }


def missing(files, split=None):
    return {key: path for key, path in files.items() if not path.exists() and split in (None, key[1])}


@contextmanager
def writer(files):
    """write(name, split, id, images, text, answer or None) into those of the planned files that are not there yet.

    They appear when all is written; one without a record does not.
    """
    todo, opened = missing(files), {}
    with ExitStack() as stack:

        def write(name, split, number, images, text, answer):
            images = [image for image in images if image]
            for key, path in todo.items():
                if key[:2] != (name, split):
                    continue
                if key[2] == "records":
                    turns = ("human", f"{IMAGE_TEXT}\n{text}"), ("gpt", answer)
                    turns = [{"from": speaker, "value": value} for speaker, value in turns]
                    record = {"id": number, "image": images, "conversations": turns}
                else:
                    record = {"question_id": number, "image": images, "text": text, "reference": answer}
                    record = {name: value for name, value in record.items() if value is not None}
                if key not in opened:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    opened[key] = stack.enter_context(atomic(path))
                opened[key].write(json.dumps(record) + "\n")

        yield write


# ------------------------------------------------------------------------------------------------- tables

TABLE = ("file", "patients", "studies", "records", "with prior", "questions per image pair", "words per answer")


def describe(path: Path, found) -> tuple:
    """A row of TABLE for the records or questions found in a file; patients and studies by MIMIC-CXR's folders."""
    distinct = {name: array("q") for name in ("patient", "study", "pair")}  # hashes: 8 bytes a record
    records = questions = answers = words = with_prior = 0
    for record in found:
        turns = [turn["value"] for turn in record.get("conversations", [])]
        texts = turns[1::2] or [record[name] for name in REFERENCES if name in record][:1]
        images = images_of(record)
        folders = re.match(r"(?:files/)?(p\d+/p\d+)/(s\d+)/", images[0] if images else "")
        if folders:
            distinct["patient"].append(hash(folders[1]))
            distinct["study"].append(hash(folders[0]))
        distinct["pair"].append(hash(tuple(images)))
        with_prior += has_prior(images)
        records, questions, answers = records + 1, questions + (len(turns) // 2 or 1), answers + len(texts)
        words += sum(len(text.split()) for text in texts)
    patients, studies, pairs = (len(np.unique(np.asarray(hashes))) for hashes in distinct.values())
    share = f"{with_prior} ({with_prior / max(records, 1):.0%})"
    pace = f"{questions / max(pairs, 1):.1f}", f"{words / answers:.1f}" if answers else "-"
    return path.name, patients or "-", studies or "-", records, share, *pace


REFERENCES = ("reference", "findings", "impression")  # what a question file may call its true answers


def images_of(record) -> list[str]:
    images = record.get("image", [])
    return [images] if isinstance(images, str) else images


def has_prior(images) -> bool:
    """Whether there is a prior; the current image again is a dummy, as published."""
    return len(images) == 2 and images[0] != images[1]


def table(rows) -> str:
    """Rows of cells -> text in columns: the first is flush left, the others flush right."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])] for first, *rest in rows)
    return "\n".join(map("  ".join, aligned))


def announce(files):
    """Say which of the planned files are kept."""
    kept = [path.name for path in files.values() if path.exists()]
    if kept:
        print(f"kept, as they are there: {', '.join(kept)} (delete a file to make it again)", file=sys.stderr)


def finish(files, skipped: Counter, kinds: dict[str, Counter] | None = None):
    """Print the table of all planned files that exist and what was left out; ValueError where there is none at all."""
    rows = sorted((count, reason) for reason, count in skipped.items() if count)
    made = [path for path in files.values() if path.exists()]
    if not made:
        reasons = "; ".join(f"{count} {reason}" for count, reason in reversed(rows))
        raise ValueError(f"no record came of it: {reasons or 'the input is empty'}")
    print(table([TABLE, *(describe(path, (record for _, record in read_json(path))) for path in made)]))
    for name, counts in (kinds or {}).items():
        if counts:
            print(f"\n{name}: " + ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
    print("\nleft out or special in this run:" if rows else "\nnothing was left out in this run")
    print("".join(f"{count:>9}  {reason}\n" for count, reason in reversed(rows)), end="")


# ----------------------------------------------------------------------------------------------- commands


def make_phantom(arguments):
    import phantom

    show = progress("drawing", "patients")
    settings = {name: getattr(arguments, name) for name in ("seed", "size", "workers", "dicom")}
    phantom.write(arguments.out, arguments.patients, progress=show, **settings)
    if arguments.preview:
        with atomic(Path(arguments.out) / "preview.png", "wb") as file:
            phantom.preview(arguments.seed).save(file, "PNG")


def mimic_cxr(arguments):
    root, skipped = Path(arguments.root), Counter()
    images, reports = directory(root / "files"), directory(Path(arguments.reports or root) / "files")
    names = SECTIONS if arguments.section == "both" else (arguments.section,)
    files = plan(arguments.out, names)
    announce(files)
    if missing(files):
        with index(root, skipped) as db:
            count_oddities(db, skipped)
            for split in SPLITS:
                if missing(files, split):
                    with writer(files) as write:
                        for record in section_records(db, split, names, images, reports, skipped):
                            write(*record)
    finish(files, skipped)


def count_oddities(db, skipped: Counter):
    count = lambda query: db.execute(f"SELECT count(*) FROM {query}").fetchone()[0]
    skipped["images that are not frontal (view AP or PA)"] += count("image WHERE NOT frontal")
    without = "image LEFT JOIN split USING(dicom) WHERE frontal AND split IS NULL"
    skipped["frontal images without a split"] += count(without)
    known = ", ".join(f"'{name}'" for name in SPLITS)
    skipped["images of a split of another name"] += count(f"split WHERE split NOT IN ({known})")
    without = "(SELECT study FROM split EXCEPT SELECT study FROM image)"
    skipped["studies of the split file without metadata"] += count(without)
    several = "(SELECT 1 FROM image JOIN split USING(dicom) GROUP BY subject HAVING count(DISTINCT split) > 1)"
    skipped["patients in more than one split; their priors come from the same split"] += count(several)


def section_records(db, split, names, images: Path, reports: Path, skipped: Counter):
    """(section, split, dicom id, [image, prior or None], prompt, text) of a split, patient after patient."""
    query = "FROM image JOIN split USING(dicom) WHERE frontal AND split = ?"
    (total,) = db.execute(f"SELECT count(*) {query}", (split,)).fetchone()
    show, done = progress(split, "images"), 0
    rows = db.execute(f"SELECT subject, image.study, date, time, dicom {query} ORDER BY subject", (split,))
    for subject, group in groupby(rows, key=lambda row: row[0]):
        frontal, found = [], {}
        for _, study, date, time, dicom in group:
            path = on_disk(images, stem_of(subject, study, dicom))
            done += 1
            if path:
                frontal.append(Frontal(date, time, dicom, study, path))
            else:
                skipped["frontal images missing or empty on disk"] += 1
        for image, prior in priors(frontal):
            skipped["images without a readable date: no prior"] += not image.date
            if image.study not in found:
                found[image.study] = read_study(reports, subject, image.study, skipped)
            for name in names:
                text = line(found[image.study].get(name, ""))
                if any(map(str.isalpha, text)):
                    paths = image.path, prior and prior.path
                    yield name, split, image.dicom, paths, prompt(name, found[image.study]), text
                else:
                    skipped[f"images of a study without {name}"] += 1
        show(done, total)


def read_study(reports: Path, subject, study, skipped: Counter) -> dict[str, str]:
    """The sections of a study's report; none where it is missing or empty. Line ends are translated, as published."""
    path = reports / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"
    try:
        text = decode(path.read_bytes(), skipped, "reports in Latin-1")
    except FileNotFoundError:
        skipped["studies without a report"] += 1
        return {}
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    skipped["studies with an empty report"] += not text.strip()
    found, exception = study_sections(study, text)
    if exception:
        skipped[f"studies with an exception of the official preparation: {exception}"] += 1
    return found


def diff_vqa(arguments):
    files, skipped, kinds = plan(arguments.out, ["diff_vqa"]), Counter(), Counter()
    images = directory(Path(arguments.root) / "files")
    announce(files)
    if missing(files):
        with index(Path(arguments.root), skipped) as db, writer(files) as write:
            image_of = lru_cache(maxsize=4096)(lambda study: last_frontal(db, images, study))
            rows = read_csv(Path(arguments.questions), DIFF_VQA, skipped)
            for number, (main, _, reference, kind, question, answer, split) in enumerate(rows):
                split = {"val": "validate"}.get(split, split)
                (current, problem), (prior, prior_problem) = image_of(main), image_of(reference)
                if split not in SPLITS:
                    skipped["questions of a split of another name"] += 1
                elif not (question and answer):
                    skipped["questions without a question or an answer"] += 1
                elif problem or prior_problem:
                    which = "study" if problem else "reference study"
                    skipped[f"questions whose {which} {problem or prior_problem}"] += 1
                else:
                    kinds[kind] += 1
                    write("diff_vqa", split, f"diff_vqa_{number}", (current, prior), question, answer)
    finish(files, skipped, {"question_type": kinds})


def last_frontal(db, images: Path, study: str) -> tuple[str | None, str]:
    """(path, "") of a study's last frontal image on disk; (None, why) where there is none."""
    study = study.removeprefix("s").removesuffix(".0")
    rows = db.execute("SELECT frontal, date, time, dicom, subject FROM image WHERE study = ?", (study,)).fetchall()
    frontal = [
        Frontal(*row, study, stem_of(subject, study, row[-1])) for is_frontal, *row, subject in rows if is_frontal
    ]
    for image in sorted(frontal, key=order, reverse=True):
        path = on_disk(images, image.path)
        if path:
            return path, ""
    return None, "has no frontal image on disk" if frontal else "has no frontal image" if rows else "has no metadata"


def cxr_vqa(arguments):
    files, skipped = plan(arguments.out, ["cxr_vqa"]), Counter()
    kinds = {"semantic_type": Counter(), "content_type": Counter()}
    images, folder = directory(Path(arguments.root) / "files"), directory(arguments.questions)
    announce(files)
    for split, name in {"train": "*train.json", "validate": "*valid.json", "test": "*test.json"}.items():
        if not any(folder.glob(name)):
            skipped[f"file {name}, which is not there"] += 1
        elif missing(files, split):
            file = only_one(folder, name)
            with writer(files) as write:
                for place, (number, row) in enumerate(read_json(file)):
                    require(CXR_VQA, row if isinstance(row, dict) else [], f"{file} line {number}")
                    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
                    answer = line(", ".join(map(str, answers)))
                    stem = re.search(r"p\d\d/p\d+/s\d+/[\w-]+(?=\.\w+$|$)", str(row["image_path"]))
                    path = stem and on_disk(images, stem[0])
                    if not answer:
                        skipped["questions with an empty answer"] += 1
                    elif not path:
                        skipped["questions whose image is missing on disk"] += 1
                    else:
                        for kind, counts in kinds.items():
                            counts[str(row[kind])] += 1
                        write("cxr_vqa", split, f"cxr_vqa_{split}_{place}", [path], line(str(row["question"])), answer)
    finish(files, skipped, kinds)


def rrg(arguments):
    name, split, reference = arguments.configuration, arguments.split, arguments.reference
    out, skipped = Path(arguments.out), Counter()
    files = plan(out, [name], {split: ("questions",)})
    announce(files)
    if missing(files):
        rows, total = published_rows(arguments.source, name, split, [reference] if reference else [])
        show = progress(f"{name} {split}", "studies")
        with writer(files) as write:
            for place, row in enumerate(rows):
                try:
                    main, prior = (save_image(out, row[column], arguments.source) for column in RRG[:2])
                except (OSError, Image.DecompressionBombError):
                    main = prior = None
                if main:
                    pair = main, prior if prior != main else None  # the current image again is a dummy
                    answer = line(row[reference] or "") if reference else None
                    write(name, split, f"{name}_{split}_{place}", pair, row["default_prompt"], answer)
                else:
                    skipped["rows whose image is missing or cannot be read"] += 1
                show(place + 1, max(total, place + 1))
    finish(files, skipped)


def published_rows(source: str, configuration: str, split: str, more) -> tuple:
    """(rows as dicts with undecoded images, their number or 0) of a data set on the hub or in parquet files."""
    try:
        import datasets
        from pyarrow import parquet
    except ImportError:
        raise ValueError("this data set is read through another package: pip install datasets") from None
    if Path(source).is_dir():
        places = Path(source, configuration), Path(source)
        found = next(filter(None, (sorted(place.glob(f"{split}*.parquet")) for place in places)), None)
        if not found:
            raise ValueError(f"no {split}*.parquet in {places[1]} or {places[0]}: check --source and --split")
        rows = datasets.load_dataset("parquet", data_files=list(map(str, found)), split="train", streaming=True)
        total = sum(parquet.read_metadata(path).num_rows for path in found)
    else:
        rows = datasets.load_dataset(source, configuration, split=split, streaming=True)
        total = rows.info.splits[split].num_examples if split in (rows.info.splits or {}) else 0
    require([*RRG, *more], rows.column_names or next(iter(rows)), source)
    for column in RRG[:2]:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows, total


def save_image(out: Path, image: dict | None, source: str) -> str | None:
    """{"bytes", "path"} -> images/HASH.jpg under `out`, written once; OSError where it is missing or no image."""
    if image is None:
        return None
    data = image["bytes"] or Path(source, image["path"]).read_bytes()
    kind = Image.open(io.BytesIO(data)).format.lower()
    path = f"images/{hashlib.sha256(data).hexdigest()[:32]}.{'jpg' if kind == 'jpeg' else kind}"
    if not (out / path).exists():
        (out / "images").mkdir(parents=True, exist_ok=True)
        with atomic(out / path, "wb") as file:
            file.write(data)
    return path


def check(arguments):
    path, counts = Path(arguments.file), Counter()
    folder = arguments.image_folder and directory(arguments.image_folder)
    row = describe(path, sound_records(path, folder, counts))
    if not counts["records"]:
        raise ValueError(f"{path} is empty: it has no record")
    if counts["faults"]:
        above = "above" if counts["faults"] <= SHOWN else f"the first {SHOWN} above"
        raise ValueError(f"{path}: {counts['faults']} faults in {counts['records']} records, {above}")
    print(table([TABLE, row]))
    repeated = f"; {counts['repeated']} ids are those of earlier records" if counts["repeated"] else ""
    print(f"\n{counts['records']} records, no fault{repeated}")


SHOWN = 50  # faults that are printed


def sound_records(path: Path, folder: Path | None, counts: Counter):
    """The records of a file that have no fault; prints the faults of the others."""
    seen = set()  # of hashes: some 70 bytes a record
    for number, record in read_json(path):
        found = faults(record, folder)
        if not found:
            name = hash(str(record.get("id", record.get("question_id"))))
            counts["repeated"] += name in seen
            if name in seen and "question_id" in record:
                found = ["question_id stands in an earlier record, too"]
            seen.add(name)
        counts["records"] += 1
        counts["faults"] += len(found)
        if counts["faults"] <= SHOWN:
            print("".join(f"line {number}: {fault}\n" for fault in found), end="")
        if not found:
            yield record


def faults(record, folder: Path | None) -> list[str]:
    """What is wrong with a training record or a question of the published format; images are looked for in a folder."""
    if not isinstance(record, dict):
        return ["not an object"]
    strings = lambda values: isinstance(values, list) and all(isinstance(value, str) for value in values)
    named = lambda name: isinstance(record.get(name), str | int) or found.append(f"{name} must be a text or a number")
    found, images = [], images_of(record)
    if not strings(images) or len(images) > 2:
        found.append("image must be a path, or a list of the current and, if any, the prior image's path")
        images = None
    for image in images or []:
        path = PurePosixPath(image)
        if path.is_absolute() or ".." in path.parts:
            found.append(f"image {image} leaves the image folder: give a path inside it")
        elif folder and not re.match("https?://", image) and not (folder / path).is_file():
            found.append(f"image {image} is not in {folder}")
    if "conversations" in record:
        named("id")
        turns = record["conversations"]
        turns = turns if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns) else []
        speakers, values = [turn.get("from") for turn in turns], [turn.get("value") for turn in turns]
        if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
            found.append('conversations must be a list of {"from", "value"} by human and gpt in turn, gpt last')
        elif not strings(values) or not all(map(str.strip, values)):
            found.append("every value of conversations must be a text that is not empty")
        elif images is not None and (places := "".join(values).count(IMAGE_TEXT)) != bool(images):
            found.append(
                f"{IMAGE_TEXT} stands {places} times beside {len(images)} images: once is for images, 0 without"
            )
    elif "question_id" in record:
        named("question_id")
        if not isinstance(record.get("text"), str) or not record["text"].strip():
            found.append("text must be the question")
        found += [f"{name} must be a text" for name in REFERENCES if not isinstance(record.get(name, ""), str)]
    else:
        found.append("neither conversations (a training record) nor question_id (a question)")
    return found


COMMANDS = {
    "phantom": make_phantom,
    "mimic-cxr": mimic_cxr,
    "diff-vqa": diff_vqa,
    "cxr-vqa": cxr_vqa,
    "rrg": rrg,
    "check": check,
}


def main(arguments) -> int:
    return guard("prepare.py", COMMANDS[arguments.command], arguments)


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
