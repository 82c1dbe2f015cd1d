"""A small hospital that can be drawn: chest X-ray phantoms over time, their reports, and questions about them.

Everything is a pure function of (seed, patient), so that any number of workers gives the same bytes: a patient has an
anatomy and a history of hidden states; a state has an image and a text. `write` lays them out as MIMIC-CXR is.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import shutil
import textwrap
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from phantom.radiograph import Acquisition, Anatomy, Finding, expose, font, frontal, lateral
from plumbing.cli import parallel
from plumbing.files import atomic

# ------------------------------------------------------------------------------------- patients and their histories


@dataclass(frozen=True)
class State:
    """The hidden state of one study, and the change of everything in it to the study before."""

    seed: int
    patient: int
    number: int  # 0: the patient's first
    subject_id: int
    study_id: int
    prior_study_id: int | None
    dicom_id: str  # the frontal image
    lateral_id: str | None
    view: str  # "AP" or "PA"
    date: date
    time: str  # hhmmss.mmm
    split: str
    present: dict[str, Finding]
    changes: dict[str, str]  # empty without a prior
    gone: dict[str, Finding]  # what has resolved or been removed, as it was

    def generator(self, purpose: str) -> np.random.Generator:
        return generator(self.seed, self.patient, self.number, purpose)

    @property
    def anatomy(self) -> Anatomy:
        return anatomy(self.seed, self.patient)


# name -> (sides, places); what is named in reports and drawn
FINDINGS = {
    "consolidation": (("right", "left"), ("upper lobe", "lower lobe")),
    "atelectasis": (("right", "left", "bilateral"), ("base",)),
    "edema": (("bilateral",), ("perihilar",)),
    "nodule": (("right", "left"), ("upper lung", "mid lung", "lower lung")),
    "pleural effusion": (("right", "left", "bilateral"), ("base",)),
    "pneumothorax": (("right", "left"), ("apex",)),
    "cardiomegaly": ((None,), (None,)),
}
DEVICES = {
    "endotracheal tube": ((None,), ("trachea",)),
    "central line": (("right", "right", "left"), ("superior vena cava",)),
    "pacemaker": (("left", "left", "right"), ("chest wall",)),
}
LEAST, STEP = 0.15, (0.20, 0.35)  # the smallest severity, and by how much it moves between two studies
LEVELS = (0.43, 0.72)  # from here moderate, from here large: too coarse to tell a change
SPLITS = ("train",) * 8 + ("validate", "test")  # of every ten patients

PURPOSES = (
    "anatomy", "history", "study", "AP", "PA", "LATERAL", "frontal noise", "lateral noise", "report", "pair questions",
    "image questions",
)  # fmt: skip


def generator(seed: int, patient: int, number: int, purpose: str) -> np.random.Generator:
    """The draws of one purpose for one study of one patient (number 0 where they are the patient's)."""
    key = [seed, patient, number, 1 + PURPOSES.index(purpose)]  # numpy takes no notice of a trailing 0
    return np.random.default_rng(key)


def subject_id(seed: int, patient: int) -> int:
    """10000032 and so on: a multiplier without a factor of 2 or 5 keeps the first 10 million patients apart."""
    return 10_000_000 + (32 + 7919 * seed + 6_180_339 * patient) % 10_000_000


def history(seed: int, patient: int) -> list[State]:
    """A patient's studies, first to last."""
    rng = generator(seed, patient, 0, "history")
    count = 1 + rng.choice(6, p=(0.20, 0.24, 0.22, 0.16, 0.10, 0.08))  # 2.96 on average: a third have no prior
    findings = rng.permutation(list(FINDINGS))[: rng.choice(4, p=(0.06, 0.40, 0.38, 0.16))].tolist()
    devices = rng.permutation(list(DEVICES))[: rng.choice(3, p=(0.50, 0.36, 0.14))].tolist()
    course = {name: _course(rng, name, count) for name in findings + devices}
    if {"pneumothorax", "pleural effusion"} <= course.keys():  # air above fluid would need a level of its own
        other = "left" if course["pneumothorax"][0].side == "right" else "right"
        course["pleural effusion"] = [Finding(other, f.place, f.severity) for f in course["pleural effusion"]]

    day, states = date(2110, 1, 1) + timedelta(int(rng.integers(0, 30000))), []
    for number in range(count):
        rng = generator(seed, patient, number, "study")
        was = states[-1].present if states else {}
        present = {name: steps[number] for name, steps in course.items() if steps[number].severity}
        gone = {name: finding for name, finding in was.items() if name not in present}
        changes = {name: _change(name, was.get(name), present.get(name)) for name in (*present, *gone) if number}
        ids = [_dicom_id(seed, patient, number, kind) for kind in ("frontal", "lateral")]
        view = "AP" if "endotracheal tube" in present or rng.random() < 0.4 else "PA"
        states.append(
            State(
                seed, patient, number, subject_id(seed, patient),
                study_id=50_000_000 + (414_267 + 7919 * seed + 3_819_661 * (8 * patient + number)) % 10_000_000,
                prior_study_id=states[-1].study_id if states else None,
                dicom_id=ids[0],
                lateral_id=ids[1] if view == "PA" and rng.random() < 0.6 else None,
                view=view,
                date=day,
                time="{:02}{:02}{:02}.{:03}".format(*(int(rng.integers(top)) for top in (24, 60, 60, 1000))),
                split=SPLITS[patient % 10],
                present=present,
                changes=changes,
                gone=gone,
            )
        )  # fmt: skip
        soon = rng.random() < (0.9 if view == "AP" else 0.35)
        day += timedelta(int(rng.integers(1, 8) if soon else rng.integers(8, 400)))
    return states


def _course(rng, name: str, count: int) -> list[Finding]:
    """One finding or device over all studies, severity 0 where it is absent.

    The direction of a step hardly depends on where it starts, and new ones start anywhere: a single image says little
    about the change.
    """
    sides, places = (FINDINGS | DEVICES)[name]
    side, place = (options[rng.integers(len(options))] for options in (sides, places))
    leaves = {"pacemaker": 0.0, "endotracheal tube": 0.3, "central line": 0.3}.get(name, 0.18)
    severity, steps = 0.0, []
    for _ in range(count):
        if not severity:
            severity = rng.uniform(LEAST, 1) if rng.random() < 0.5 else 0.0
        elif rng.random() < leaves:
            severity = 0.0
        elif name in FINDINGS:
            step, way = rng.uniform(*STEP), rng.integers(-1, 2)
            if not LEAST <= severity + way * step <= 1:
                way = -way
            severity += way * step
        steps.append(Finding(side, place, round(float(severity), 2)))
        severity = steps[-1].severity
    return steps


def _change(name: str, was: Finding | None, now: Finding | None) -> str:
    if was is None:
        return "new"
    if now is None:
        return "removed" if name in DEVICES else "resolved"
    return "unchanged" if was == now else "worse" if now.severity > was.severity else "improved"


def _dicom_id(*key) -> str:
    digest = hashlib.sha1(repr(key).encode()).hexdigest()
    return "-".join(digest[i : i + 8] for i in range(0, 40, 8))


@lru_cache(64)
def anatomy(seed: int, patient: int) -> Anatomy:
    return Anatomy.draw(generator(seed, patient, 0, "anatomy"))


def picture(state: State, view: str, size: int) -> np.ndarray:
    """One image of a study, uint8 [size, size]; view "AP", "PA" or "LATERAL"."""
    shot = Acquisition.draw(view, state.generator(view))
    draw, noise = (lateral, "lateral noise") if view == "LATERAL" else (frontal, "frontal noise")
    return expose(draw(state.anatomy, state.present, shot, size), shot, state.generator(noise))


# ----------------------------------------------------------------------------------------------------------- reports

NOUNS = {
    "consolidation": "{side} {place} consolidation",
    "atelectasis": "{side} basilar atelectasis",
    "edema": "pulmonary edema",
    "nodule": "{side} {place} nodule",
    "pleural effusion": "{side} pleural effusion",
    "pneumothorax": "{side} apical pneumothorax",
    "cardiomegaly": "cardiomegaly",
    "endotracheal tube": "endotracheal tube",
    "central line": "{side} central line",
    "pacemaker": "{side} chest wall pacemaker",
}
SIDED = [name for name in FINDINGS if "{side}" in NOUNS[name]]  # whose side reports tell
UNCOUNTABLE = ("atelectasis", "edema", "cardiomegaly")
SMALL, MILD = ("small", "moderate", "large"), ("mild", "moderate", "severe")  # of what has a size, of the uncountable
SENTENCES = {  # {noun} with its word of severity, {bare} without; one word of change each
    "present": ("There {be} {a}{noun}.", "{a}{noun} {be} seen."),
    "new": ("There {be} {a_new}{noun}.", "{a_new}{noun} {be} seen."),
    "worse": ("The {noun} {have} {more}.", "{a}{noun} {have} {more} since the prior study."),
    "unchanged": ("The {noun} {be} unchanged.", "{a}{noun} {be} unchanged from the prior study."),
    "improved": ("The {noun} {have} {less}.", "{a}{noun} {have} {less} since the prior study."),
    "resolved": ("The {bare} {have} resolved.", "The previously seen {bare} {have} resolved."),
    "removed": ("Interval removal of the {bare}.", "There has been removal of the {bare}."),
}
IMPRESSIONS = {
    "present": "{noun}", "new": "New {noun}", "worse": "{more} {noun}", "unchanged": "Unchanged {noun}",
    "improved": "{less} {noun}", "resolved": "Resolved {bare}",
}  # fmt: skip
EXAMINATIONS = {  # view, with a lateral one -> examination, technique
    ("AP", False): ("CHEST (PORTABLE AP)", "Portable AP view of the chest was obtained."),
    ("PA", False): ("CHEST (PA)", "Single PA view of the chest was obtained."),
    ("PA", True): ("CHEST (PA AND LAT)", "PA and lateral views of the chest were obtained."),
}
SYMPTOMS = (
    "shortness of breath", "cough", "fever", "chest pain", "hypoxia", "dyspnea on exertion", "altered mental status",
    "tachycardia", "recent fall", "weakness",
)  # fmt: skip
PAST = ("Hypertension.", "Diabetes.", "Coronary artery disease.", "COPD.", "Renal failure.", "Lymphoma.", "Smoking.")


def report(state: State) -> str:
    """The report as the hospital stores it: every line begins with a space, "___" stands for what was taken out."""
    rng = state.generator("report")
    pick = lambda options: options[rng.integers(len(options))]
    sex = state.anatomy.sex
    age = pick(("___ year old", "___-year-old", "___F" if sex == "woman" else "___M"))
    who = age if len(age) == 4 else f"{age} {sex}"
    reason = f"{who} with {pick(SYMPTOMS)}{pick(('.', '  // ___', '  // evaluate for interval process'))}"
    layout = pick(("INDICATION",) * 4 + ("HISTORY", "both"))
    examination, technique = EXAMINATIONS[state.view, state.lateral_id is not None]
    parts = {"EXAMINATION": examination, "HISTORY" if layout == "HISTORY" else "INDICATION": reason}
    if layout == "both":
        parts["HISTORY"] = pick(PAST)
    parts["TECHNIQUE"] = technique
    earlier = ("Chest radiograph ___.", "Prior study dated ___.")
    parts["COMPARISON"] = pick(earlier if state.number else ("None.", "None available."))
    text = f"{' ' * 33}FINAL REPORT\n"
    for name, body in parts.items():
        text += _wrap(f"{name}:  {body}") + " \n"
    text += " FINDINGS:  \n \n" + _wrap(" ".join(_findings(state, pick))) + " \n"
    return text + " IMPRESSION:  \n \n" + "".join(map(_wrap, _impression(state, pick)))


def _wrap(line: str) -> str:
    lines = textwrap.wrap(line, 78, break_long_words=False, break_on_hyphens=False)
    return "".join(f" {part}\n" for part in lines)


def level(severity: float) -> int:
    """0 small or mild, 1 moderate, 2 large or severe."""
    return sum(severity >= limit for limit in LEVELS)


def _level(name: str, finding: Finding) -> str:
    return (MILD if name in UNCOUNTABLE else SMALL)[level(finding.severity)]


def _say(template: str, name: str, finding: Finding) -> str:
    """A template filled with one finding's words, beginning with a capital."""
    many = name == "pleural effusion" and finding.side == "bilateral"
    one = not many and name not in UNCOUNTABLE
    bare = NOUNS[name].format(side=finding.side, place=finding.place) + "s" * many
    noun = f"{_level(name, finding)} {bare}" if name in FINDINGS else bare
    article = ("an " if noun[0] in "aeiou" else "a ") * one
    dense = name in ("edema", "consolidation")  # these worsen, the others increase
    text = template.format(
        noun=noun,
        bare=bare,
        a=article,
        a_new="a " * one + "new ",
        be="are" if many else "is",
        have="have" if many else "has",
        more="worsened" if dense else "increased",
        less="improved" if dense else "decreased",
    )
    return text[0].upper() + text[1:]


def _findings(state: State, pick) -> list[str]:
    """Sentences: devices, lungs, pleura, heart; what is absent is denied unless its going has just been told."""
    named = state.present | state.gone
    say = lambda name: _say(pick(SENTENCES[state.changes.get(name, "present")]), name, named[name])
    lungs, pleura = ("consolidation", "atelectasis", "edema", "nodule"), ("pleural effusion", "pneumothorax")
    sentences = [say(name) for name in (*DEVICES, *lungs) if name in named]
    if not any(name in named for name in lungs):
        sentences.append(pick(("The lungs are clear.", "Both lungs are well aerated and clear.")))
    elif "consolidation" not in named:
        sentences.append(pick(("No focal consolidation.", "There is no focal consolidation.")))
    sentences += [say(name) for name in pleura if name in named]
    absent = " or ".join(name for name in pleura if name not in named)
    if absent:
        sentences.append(pick((f"No {absent}.", f"There is no {absent}.", f"No {absent} is seen.")))
    normal = ("The heart size is normal.", "The cardiac silhouette is normal in size.", "Heart size is normal.")
    sentences.append(say("cardiomegaly") if "cardiomegaly" in named else pick(normal))
    sentences.append(pick(("The mediastinal and hilar contours are unremarkable.", "Mediastinal contours are normal.")))
    sentences.append(pick(("The bones are intact.", "No acute fracture.", "Osseous structures are unremarkable.")))
    return sentences


def _impression(state: State, pick) -> list[str]:
    named = state.present | state.gone
    say = lambda name: _say(IMPRESSIONS[state.changes.get(name, "present")] + ".", name, named[name])
    lines = [say(name) for name in FINDINGS if name in named]
    if not lines:
        return [pick(("No acute cardiopulmonary process.", "No acute intrathoracic abnormality."))]
    return [f"{i}. {line}" for i, line in enumerate(lines, 1)] if len(lines) > 1 else lines


SAID = {  # word -> what it says of the finding in whose clause it stands
    "change": {"new": "new", "increased": "worse", "worsened": "worse", "unchanged": "unchanged", "stable": "unchanged",
               "decreased": "improved", "improved": "improved", "resolved": "resolved", "removal": "removed",
               "removed": "removed"},
    "side": {"right": "right", "left": "left", "bilateral": "bilateral"},
    "level": {word: level for words in (SMALL, MILD) for level, word in enumerate(words)},
}  # fmt: skip


def read_report(text: str) -> dict[str, dict]:
    """{finding or device: {"change", "side", "level": what is said of it, or None}}; what is denied is left out.

    It reads what a model trained on these reports writes. A clause ends at . or ; or but. "no" and "without" deny what
    follows in it; a side or a level belongs to the next name, a change to all names of its clause.
    """
    found, names = {}, [*FINDINGS, *DEVICES]
    for clause in re.split(r"[.;](?!\d)|\bbut\b", " ".join(text.lower().split())):
        said, before = re.findall(rf"{'|'.join(names)}|[a-z]+", clause), {}
        change = next((SAID["change"][word] for word in said if word in SAID["change"]), None)
        for word in said:
            if word in ("no", "without"):
                break
            if word in names:
                found[word] = {"change": change, "side": before.pop("side", None), "level": before.pop("level", None)}
            before |= {kind: says[word] for kind, says in SAID.items() if word in says}
    return found


# --------------------------------------------------------------------------------------------------------- questions

DIFFERENCES = {
    "new": "the main image has an additional finding of {name}",
    "resolved": "the finding of {name} of the reference image is missing in the main image",
    "removed": "the {name} of the reference image is missing in the main image",
    "worse": "the {name} is worse in the main image than in the reference image",
    "improved": "the {name} is better in the main image than in the reference image",
}


def pair_questions(state: State) -> list[tuple[str, str, str]]:
    """(type, question, answer) about a study and its prior, in the manner of Diff-VQA; none without a prior."""
    if state.prior_study_id is None:
        return []
    rng = state.generator("pair questions")
    found = {name: finding for name, finding in state.present.items() if name in FINDINGS}
    told = [DIFFERENCES[change].format(name=name) for name, change in state.changes.items() if change != "unchanged"]
    asked = {*list(found)[:1], list(FINDINGS)[rng.integers(len(FINDINGS))]}
    rows = [
        ("difference", "what has changed compared to the reference image?", ", ".join(told) or "nothing has changed"),
        ("abnormality", "what abnormalities are seen in the image?", ", ".join(found) or "no abnormality"),
        ("view", "from which view was the image taken?", f"{state.view} view"),
    ]
    rows += [
        ("presence", f"is there evidence of {name} in the image?", "yes" if name in found else "no")
        for name in FINDINGS
        if name in asked
    ]
    for name, finding in found.items():
        rows.append(("level", f"what level is the {name}?", _level(name, finding)))
        if finding.side:
            rows.append(("location", f"where in the image is the {name}?", f"{finding.side} {finding.place}"))
    if "edema" in found:  # septal lines come first, then the alveoli fill
        kind = "interstitial" if found["edema"].severity < 0.5 else "alveolar"
        rows.append(("type", "what type is the edema?", kind))
    return rows


def image_questions(state: State) -> list[tuple[str, str, str, list[str]]]:
    """(semantic type, content type, question, answers) about one image, in the manner of CXR-VQA."""
    rng = state.generator("image questions")
    name = [*FINDINGS, *DEVICES][rng.integers(len(FINDINGS) + len(DEVICES))]
    found, devices = ([name for name in state.present if name in group] for group in (FINDINGS, DEVICES))
    sex = {"woman": "female", "man": "male"}[state.anatomy.sex]
    large = "cardiomegaly" in found
    rows = [
        ("verify", "presence", f"is {name} present in this image?", ["yes" if name in state.present else "no"]),
        ("query", "abnormality", "list all abnormalities of this image.", found),
        ("query", "attribute", "which devices are seen in this image?", devices),
        ("choose", "plane", "is this image an AP or a PA view?", [state.view]),
        ("query", "gender", "what is the gender of the patient?", [sex]),
        ("verify", "size", "is the heart wider than half of the chest?", ["yes" if large else "no"]),
    ]
    for name in found:
        side = state.present[name].side
        if side:
            sides = [f"{one} lung" for one in ("right", "left") if side in (one, "bilateral")]
            rows.append(("query", "anatomy", f"which lungs show {name}?", sides))
    return rows


# ------------------------------------------------------------------------------------------------------------- files


def write(out, patients: int, seed: int = 0, size: int = 128, workers: int = 1, dicom: bool = False,
          progress=lambda done, total: None) -> Counter:  # fmt: skip
    """Lay the hospital out as MIMIC-CXR is, and count what is in it; ValueError where `out` holds something else.

    A patient's folder appears when all in it is on the disk, and is then left alone: a rerun makes what is missing, and
    more patients may be asked for. dicom adds a .dcm beside each .jpg. progress is called with counts of patients.
    """
    for name, value, least, most in (
        ("patients", patients, 1, 10**6),
        ("seed", seed, 0, 2**31),
        ("size", size, 32, 4096),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name} {value} is out of range: give {least} to {most}")
    out, settings = Path(out), {"seed": seed, "size": size, "dicom": dicom}
    mark = out / "phantom.json"
    if mark.exists():
        if json.loads(mark.read_text()) != settings:
            raise ValueError(f"{mark} says {mark.read_text().strip()}, not {json.dumps(settings)}: give another folder")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and was not begun by this program: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    with atomic(mark) as file:
        file.write(json.dumps(settings) + "\n")

    missing = [patient for patient in range(patients) if not _folder(out / "files", subject_id(seed, patient)).exists()]
    jobs = parallel(partial(_write_patient, out, seed, size, dicom), missing, workers)
    for done, _ in enumerate(jobs, patients - len(missing) + 1):
        progress(done, patients)
    return Counter({"patients": patients}) + _write_tables(out, patients, seed, size)


def _folder(files: Path, subject: int) -> Path:
    return files / f"p{str(subject)[:2]}" / f"p{subject}"


def _views(state: State) -> list[tuple[str, str]]:
    """(dicom id, view) of a study's images."""
    return [(state.dicom_id, state.view)] + ([(state.lateral_id, "LATERAL")] if state.lateral_id else [])


def _write_patient(out: Path, seed: int, size: int, dicom: bool, patient: int):
    folder = _folder(out / "files", subject_id(seed, patient))
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        for state in history(seed, patient):
            study = unfinished / f"s{state.study_id}"
            study.mkdir(parents=True)
            with atomic(study.with_suffix(".txt")) as file:
                file.write(report(state))
            for dicom_id, view in _views(state):
                pixels = picture(state, view, size)
                with atomic(study / f"{dicom_id}.jpg", "wb") as file:
                    Image.fromarray(pixels).save(file, "JPEG", quality=95)
                if dicom:
                    with atomic(study / f"{dicom_id}.dcm", "wb") as file:
                        file.write(_dicom(pixels, state, dicom_id, view))
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _dicom(pixels: np.ndarray, state: State, dicom_id: str, view: str) -> bytes:
    """An X-ray object of 8 bits, MONOCHROME2, whose uids follow from its ids."""
    try:
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
    except ImportError:
        raise ValueError("DICOM output needs pydicom: pip install pydicom") from None
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = f"2.25.{int(dicom_id.replace('-', '')[:32], 16)}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID = f"2.25.{state.study_id}", f"2.25.{state.study_id}.1"
    data.PatientID, data.StudyID = str(state.subject_id), str(state.study_id)
    data.Modality, data.ViewPosition = "DX", view
    data.StudyDate, data.StudyTime = state.date.strftime("%Y%m%d"), state.time
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelData = pixels.tobytes() + b"\0" * (pixels.size % 2)
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


METADATA = (
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)  # fmt: skip
VIEW_CODES = {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral"}


def _write_tables(out: Path, patients: int, seed: int, size: int) -> Counter:
    """Everything beside the folder of files, streamed: no more than one patient is in memory."""
    with ExitStack() as stack:
        text = lambda name: stack.enter_context(atomic(out / name))
        table = lambda file: csv.writer(file, lineterminator="\n").writerow

        def packed(name):
            raw = stack.enter_context(atomic(out / name, "wb"))
            zipped = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))  # no name, no time
            return table(stack.enter_context(io.TextIOWrapper(zipped, encoding="utf-8", newline="")))

        metadata, split = packed("mimic-cxr-2.0.0-metadata.csv.gz"), packed("mimic-cxr-2.0.0-split.csv.gz")
        pairs, truth = table(text("mimic_pair_questions.csv")), text("truth.jsonl")
        images = {name: text(f"cxr_vqa_{name.replace('validate', 'valid')}.json") for name in dict.fromkeys(SPLITS)}
        metadata(METADATA)
        split(("dicom_id", "study_id", "subject_id", "split"))
        pairs(("study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split"))
        begun, counts = set(), Counter()
        for patient in range(patients):
            for state in history(seed, patient):
                ids = (state.study_id, state.subject_id)
                step, day = EXAMINATIONS[state.view, state.lateral_id is not None][0], f"{state.date:%Y%m%d}"
                for dicom_id, view in _views(state):
                    metadata((dicom_id, state.subject_id, state.study_id, step, view, size, size, day, state.time, step,
                              VIEW_CODES[view], "Erect"))  # fmt: skip
                    split((dicom_id, *ids, state.split))
                asked, shown = pair_questions(state), image_questions(state)
                counts.update({"studies": 1, "studies with a prior": state.number > 0, "images": len(_views(state)),
                               "questions about an image pair": len(asked), "about one image": len(shown)})  # fmt: skip
                for row in asked:
                    pairs((*ids, state.prior_study_id, *row, state.split.replace("validate", "val")))
                file = images[state.split]
                path = _folder(Path(), state.subject_id) / f"s{state.study_id}" / f"{state.dicom_id}.jpg"
                for semantic, content, question, answer in shown:
                    file.write(",\n" if state.split in begun else "[\n")
                    begun.add(state.split)
                    record = {"subject_id": state.subject_id, "study_id": state.study_id, "image_id": state.dicom_id,
                              "image_path": path.as_posix(), "question": question, "semantic_type": semantic,
                              "content_type": content, "answer": answer}  # fmt: skip
                    file.write(json.dumps(record))
                truth.write(json.dumps(truth_of(state)) + "\n")
        for name, file in images.items():
            file.write("\n]\n" if name in begun else "[]\n")
    return counts


