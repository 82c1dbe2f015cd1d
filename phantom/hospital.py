"""The drawn hospital's files, laid out as MIMIC-CXR: images, reports, tables, questions, and the hidden truth."""

import csv
import gzip
import io
import json
from collections import Counter
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

from phantom.history import FINDINGS, SPLITS, VOCABULARY, State, history, picture
from phantom.reports import image_questions, pair_questions, report
from plumbing.cli import parallel
from plumbing.files import atomic, atomic_folder

METADATA = ("dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows",
            "Columns", "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
            "PatientOrientationCodeSequence_CodeMeaning")  # fmt: skip
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
    ranges = {"patients": (patients, 1, 10**6), "seed": (seed, 0, 2**31), "size": (size, 32, 4096)}
    for name, (value, least, most) in ranges.items():
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
        _write_text(mark, settings + "\n")

    # 2) a folder for each patient, then what covers all patients
    write_one = partial(_write_patient, out, seed=seed, size=size, dicom=dicom)
    for done, _ in enumerate(parallel(write_one, range(patients), workers), 1):
        progress(done, patients)
    return Counter(patients=patients) + Counter(_write_tables(out, patients, seed, size))


def _folder(state: State) -> Path:
    subject = f"p{state.subject_id}"
    return Path(subject[:3], subject)


def _write_patient(out: Path, patient: int, *, seed: int, size: int, dicom: bool):
    states = history(seed, patient)
    folder = out / "files" / _folder(states[0])
    if folder.exists():
        return
    # the folder appears when it is complete, so an interrupted run never leaves half a patient
    with atomic_folder(folder) as partial_folder:
        for state in states:
            # the report is beside the study's folder, the images are in it
            study = partial_folder / f"s{state.study_id}"
            study.mkdir()
            _write_text(study.with_suffix(".txt"), report(state))
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
    # 1) the header: "2.25." begins uids that are made from a random number of 128 bits
    uid = f"2.25.{int(state.images[view].replace('-', '')[:32], 16)}"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = DigitalXRayImageStorageForPresentation, uid
    # 2) whose image it is, and what of
    data.StudyInstanceUID, data.SeriesInstanceUID = f"2.25.{state.study_id}", f"2.25.{state.study_id}.1"
    data.PatientID, data.StudyID = str(state.subject_id), str(state.study_id)
    data.StudyDate, data.StudyTime = f"{state.date:%Y%m%d}", state.time
    data.Modality, data.ViewPosition = "DX", view
    # 3) the pixels
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelData = pixels.tobytes() + b"\0" * (pixels.size % 2)  # an even number of bytes
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _write_tables(out: Path, patients: int, seed: int, size: int) -> dict[str, int]:
    """Write what covers all patients. Returns counts."""
    metadata, split, pairs, truth = [METADATA], [SPLIT], [PAIRS], []
    images = {name: [] for name in SPLITS}  # the records about images
    for state in (state for patient in range(patients) for state in history(seed, patient)):
        # 1) a row in both tables for each image
        examination, _ = VOCABULARY["examinations"][" ".join(state.images)]
        day = f"{state.date:%Y%m%d}"
        for view, image_id in state.images.items():
            ids = (image_id, state.subject_id, state.study_id)
            codes = (examination, VIEW_CODES[view], "Erect")
            metadata.append((*ids, examination, view, size, size, day, state.time, *codes))
            split.append((image_id, state.study_id, state.subject_id, state.split))
        # 2) the questions and their answers
        for row in pair_questions(state):
            ids = (state.study_id, state.subject_id, state.prior.study_id)
            pairs.append((*ids, *row, state.split.replace("validate", "val")))
        image_id = state.images[state.view]
        path = _folder(state) / f"s{state.study_id}" / f"{image_id}.jpg"
        ids = {"subject_id": state.subject_id, "study_id": state.study_id, "image_id": image_id}
        for question in image_questions(state):
            images[state.split].append(json.dumps(ids | {"image_path": path.as_posix()} | question))
        truth.append(json.dumps(truth_of(state)) + "\n")

    # 3) the files; the published question sets name the splits "val" and "valid"
    _write_csv(out / "mimic-cxr-2.0.0-metadata.csv.gz", metadata)
    _write_csv(out / "mimic-cxr-2.0.0-split.csv.gz", split)
    _write_csv(out / "mimic_pair_questions.csv", pairs)
    _write_text(out / "truth.jsonl", "".join(truth))
    for name, records in images.items():
        text = "[\n" + ",\n".join(records) + "\n]\n" if records else "[]\n"
        _write_text(out / f"cxr_vqa_{name.replace('validate', 'valid')}.json", text)
    return {
        "studies": len(truth),
        "studies with a prior": len(truth) - patients,
        "images": len(metadata) - 1,
        "questions about an image pair": len(pairs) - 1,
        "about one image": sum(map(len, images.values())),
    }


def _write_csv(path: Path, rows: list[tuple]):
    if path.suffix == ".gz":
        # neither a name nor a time inside, so that the bytes depend on the rows only
        with atomic(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
            file = io.TextIOWrapper(packed, encoding="utf-8", newline="")
            csv.writer(file, lineterminator="\n").writerows(rows)
            file.flush()
    else:
        with atomic(path) as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def _write_text(path: Path, text: str):
    with atomic(path) as file:
        file.write(text)


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


def preview(seed: int = 0) -> Image.Image:
    return import_module("assets.contact_sheet").draw(seed)


def few_colours(sheet: Image.Image) -> Image.Image:
    return import_module("assets.contact_sheet").few_colours(sheet)
