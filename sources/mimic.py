"""MIMIC-CXR as it is published: reports cut into sections, metadata, prior images, and the records made of them.

ROOT holds files/p10/p10000032/s50414267/DICOM_ID.jpg, the metadata and the split. Reports are cut as the official
preparation cuts them, section_parser.py and create_section_files.py in https://github.com/MIT-LCP/mimic-cxr (txt/).
"""

import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from data import FINDINGS_PROMPT
from plumbing.cli import progress
from plumbing.files import check_readable
from sources.records import SPLITS, decode, directory, one_line, only_one, plan, read_csv, writer

SECTIONS = ("findings", "impression")  # what a model learns to write
HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")

# Three rules name a section by its header. First: synonyms and misspellings.
HEADERS = {
    "impression": "conclusion|impresson|imprression|imoression|impressoin|imprssion|impresion|imperssion|mpression|"
    "impession|ndication",
    "findings": "finding|findins|findindgs|findgings|findngs|findnings|finidngs",
    "indication": "reason for examination|reason for exam|idication",
    "comparison": "reference exam|comparision|comparsion|comparrison|comparisions",
    "history": "clinical information|pfi",
    "examination": "exam|type of examination",
    "recommendations": "recommendation(s)|recommendation",
    "wet read": "wetread",
}
# Second: the first of these words that the header contains.
CONTAINS = ("impression", "findings", "history", "comparison", "indication", "technique", "addendum")
# Third: a header that describes the images opens the findings.
FINDINGS = re.compile(
    "chest|portable|(?:pa|ap) and lateral|lateral and (?:pa|ap)|frontal and|two views|frontal view|pa view|ap view|"
    "one view|lateral view|bone window|frontal upright|frontal semi-upright|ribs|pa and lat"
)

# section -> studies whose findings are in it
MISPLACED = {
    "examination": "59363654 53356173 50743547 59215320 55157853",
    "history": "51491012",
    "indication": "57936451 50058765 51966317 55124749 54365831 54654948",
    "note": "56451190",
    "recommendations": "50913680 59768032 59067458 59087630 58157373 56482935 58375018",
    "technique": "59279892 53202765 50808053",
}
# study -> the first and last characters of its findings in the report; the last eight studies have none
SPANS = {
    "50525523": (201, 349), "57564132": (233, 554), "59982525": (313, 717), "53488209": (149, 475),
    "54875119": (234, 988), "50196495": (59, 399), "56579911": (59, 218), "52648681": (292, 631),
    "59889364": (172, 453), "53514462": (73, 377), "59505494": (59, 450), "53182247": (59, 412),
    "51410602": (47, 320), "56412866": (522, 822), "54986978": (59, 306), "59003148": (262, 505),
    "57150433": (61, 394), "56760320": (219, 457), "59562049": (158, 348), "52674888": (145, 296),
    "55258338": (192, 568), "59330497": (140, 655), "52119491": (179, 454), "58235663": (0, 0),
    "50798377": (0, 0), "54168089": (0, 0), "53071062": (0, 0), "56724958": (0, 0),
    "54231141": (0, 0), "53607029": (0, 0), "52035334": (0, 0),
}  # fmt: skip


class Part(NamedTuple):
    """A section of a report."""

    name: str
    text: str


def section_name(header: str) -> str:
    """The section that a header opens. A header to which no rule applies is its own name."""
    header = header.lower().strip()
    names = [name for name, headers in HEADERS.items() if header in headers.split("|")]
    names += [name for name in CONTAINS if name in header]
    if FINDINGS.search(header):
        names.append("findings")
    return names[0] if names else header


def split_report(text: str) -> list[Part]:
    """Cut a report into its parts in order, as section_text in section_parser.py does.

    The first part is the preamble, or the full report if there is no header. A header right below an empty one counts
    as text, because the empty one has used up the line break between them.
    """
    # 1) cut at the headers
    headers = list(HEADER.finditer(text))
    parts = [Part("preamble", text[: headers[0].start(1)])] if headers else [Part("full report", text)]
    ends = [header.start() for header in headers[1:]] + [len(text)]
    for header, end in zip(headers, ends, strict=False):
        parts.append(Part(section_name(header[1]), text[header.end() : end]))

    # 2) drop empty findings and impressions
    parts = [part for part in parts if part.name not in SECTIONS or part.text.strip()]

    # 3) where neither is left, cut the last part at its first blank line
    last = parts[-1]
    if "\n \n" in last.text and not any(part.name in SECTIONS for part in parts):
        head, rest = last.text.split("\n \n", 1)
        parts[-1] = last._replace(text=head)
        parts.append(Part("last_paragraph", rest))
    return parts


