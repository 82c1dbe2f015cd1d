"""MIMIC-CXR as it is published: reports cut into sections, the image before an image, the tables of a folder.

ROOT holds files/p10/p10000032/s50414267/DICOM_ID.jpg, the metadata and the split. What is odd in it is counted in
`skipped`, {what: how often}.
"""

import csv
import gzip
import os
import re
import sqlite3
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from plumbing.cli import progress

# ----------------------------------------------------------------------------------- reports -> sections

SECTIONS = ("findings", "impression")  # what is to be written from the images
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


def read_study(reports: Path, subject, study, skipped: Counter) -> dict[str, str]:
    """The sections of a study's report; none where it is missing or empty. Line ends are translated, as published."""
    path = reports / folder_of(subject) / f"s{study}.txt"
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


# -------------------------------------------------------------------------------------- images and priors


class Frontal(NamedTuple):
    """A frontal image. date: YYYYMMDD or ""; time: a number that grows within the day, or None; path: under ROOT."""

    date: str
    time: float | None
    dicom: str
    study: str = ""
    path: str = ""


def order(image: Frontal):
    """The key that sorts images by time; a missing time is the latest of its day."""
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


def folder_of(subject: str) -> str:
    return f"files/p{subject[:2]}/p{subject}"


def stem_of(subject: str, study: str, dicom: str) -> str:
    return f"{folder_of(subject)}/s{study}/{dicom}"


def last_frontal(db, root: Path, study: str) -> tuple[str | None, str]:
    """(path, "") of a study's last frontal image on disk; (None, why) where there is none."""
    study = study.removeprefix("s").removesuffix(".0")
    rows = db.execute("SELECT frontal, date, time, dicom, subject FROM image WHERE study = ?", (study,)).fetchall()
    frontal = [
        Frontal(*row, study, stem_of(subject, study, row[-1])) for is_frontal, *row, subject in rows if is_frontal
    ]
    for image in sorted(frontal, key=order, reverse=True):
        path = on_disk(root, image.path)
        if path:
            return path, ""
    return None, "has no frontal image on disk" if frontal else "has no frontal image" if rows else "has no metadata"


# ------------------------------------------------------------------------------------------------- tables

METADATA = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")


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


def root_of(path) -> Path:
    """The folder, if it holds files/."""
    return directory(Path(path) / "files").parent


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
