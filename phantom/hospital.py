"""The drawn hospital's files, laid out as MIMIC-CXR: images, reports, tables, questions, and the hidden truth."""

import csv
import gzip
import io
import json
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from phantom.history import FINDINGS, SPLITS, VOCABULARY, State, history, picture
from phantom.reports import image_questions, pair_questions, report
from plumbing.cli import parallel
from plumbing.files import atomic, atomic_folder

METADATA = (
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)  # fmt: skip
SPLIT = ("dicom_id", "study_id", "subject_id", "split")
PAIRS = ("study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split")
VIEW_CODES = {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral"}


def write(out, patients: int, seed: int = 0, size: int = 128, workers: int = 1, dicom: bool = False,
          progress=lambda done, total: None) -> Counter:  # fmt: skip
    """Write the hospital into the folder `out`, and count what is in it.

    If this is interrupted, run it again: patients that are complete are kept, and the files are the same in the end.
    A later run may also add patients. size is an image's side in pixels; dicom=True adds a .dcm beside each .jpg;
    progress is called with numbers of patients. ValueError if a number is out of range or `out` holds something else.
    """
    # 1) check the numbers, and that the folder is new or was begun with the same settings
    for name, value, least, most in (
        ("patients", patients, 1, 10**6),
        ("seed", seed, 0, 2**31),
        ("size", size, 32, 4096),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name} {value} is out of range: give {least} to {most}")
    out, settings = Path(out), json.dumps({"seed": seed, "size": size, "dicom": dicom})
    mark = out / "phantom.json"
    if mark.exists():
        before = mark.read_text().strip()
        if before != settings:
            raise ValueError(f"{mark} says {before}, not {settings}: give another folder")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no drawn hospital: give another folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        with atomic(mark) as file:
            file.write(settings + "\n")

    # 2) a folder for each patient, then what covers all patients
    write_one = partial(_write_patient, out, seed=seed, size=size, dicom=dicom)
    for done, _ in enumerate(parallel(write_one, range(patients), workers), 1):
        progress(done, patients)
    return Counter(patients=patients) + _write_tables(out, patients, seed, size)


def _folder(state: State) -> Path:
    subject = f"p{state.subject_id}"
    return Path(subject[:3], subject)


def _write_patient(out: Path, patient: int, *, seed: int, size: int, dicom: bool):
    states = history(seed, patient)
    folder = out / "files" / _folder(states[0])
    if folder.exists():
        return
    with atomic_folder(folder) as partial_folder:
        for state in states:
            study = partial_folder / f"s{state.study_id}"
            study.mkdir()
            with atomic(study.with_suffix(".txt")) as file:
                file.write(report(state))
            for view, image_id in state.images.items():
                pixels = picture(state, view, size)
                with atomic(study / f"{image_id}.jpg", "wb") as file:
                    Image.fromarray(pixels).save(file, "JPEG", quality=95)
                if dicom:
                    with atomic(study / f"{image_id}.dcm", "wb") as file:
                        file.write(_dicom(pixels, state, view))


def _dicom(pixels: np.ndarray, state: State, view: str) -> bytes:
    """A digital X-ray image of 8 bits. Its uids follow from its ids."""
    try:
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
    except ImportError:
        raise ValueError("DICOM output needs pydicom: pip install pydicom") from None
    uid = f"2.25.{int(state.images[view].replace('-', '')[:32], 16)}"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = DigitalXRayImageStorageForPresentation, uid
    data.StudyInstanceUID, data.SeriesInstanceUID = f"2.25.{state.study_id}", f"2.25.{state.study_id}.1"
    data.PatientID, data.StudyID = str(state.subject_id), str(state.study_id)
    data.StudyDate, data.StudyTime = f"{state.date:%Y%m%d}", state.time
    data.Modality, data.ViewPosition = "DX", view
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelData = pixels.tobytes() + b"\0" * (pixels.size % 2)  # an even number of bytes
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _write_tables(out: Path, patients: int, seed: int, size: int) -> Counter:
    """Write what covers all patients, study by study, so that memory does not grow with their number."""
    counts = Counter()
    with ExitStack() as stack:
        # 1) open the tables and the lists of questions about images
        metadata = _open_table(stack, out / "mimic-cxr-2.0.0-metadata.csv.gz", METADATA)
        split = _open_table(stack, out / "mimic-cxr-2.0.0-split.csv.gz", SPLIT)
        pairs = _open_table(stack, out / "mimic_pair_questions.csv", PAIRS)
        truth = stack.enter_context(atomic(out / "truth.jsonl"))
        lists = {}
        for name in SPLITS:
            if name not in lists:
                file = out / f"cxr_vqa_{name.replace('validate', 'valid')}.json"
                lists[name] = stack.enter_context(atomic(file))
        separators = dict.fromkeys(lists, "[\n")

        # 2) write the rows of each study
        for state in (state for patient in range(patients) for state in history(seed, patient)):
            day, (examination, _) = f"{state.date:%Y%m%d}", VOCABULARY["examinations"][" ".join(state.images)]
            for view, image_id in state.images.items():
                metadata([image_id, state.subject_id, state.study_id, examination, view, size, size, day, state.time,
                          examination, VIEW_CODES[view], "Erect"])  # fmt: skip
                split([image_id, state.study_id, state.subject_id, state.split])
            about_pair, about_image = pair_questions(state), image_questions(state)
            for row in about_pair:
                ids = (state.study_id, state.subject_id, state.prior.study_id)
                pairs([*ids, *row, state.split.replace("validate", "val")])
            image_id = state.images[state.view]
            path = _folder(state) / f"s{state.study_id}" / f"{image_id}.jpg"
            ids = {"subject_id": state.subject_id, "study_id": state.study_id, "image_id": image_id}
            for question in about_image:
                record = ids | {"image_path": path.as_posix()} | question
                lists[state.split].write(separators[state.split] + json.dumps(record))
                separators[state.split] = ",\n"
            truth.write(json.dumps(truth_of(state)) + "\n")
            counts.update({"studies": 1, "studies with a prior": state.number > 0, "images": len(state.images)})
            counts.update({"questions about an image pair": len(about_pair), "about one image": len(about_image)})

        # 3) close the lists, some of which may be empty
        for name, file in lists.items():
            file.write("[]\n" if separators[name] == "[\n" else "\n]\n")
    return counts


def _open_table(stack: ExitStack, path: Path, columns: tuple):
    """Begin a CSV file, packed if its name says so -> the function that writes a row."""
    if path.suffix == ".gz":
        raw = stack.enter_context(atomic(path, "wb"))
        packed = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))  # it stores neither name nor time
        file = stack.enter_context(io.TextIOWrapper(packed, encoding="utf-8", newline=""))
    else:
        file = stack.enter_context(atomic(path))
    write_row = csv.writer(file, lineterminator="\n").writerow
    write_row(columns)
    return write_row


def truth_of(state: State) -> dict:
    """A study's line of truth.jsonl."""
    findings, devices = {}, {}
    for name, finding in state.present.items():
        where = {"side": finding.side, "place": finding.place}
        if name in FINDINGS:
            findings[name] = where | {"severity": finding.severity}
        else:
            devices[name] = where
    prior_id = state.prior.study_id if state.prior else None
    return {
        "subject_id": state.subject_id, "study_id": state.study_id, "dicom_id": state.images[state.view],
        "prior_study_id": prior_id, "view": state.view, "split": state.split,
        "findings": findings, "devices": devices, "changes": state.changes,
    }  # fmt: skip


def preview(seed: int = 0, **layout) -> Image.Image:
    """A contact sheet; layout: see `assets.contact_sheet.draw`."""
    from assets import contact_sheet

    return contact_sheet.draw(seed, **layout)


def few_colours(sheet: Image.Image) -> Image.Image:
    from assets import contact_sheet

    return contact_sheet.few_colours(sheet)