def truth_of(state: State) -> dict:
    """A study's line of truth.jsonl."""
    where = lambda finding: {"side": finding.side, "place": finding.place}
    findings = {k: where(f) | {"severity": f.severity} for k, f in state.present.items() if k in FINDINGS}
    devices = {k: where(f) for k, f in state.present.items() if k in DEVICES}
    ids = {"subject_id": state.subject_id, "study_id": state.study_id, "dicom_id": state.dicom_id}
    return ids | {
        "prior_study_id": state.prior_study_id, "view": state.view, "split": state.split, "findings": findings,
        "devices": devices, "changes": state.changes,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- preview

INK, PAPER, FAINT = "#e6e8ea", "#14171a", "#8b949e"
COLOURS = {
    "new": "#f0b849", "worse": "#ff7b72", "unchanged": "#79b8ff", "improved": "#7ee787", "resolved": "#7ee787",
    "removed": "#d2a8ff",
}  # fmt: skip


def preview(seed: int = 0, patients: int = 3, studies: int = 4, size: int = 320) -> Image.Image:
    """A contact sheet: a row for a patient, a column for a study, each image above the findings of its report.

    Patients are chosen so that together they show as many findings and changes as they can; words of change are
    coloured. size is an image's side in pixels.
    """
    shown, rows = set(), []
    pool = [states for states in map(partial(history, seed), range(100 * patients)) if len(states) >= studies]
    kinds = lambda states: {
        kind
        for state in states[:studies]
        for name in state.present | state.gone
        for kind in (name, (name in DEVICES, state.changes.get(name)))
    }
    while pool and len(rows) < patients:
        best = max(pool, key=lambda states: len(kinds(states) - shown))
        shown |= kinds(best)
        pool.remove(best)
        rows.append(best[:studies])

    unit = size / 20
    small, text = font(0.85 * unit), font(0.95 * unit)
    gap, line = round(1.2 * unit), round(1.3 * unit)
    findings = lambda state: report(state).split(" FINDINGS:")[1].split(" IMPRESSION:")[0]
    cells = [[paragraph(findings(state), text, size) for state in states] for states in rows]
    heights = [round(size + line * (4.4 + max(map(len, row)))) for row in cells]
    sheet = Image.new("RGB", (gap + studies * (size + gap), sum(heights) + gap), PAPER)
    draw, top = ImageDraw.Draw(sheet), gap
    for states, row, height in zip(rows, cells, heights, strict=True):
        draw.text((gap, top), f"Patient {states[0].subject_id}", INK, text)
        left = gap + text.getlength(f"Patient {states[0].subject_id}") + unit / 2
        draw.text((left, top), f"a {states[0].anatomy.sex}, {len(states)} studies", FAINT, text)
        for column, (state, lines) in enumerate(zip(states, row, strict=True)):
            x, y = gap + column * (size + gap), top + 1.6 * line
            days = (state.date - states[column - 1].date).days if column else 0
            when = f"{days} day{'s' * (days != 1)} later" if column else "first study"
            draw.text((x, y), f"{state.view}, {when}", FAINT, small)
            y += 1.1 * line
            sheet.paste(Image.fromarray(picture(state, state.view, size)), (x, round(y)))
            y += size + 0.4 * line
            write_lines(draw, x, y, lines, text, line)
        top += height
    return sheet


def few_colours(sheet: Image.Image) -> Image.Image:
    """A contact sheet in 40 greys and shades of its colours: well under half the bytes as PNG, to the same eye."""
    shade = lambda colour, part: np.array([ImageColor.getrgb(PAPER), ImageColor.getrgb(colour)]).T @ (1 - part, part)
    inks = [INK, FAINT, *dict.fromkeys(COLOURS.values())]
    shades = [shade(colour, part) for colour in inks for part in np.linspace(0, 1, 6)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate([np.linspace(0, 255, 40).repeat(3), *shades]).round().astype(np.uint8).tobytes())
    return sheet.quantize(palette=palette, dither=Image.Dither.NONE)


def write_lines(draw, x: float, y: float, lines: list[list[str]], font, height: float) -> float:
    """Write lines of words from (x, y) on, words of change in their colours; where the next line would be."""
    for words in lines:
        across = x
        for word in words:
            stem = word.rstrip(".")
            draw.text((across, y), stem, COLOURS.get(SAID["change"].get(stem.lower()), INK), font)
            draw.text((across + font.getlength(stem), y), word[len(stem) :], INK, font)
            across += font.getlength(word + " ")
        y += height
    return y


def paragraph(text: str, font, width: float) -> list[list[str]]:
    """Lines of words that fit."""
    lines = [[]]
    for word in text.split():
        if font.getlength(" ".join([*lines[-1], word])) > width:
            lines.append([])
        lines[-1].append(word)
    return lines