def study_sections(study: str, text: str) -> dict[str, str]:
    """{name: stripped text} of a study's report. If a name occurs twice, the last section counts.

    The official preparation lists studies by their number whose findings are elsewhere. Those have findings only.
    """
    sections = {part.name: part.text.strip() for part in split_report(text)}
    places = [name for name, studies in MISPLACED.items() if study in studies.split()]
    if places:
        return {"findings": sections.get(places[0], "")}
    if study not in SPANS:
        return sections
    start, end = SPANS[study]
    return {"findings": text[start:end].strip()}


# studies with a rule of their own; the published table of sections (mimic_cxr_sectioned.csv) lacks them
EXCEPTIONS = {study for studies in MISPLACED.values() for study in studies.split()} | SPANS.keys()


class Image(NamedTuple):
    """A row of the metadata. Images sort by time, and the DICOM id breaks ties."""

    date: str  # YYYYMMDD, or "" if it is not readable
    time: float  # HHMMSS.fff as a number; a missing time is infinite, the latest of its day
    dicom: str
    subject: str = ""
    study: str = ""
    frontal: bool = True
    path: str = ""  # relative to ROOT, once the file has been found

    @property
    def study_path(self) -> str:
        return f"files/p{self.subject[:2]}/p{self.subject}/s{self.study}"

    @property
    def stem(self) -> str:
        return f"{self.study_path}/{self.dicom}"


def priors(images: list[Image]) -> list[tuple[Image, Image | None]]:
    """One patient's images in the order of time, each with its prior: the last image of the latest earlier date.

        image   a      b      c      d      e
        date    1 Jan  1 Jan  2 Jan  2 Jan  9 Mar
        prior   -      -      b      b      d

    An image without a date has no prior and is nobody's prior.
    """
    pairs, last, prior = [], None, None
    for image in sorted(images):
        if last and image.date != last.date:
            prior = last
        pairs.append((image, prior))
        last = image if image.date else None
    return pairs


DICOM_HINT = "DICOM images: a model that learnt from MIMIC-CXR-JPG needs --dicom-display jpg where they are read"


def on_disk(root: Path, stem: str) -> str:
    """The image file of a path without its suffix, both relative to ROOT; "" if it is missing or empty."""
    for path in (f"{stem}.jpg", f"{stem}.dcm"):
        file = root / path
        if file.exists() and file.stat().st_size > 0:
            return path
    return ""


REPORT_BYTES = 2**20  # the longest report that is read; most have one or two thousand
FRONTAL_CODES = ("antero-posterior", "postero-anterior")


