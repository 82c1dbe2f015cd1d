"""MIMIC-CXR as it is published: reports cut into sections, prior images, metadata, and the records made of them.

ROOT holds files/p10/p10000032/s50414267/DICOM_ID.jpg, the metadata and the split. Reports are cut as the official
preparation cuts them: section_parser.py and create_section_files.py in https://github.com/MIT-LCP/mimic-cxr (txt/).
"""

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data import FINDINGS_PROMPT
from plumbing.cli import progress
from sources.inputs import decode, directory, one_line, only_one, read_csv
from sources.outputs import SPLITS, Example, announce, finish, missing, plan, writer

# ----------------------------------------------------------------------------------- reports -> sections

SECTIONS = ("findings", "impression")  # what a model learns to write
HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")

# The three rules that name a section by its header, in this order. First: a known header, misspelt ones included.
HEADERS = {
    **dict.fromkeys(
        "conclusion|impresson|imprression|imoression|impressoin|imprssion|impresion|imperssion|mpression|impession|"
        "ndication".split("|"), "impression"),
    **dict.fromkeys("finding|findins|findindgs|findgings|findngs|findnings|finidngs".split("|"), "findings"),
    **dict.fromkeys("reason for examination|reason for exam|idication".split("|"), "indication"),
    **dict.fromkeys("reference exam|comparision|comparsion|comparrison|comparisions".split("|"), "comparison"),
    **dict.fromkeys("clinical information|pfi".split("|"), "history"),
    **dict.fromkeys("exam|type of examination".split("|"), "examination"),
    **dict.fromkeys("recommendation(s)|recommendation".split("|"), "recommendations"),
    "wetread": "wet read",
}  # fmt: skip
# Second: the first of these words that the header contains.
CONTAINS = ("impression", "findings", "history", "comparison", "indication", "technique", "addendum")
# Third: a header that describes the images opens the findings.
FINDINGS = re.compile(
    "chest|portable|(?:pa|ap) and lateral|lateral and (?:pa|ap)|frontal and|two views|frontal view|pa view|ap view|"
    "one view|lateral view|bone window|frontal upright|frontal semi-upright|ribs|pa and lat"
)

