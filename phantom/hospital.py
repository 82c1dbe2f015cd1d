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
from phantom.reports import differences, image_questions, pair_questions, report
from plumbing.cli import parallel
from plumbing.files import atomic, atomic_folder, read_text, resumable

COLUMNS = VOCABULARY["columns"]  # of the three tables
VIEW_CODES = {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral"}


def write(out, patients: int, seed: int = 0, size: int = 128, workers: int = 1, dicom: bool = False,
          aligned: bool = False, progress=lambda done, total: None) -> Counter:  # fmt: skip
    """Writes the hospital into the folder `out`, and counts what is in it.

    If this is interrupted, run it again: patients that are complete are kept, and the files are the same in the end.
    A later run may also add patients. size is an image's side in pixels; dicom=True adds a .dcm beside each .jpg;
    aligned=True lays the images of a patient nearly on top of each other, see `phantom.radiograph.Acquisition`;
    progress is called with numbers of patients. ValueError if a number is out of range or `out` holds something else.
    """
    # 1) check the numbers, and that the folder is new or was begun with the same settings
    ranges = {"patients": (patients, 1, 10**6), "seed": (seed, 0, 2**31), "size": (size, 32, 4096)}
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise ValueError(f"{name} {value} is out of range: give {least} to {most}")
    settings = {"seed": seed, "size": size, "dicom": dicom}
    if not aligned:
        # absent means aligned, as every hospital was before there was this setting
        settings["aligned"] = False
    settings = json.dumps(settings)
    out = Path(out)
    mark = out / "phantom.json"
    # a run that was killed in its first moment has left at most a part of the mark
    if out.exists() and any(path.name != f".{mark.name}.partial" for path in out.iterdir()):
        before = read_text(mark).strip() if mark.exists() else "nothing"
        if before != settings:
            raise ValueError(f"{out} has files, and phantom.json says {before}, not {settings}: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    _write(mark, settings + "\n")

    # 2) a folder for each patient, then what covers all patients
    write_one = partial(_write_patient, out, seed=seed, size=size, dicom=dicom, aligned=aligned)
    for done, _ in enumerate(parallel(write_one, range(patients), workers), 1):
        progress(done, patients)
    return Counter(patients=patients) + Counter(_write_tables(out, patients, seed, size))


def _folder(state: State) -> Path:
    subject = f"p{state.subject_id}"
    return Path(subject[:3], subject)


def _write_patient(out: Path, patient: int, *, seed: int, size: int, dicom: bool, aligned: bool):
    states = history(seed, patient)
    folder = out / "files" / _folder(states[0])
    if folder.exists():
        return
    # the folder appears when it is complete, so an interrupted run never leaves half a patient
    with resumable(folder), atomic_folder(folder) as partial_folder:
        for state in states:
            # the report is beside the study's folder, the images are in it
            study = partial_folder / f"s{state.study_id}"
            study.mkdir()
            study.with_suffix(".txt").write_text(report(state), encoding="utf-8")
            for view, image_id in state.images.items():
                pixels = picture(state, view, size, aligned)
                (study / f"{image_id}.jpg").write_bytes(encode(Image.fromarray(pixels), "JPEG", quality=95))
                if dicom:
                    (study / f"{image_id}.dcm").write_bytes(_dicom(pixels, state, view))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    """A picture as the bytes of a file. Pillow, writing a file itself, does not notice when the disk is full."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _dicom(pixels: np.ndarray, state: State, view: str) -> bytes:
    """A digital X-ray image of 8 bits. Its uids follow from its ids."""
    try:
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
    except ImportError:
        raise ValueError("DICOM output needs pydicom: pip install pydicom") from None
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = DigitalXRayImageStorageForPresentation
    # "2.25." begins uids that are made from a random number of 128 bits
    data.SOPInstanceUID = f"2.25.{int(state.images[view].replace('-', '')[:32], 16)}"
    data.StudyInstanceUID = f"2.25.{state.study_id}"
    data.SeriesInstanceUID = f"2.25.{state.study_id}.1"
    data.PatientID, data.StudyID = str(state.subject_id), str(state.study_id)
    data.StudyDate, data.StudyTime = f"{state.date:%Y%m%d}", state.time
    data.Modality, data.ViewPosition = "DX", view
    data.set_pixel_data(pixels, "MONOCHROME2", bits_stored=8, generate_instance_uid=False)
    data["PixelData"].VR = "OW"
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _write_tables(out: Path, patients: int, seed: int, size: int) -> dict[str, int]:
    """Writes what covers all patients. Returns counts."""
    metadata, split, pairs = ([COLUMNS[name]] for name in ("metadata", "split", "pairs"))
    every_pair = [COLUMNS["pairs"]]
    truth = []
    images = {name: [] for name in SPLITS}  # the records about images
    question = VOCABULARY["pair questions"]["difference"]
    for patient in range(patients):
        states = history(seed, patient)
        for state in states:
            study = {"subject_id": state.subject_id, "study_id": state.study_id}
            # 1) a row in both tables for each image
            examination, _ = VOCABULARY["examinations"][" ".join(state.images)]
            for view, image_id in state.images.items():
                when = (f"{state.date:%Y%m%d}", state.time)
                codes = (examination, VIEW_CODES[view], "Erect")
                metadata.append((image_id, *study.values(), examination, view, size, size, *when, *codes))
                split.append((image_id, state.study_id, state.subject_id, state.split))
            # 2) the questions and their answers
            for row in pair_questions(state):
                pairs.append(_pair_row(state, state.prior, *row))
            image_id = state.images[state.view]
            path = _folder(state) / f"s{state.study_id}" / f"{image_id}.jpg"
            record = study | {"image_id": image_id, "image_path": path.as_posix()}
            images[state.split] += [json.dumps(record | asked) for asked in image_questions(state)]
            truth.append(json.dumps(truth_of(state)) + "\n")
        for study, reference, answer in differences(states):
            every_pair.append(_pair_row(study, reference, "difference", question, answer))

    # 3) the files; the published set of questions about one image names a split "valid"
    _write(out / "every_pair_difference.csv", _csv(every_pair))
    _write(out / "mimic-cxr-2.0.0-metadata.csv.gz", _csv(metadata))
    _write(out / "mimic-cxr-2.0.0-split.csv.gz", _csv(split))
    _write(out / "mimic_pair_questions.csv", _csv(pairs))
    _write(out / "truth.jsonl", "".join(truth))
    for name, records in images.items():
        text = "[\n" + ",\n".join(records) + "\n]\n" if records else "[]\n"
        _write(out / f"cxr_vqa_{name.replace('validate', 'valid')}.json", text)
    return {
        "studies": len(truth),
        "studies with a prior": len(truth) - patients,
        "images": len(metadata) - 1,
        "questions about an image pair": len(pairs) - 1,
        "about one image": sum(map(len, images.values())),
    }


def _pair_row(study: State, reference: State, kind: str, question: str, answer: str) -> tuple:
    # as published: a split is named "val"
    split = study.split.replace("validate", "val")
    return study.study_id, study.subject_id, reference.study_id, kind, question, answer, split


def _csv(rows: list) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _write(path: Path, text: str):
    with atomic(path, "wb") as file:
        if path.suffix == ".gz":
            # neither a name nor a time inside, so that the bytes depend on the text only
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                packed.write(text.encode())
                packed.flush()
        else:
            file.write(text.encode())


def truth_of(state: State) -> dict:
    """A study's line of truth.jsonl."""
    ids = {"subject_id": state.subject_id, "study_id": state.study_id, "dicom_id": state.images[state.view]}
    ids["prior_study_id"] = state.prior.study_id if state.prior else None
    findings, devices = {}, {}
    for name, finding in state.present.items():
        kind = findings if name in FINDINGS else devices
        kind[name] = finding._asdict()
    # the severity of a device has no meaning
    for device in devices.values():
        del device["severity"]
    present = {"findings": findings, "devices": devices, "changes": state.changes}
    return ids | {"view": state.view, "split": state.split} | present


def preview(seed: int = 0, aligned: bool = False) -> Image.Image:
    """Some patients over time: their images and reports on one sheet."""
    return import_module("assets.contact_sheet").draw(seed, aligned)