class Mimic:
    """A folder of MIMIC-CXR. What is odd in it is counted in `skipped`, {reason: how often}."""

    def __init__(self, root, reports=None, exceptions: bool = False):
        """exceptions: read the reports of EXCEPTIONS, too."""
        self.root, self.skipped = directory(f"{root}/files").parent, Counter()
        self.exceptions = exceptions
        self.reports = directory(f"{reports or root}/files").parent
        self.images, self.splits = {}, {}  # by DICOM id

    def read_tables(self):
        """Reads the metadata and the split into memory. If a DICOM id occurs twice, the first row counts."""
        columns = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")
        file = only_one(self.root, "mimic-cxr-*-metadata.csv*")
        rows = read_csv(file, columns, self.skipped, optional=("ViewCodeSequence_CodeMeaning",))
        for dicom, subject, study, view, date, time, code in rows:
            # an id becomes part of a path, which must not lead out of ROOT
            if not (re.fullmatch(r"\w[\w.-]*", dicom) and subject.isdecimal() and study.isdecimal()):
                self.skipped["metadata rows without a readable dicom, subject or study id"] += 1
            elif dicom in self.images:
                self.skipped["metadata rows with the dicom id of an earlier row"] += 1
            else:
                # many images have no ViewPosition, but a code for it
                frontal = view in ("AP", "PA") or (not view and code.lower() in FRONTAL_CODES)
                date = date if re.fullmatch(r"\d{8}", date) else ""
                time = float(time) if re.fullmatch(r"\d+(\.\d*)?", time) else math.inf
                self.images[dicom] = Image(date, time, dicom, subject, study=study, frontal=frontal)
        rows = read_csv(only_one(self.root, "mimic-cxr-*-split.csv*"), ("dicom_id", "split"), self.skipped)
        for dicom, split in rows:
            self.splits.setdefault(dicom, split)

    def visits(self):
        """Yields (split, image, its prior of the same split or None, {section: text} of its report)."""
        # 1) the frontal images of each patient; only those on disk count, as priors too
        patients, show = defaultdict(list), progress("looking for images", "images")
        for number, image in enumerate(self.images.values(), 1):
            split = self.splits.get(image.dicom)
            if not image.frontal:
                self.skipped["images that are not frontal (view AP or PA, or its code)"] += 1
            elif split not in SPLITS:
                self.skipped[f"frontal images outside of {', '.join(SPLITS)}"] += 1
            elif path := on_disk(self.root, image.stem):
                patients[split, image.subject].append(image._replace(path=path))
                if path.endswith(".dcm"):
                    self.skipped[DICOM_HINT] += 1
            else:
                self.skipped["frontal images missing or empty on disk"] += 1
            show(number, len(self.images))

        # 2) each with its prior and its report; a study has several images and one report
        show = progress("reading reports", "patients")
        for number, (split, subject) in enumerate(sorted(patients), 1):
            reports = {}
            for image, prior in priors(patients[split, subject]):
                if image.study not in reports:
                    reports[image.study] = self.read_report(image)
                yield split, image, prior, reports[image.study]
            show(number, len(patients))

    def read_report(self, image: Image) -> dict[str, str]:
        """The sections of the report on an image's study; {} if the report is missing or left out."""
        if image.study in EXCEPTIONS:
            used = "used" if self.exceptions else "left out, as in the published table of sections; --exceptions"
            self.skipped[f"studies with a rule of their own ({used})"] += 1
            if not self.exceptions:
                return {}
        path = self.reports / f"{image.study_path}.txt"
        check_readable(path)
        try:
            with open(path, "rb") as file:
                data = file.read(REPORT_BYTES + 1)
        except FileNotFoundError:
            self.skipped["studies without a report"] += 1
            return {}
        if len(data) > REPORT_BYTES:
            self.skipped[f"studies whose report is longer than {REPORT_BYTES:,} bytes"] += 1
            return {}
        # the spans count every line end as one character
        text = decode(data).replace("\r\n", "\n").replace("\r", "\n")
        return study_sections(image.study, text)


PROMPTS = {"findings": FINDINGS_PROMPT, "impression": FINDINGS_PROMPT.replace("findings", "impression")}
# sections that the prompt repeats, in the order of the published figure (libra_architecture.png)
CONTEXT = ("indication", "history", "comparison", "technique")


def prompt(section: str, report: dict[str, str], sections=CONTEXT) -> str:
    """The published question for a section, "findings" or "impression", with the clinical context of a study.

    report: {name: text}; sections: the names that are repeated. Published examples show Indication and History; the
    wording of the other two is a guess after their pattern.
    """
    return with_context(PROMPTS[section], report, sections)


def with_context(question: str, report: dict[str, str], sections=CONTEXT) -> str:
    """A question, followed by those of some sections that a report has."""
    context = [f"{name.capitalize()}: {one_line(report[name])}" for name in sections if report.get(name, "").strip()]
    if context:
        context.insert(0, "Following clinical context:")
    return " ".join([question, *context])


def prepare_sections(root, out, reports=None, section="both", context=CONTEXT, no_context=False, exceptions=False):
    """Frontal images beside their priors -> records and questions whose answer is a section of the report.

    section: "findings", "impression" or "both"; context: the sections that a question repeats; exceptions: as in Mimic.
    """
    mimic, suffix = Mimic(root, reports, exceptions), "_no_context" if no_context else ""
    names = SECTIONS if section == "both" else (section,)
    outputs = plan(out, [name + suffix for name in names])
    if all(path.exists() for path in outputs):
        return outputs, {}, {}
    mimic.read_tables()
    with writer(outputs) as write:
        for split, image, prior, report in mimic.visits():
            for name in names:
                answer = one_line(report.get(name, ""))
                # a text without a letter, such as the "___" that replaces private data, says nothing
                if not any(map(str.isalpha, answer)):
                    mimic.skipped[f"images of a study without {name}"] += 1
                    continue
                images = [image.path, prior.path] if prior else [image.path]
                question = prompt(name, report, () if no_context else context)
                write(f"{name}{suffix}_{split}", image.dicom, images, question=question, answer=answer)
    return outputs, mimic.skipped, {}