# The findings of these studies are in another section.
MISPLACED = {
    **dict.fromkeys("59363654 53356173 50743547 59215320 55157853".split(), "examination"),
    "51491012": "history",
    **dict.fromkeys("57936451 50058765 51966317 55124749 54365831 54654948".split(), "indication"),
    "56451190": "note",
    **dict.fromkeys("50913680 59768032 59067458 59087630 58157373 56482935 58375018".split(), "recommendations"),
    **dict.fromkeys("59279892 53202765 50808053".split(), "technique"),
}
# The findings of these studies are the characters START to END of the report; the last eight have none.
SPANS = {
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
    """A section of a report: its name, the place of its first character in the report, its unstripped text."""

    name: str
    start: int
    text: str


class StudySections(NamedTuple):
    """{name: text} of a study. exception: why the official preparation treats this study by its number, or ""."""

    sections: dict[str, str]
    exception: str = ""


def section_name(header: str) -> str:
    """The section that a header opens. A header to which no rule applies is its own name."""
    header = header.lower().strip()
    if header in HEADERS:
        return HEADERS[header]
    for word in CONTAINS:
        if word in header:
            return word
    return "findings" if FINDINGS.search(header) else header


def split_report(text: str) -> list[Part]:
    r"""Cut a report, with line ends \n, into its parts in order. Source: section_text in section_parser.py.

    The first part is the preamble, or the full report if there is no header. A header directly below an empty one
    counts as text, because the empty header has used up the line break between them.
    """
    # 1) from each header to the next
    headers = list(HEADER.finditer(text))
    if headers:
        parts = [Part("preamble", 0, text[: headers[0].start(1)])]
        ends = [header.start() for header in headers[1:]] + [len(text)]
        for header, end in zip(headers, ends, strict=True):
            parts.append(Part(section_name(header[1]), header.end(), text[header.end() : end]))
    else:
        parts = [Part("full report", 0, text)]

    # 2) drop empty findings and impressions
    parts = [part for part in parts if part.name not in SECTIONS or part.text.strip()]

    # 3) if neither is left, what follows the first blank line of the last part may be the findings
    last = parts[-1]
    if "\n \n" in last.text and not any(part.name in SECTIONS for part in parts):
        head, rest = last.text.split("\n \n", 1)
        parts[-1:] = [last._replace(text=head), Part("last_paragraph", last.start + len(head), rest)]
    return parts


def sections(text: str) -> dict[str, str]:
    """The stripped text of each section of a report. If a name occurs twice, the last one counts."""
    return {part.name: part.text.strip() for part in split_report(text)}


def study_sections(study: str, text: str) -> StudySections:
    """The sections of a study's report, after the exceptions of the official preparation (create_section_files.py).

    A study with an exception has findings only, since its other sections may hold the same text under another name.
    """
    if study in SPANS:
        start, end = SPANS[study]
        if end == 0:
            return StudySections({}, "no findings by span")
        return StudySections({"findings": text[start:end].strip()}, "findings by span")
    if study in MISPLACED:
        findings = sections(text).get(MISPLACED[study])
        if findings is None:
            return StudySections({}, "misplaced findings not there")
        return StudySections({"findings": findings}, "misplaced findings")
    return StudySections(sections(text))


# ------------------------------------------------------------------------------------- metadata and files


class Image(NamedTuple):
    """A row of the metadata file."""

    dicom: str
    subject: str
    study: str
    frontal: bool  # view AP or PA
    date: str  # YYYYMMDD, or "" if it is not readable
    time: float | None  # HHMMSS.fff as a number, which grows within a day
    path: str = ""  # of its file under ROOT, once the file has been found

    @property
    def study_path(self) -> str:
        return f"files/p{self.subject[:2]}/p{self.subject}/s{self.study}"

    @property
    def stem(self) -> str:
        """Its path under ROOT without a suffix."""
        return f"{self.study_path}/{self.dicom}"


class Split(NamedTuple):
    """A row of the split file."""

    study: str
    name: str


class Tables(NamedTuple):
    """The two tables of MIMIC-CXR, each by DICOM id."""

    images: dict[str, Image]
    splits: dict[str, Split]


METADATA = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")


def read_tables(root: Path, skipped: Counter) -> Tables:
    """Read the metadata and the split. If a DICOM id occurs twice, the first row counts."""
    images, splits = {}, {}
    rows = read_csv(only_one(root, "mimic-cxr-*-metadata.csv*"), METADATA, skipped)
    for dicom, subject, study, view, date, time in rows:
        # ids become paths, so that they must not lead out of ROOT
        if not (re.fullmatch(r"\w[\w.-]*", dicom) and subject.isdecimal() and study.isdecimal()):
            skipped["metadata rows without a readable dicom, subject or study id"] += 1
        elif dicom in images:
            skipped["metadata rows with the dicom id of an earlier row"] += 1
        else:
            when = {"date": date if re.fullmatch(r"\d{8}", date) else "", "time": _number(time)}
            images[dicom] = Image(dicom, subject, study, view in ("AP", "PA"), **when)

    columns = ("dicom_id", "study_id", "split")
    for dicom, study, split in read_csv(only_one(root, "mimic-cxr-*-split.csv*"), columns, skipped):
        splits.setdefault(dicom, Split(study, split))
    return Tables(images, splits)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def count_oddities(tables: Tables, skipped: Counter):
    """Count what is unusual in the tables as a whole."""
    images, splits = tables
    frontal = [image for image in images.values() if image.frontal]
    skipped["images that are not frontal (view AP or PA)"] += len(images) - len(frontal)
    skipped["frontal images without a split"] += sum(image.dicom not in splits for image in frontal)
    skipped["images of a split of another name"] += sum(split.name not in SPLITS for split in splits.values())

    with_metadata = {image.study for image in images.values()}
    without = {split.study for split in splits.values()} - with_metadata
    skipped["studies of the split file without metadata"] += len(without)

    splits_of = defaultdict(set)
    for dicom in images.keys() & splits.keys():
        splits_of[images[dicom].subject].add(splits[dicom].name)
    several = sum(len(names) > 1 for names in splits_of.values())
    skipped["patients in more than one split; their priors come from the same split"] += several


def root_of(path) -> Path:
    """The folder, if it holds files/. Raises NotADirectoryError."""
    return directory(Path(path) / "files").parent


def on_disk(root: Path, stem: str) -> str | None:
    """The image file of a path without its suffix, relative to ROOT; None if it is missing or empty."""
    for suffix in (".jpg", ".dcm"):
        try:
            if os.stat(f"{root}/{stem}{suffix}").st_size:
                return stem + suffix
        except FileNotFoundError:
            pass
    return None


def read_study(reports: Path, image: Image, skipped: Counter) -> dict[str, str]:
    """The sections of the report on an image's study; {} if the report is missing or empty."""
    try:
        data = (reports / f"{image.study_path}.txt").read_bytes()
    except FileNotFoundError:
        skipped["studies without a report"] += 1
        return {}
    text = decode(data, skipped, "reports in Latin-1")
    # the official preparation reads text files, so its spans count every line end as one character
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        skipped["studies with an empty report"] += 1
    study = study_sections(image.study, text)
    if study.exception:
        skipped[f"studies with an exception of the official preparation: {study.exception}"] += 1
    return study.sections


# ------------------------------------------------------------------------------------------------- priors


def time_key(image: Image):
    """The key that sorts images by time. A missing time is the latest of its day; the DICOM id breaks ties."""
    return image.date, image.time is None, image.time or 0.0, image.dicom


def priors(images: list[Image]) -> list[tuple[Image, Image | None]]:
    """One patient's images in the order of time, each with its prior: the last image of the latest earlier date.

        date    Jan 1   Jan 1   Jan 2   Jan 2   Mar 1
        image   a       b       c       d       e
        prior   -       -       b       b       d

    An image without a date has no prior and is nobody's prior.
    """
    pairs, last, prior = [], None, None
    for image in sorted(images, key=time_key):
        if last and image.date != last.date:
            prior = last
        pairs.append((image, prior))
        last = image if image.date else None
    return pairs


# ------------------------------------------------------------------------------------------- the command

PROMPTS = {"findings": FINDINGS_PROMPT, "impression": FINDINGS_PROMPT.replace("findings", "impression")}
CONTEXT = ("indication", "history")  # sections that the published prompt repeats, in this order


def prompt(section: str, report: dict[str, str]) -> str:
    """The published question for a section, with the clinical context from the study's own report, if it has any."""
    words = [PROMPTS[section]]
    for name in CONTEXT:
        text = one_line(report.get(name, ""))
        if text:
            words.append(f"{name.capitalize()}: {text}")
    if len(words) > 1:
        words.insert(1, "Following clinical context:")
    return " ".join(words)


def patients(tables: Tables, split: str, root: Path, skipped: Counter) -> Iterator[list[Image]]:
    """Yields the frontal images of a split that are on disk, patient after patient."""
    by_subject = defaultdict(list)
    for image in tables.images.values():
        row = tables.splits.get(image.dicom)
        if image.frontal and row and row.name == split:
            by_subject[image.subject].append(image)

    total, done, show = sum(map(len, by_subject.values())), 0, progress(split, "images")
    for subject in sorted(by_subject):
        files = []
        for image in by_subject[subject]:
            path = on_disk(root, image.stem)
            if path:
                files.append(image._replace(path=path))
            else:
                skipped["frontal images missing or empty on disk"] += 1
        yield files
        done += len(by_subject[subject])
        show(done, total)


def prepare_sections(root, out, reports=None, section: str = "both", no_context: bool = False):
    """MIMIC-CXR -> records and questions whose answer is the findings or the impression of a frontal image's report.

    reports: the folder of the reports, if it is not ROOT. no_context: ask without the clinical context, in files of
    another name.
    """
    root, reports, skipped = root_of(root), root_of(reports or root), Counter()
    names = SECTIONS if section == "both" else (section,)
    suffix = "_no_context" if no_context else ""
    outputs = plan(out, [name + suffix for name in names])
    announce(outputs)
    if missing(outputs):
        tables = read_tables(root, skipped)
        count_oddities(tables, skipped)
        # split by split, so that an interrupted run keeps the splits that it has finished
        for split in SPLITS:
            if missing(outputs, split):
                with writer(outputs) as write:
                    for images in patients(tables, split, root, skipped):
                        for name, image, prior, report in with_reports(images, names, reports, skipped):
                            question = PROMPTS[name] if no_context else prompt(name, report)
                            paths = [image.path, prior.path] if prior else [image.path]
                            answer = one_line(report[name])
                            write(Example(name + suffix, split, image.dicom, paths, question=question, answer=answer))
    finish(outputs, skipped)


def with_reports(images: list[Image], names, reports: Path, skipped: Counter):
    """Yields (section, image, its prior or None, {section: text}) for each section that a patient's reports have."""
    read = {}  # a study has several images and one report
    for image, prior in priors(images):
        if not image.date:
            skipped["images without a readable date: no prior"] += 1
        if image.study not in read:
            read[image.study] = read_study(reports, image, skipped)
        report = read[image.study]
        for name in names:
            # "___" alone is what de-identification leaves of a text
            if any(map(str.isalpha, report.get(name, ""))):
                yield name, image, prior, report
            else:
                skipped[f"images of a study without {name}"] += 1
