"""The drawn hospital's files against the layout of MIMIC-CXR and against their own truth.jsonl."""

import csv
import gzip
import hashlib
import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from phantom import hospital
from phantom.history import DEVICES, FINDINGS, history, picture

PATIENTS = 60


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("hospital") / "phantom"
    hospital.write(out, PATIENTS, seed=3, size=48, workers=2)
    return out


@pytest.fixture(scope="module")
def metadata(root):
    return table(root / "mimic-cxr-2.0.0-metadata.csv.gz")


@pytest.fixture(scope="module")
def truth(root):
    """study_id -> line of truth.jsonl, in their order."""
    lines = map(json.loads, (root / "truth.jsonl").read_text().splitlines())
    return {line["study_id"]: line for line in lines}


def table(path):
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else open(path, newline="") as file:
        return list(csv.DictReader(file))


def tree(folder):
    """Relative path -> hash of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---------------------------------------------------------------------------------------------------- writing


def test_a_rerun_completes_an_interrupted_hospital_to_the_same_bytes(tmp_path, root):
    out, seen = tmp_path / "interrupted", []
    hospital.write(out, 5, seed=3, size=48, workers=1)
    complete, lost = next(out.glob("files/p*/p*")), sorted(out.glob("files/p*/p*"))[-1]
    before = complete.stat().st_mtime_ns
    lost.rename(lost.with_name(f".{lost.name}.partial"))  # this patient was being written
    hospital.write(out, PATIENTS, seed=3, size=48, workers=3, progress=lambda *count: seen.append(count))
    assert tree(out) == tree(root)
    assert complete.stat().st_mtime_ns == before
    assert seen[-1] == (PATIENTS, PATIENTS)


def test_another_seed_needs_another_folder(root):
    with pytest.raises(ValueError, match=r"phantom\.json"):
        hospital.write(root, 1, seed=4, size=48)


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "precious.txt").touch()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        hospital.write(tmp_path, 1)


@pytest.mark.parametrize("name, value", [("patients", 0), ("size", 8), ("seed", -1)])
def test_a_number_out_of_range_is_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        hospital.write(tmp_path / "new", **{"patients": 1, name: value})
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------- the layout of MIMIC-CXR


def test_the_tables_have_the_published_columns_and_forms(root, metadata):
    split = table(root / "mimic-cxr-2.0.0-split.csv.gz")
    assert list(metadata[0]) == [
        "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
        "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
        "PatientOrientationCodeSequence_CodeMeaning",
    ]  # fmt: skip
    assert list(split[0]) == ["dicom_id", "study_id", "subject_id", "split"]
    assert [row["dicom_id"] for row in metadata] == [row["dicom_id"] for row in split]
    for row in metadata:
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}", row["dicom_id"])
        assert re.fullmatch(r"1\d{7}", row["subject_id"])
        assert re.fullmatch(r"5\d{7}", row["study_id"])
        assert re.fullmatch(r"\d{8}", row["StudyDate"])
        assert re.fullmatch(r"\d{6}\.\d{3}", row["StudyTime"])


def test_images_and_reports_are_where_the_tables_say(root, metadata):
    folder = lambda row: f"files/p{row['subject_id'][:2]}/p{row['subject_id']}/s{row['study_id']}"
    images = {str(path.relative_to(root)) for path in root.rglob("*.jpg")}
    reports = {str(path.relative_to(root)) for path in root.rglob("*.txt")}
    assert len(images) == len(metadata)
    assert images == {f"{folder(row)}/{row['dicom_id']}.jpg" for row in metadata}
    assert reports == {f"{folder(row)}.txt" for row in metadata}
    with Image.open(root / min(images)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "L", (48, 48))
    assert {(row["Rows"], row["Columns"]) for row in metadata} == {("48", "48")}


def test_each_study_has_one_frontal_image_and_some_have_a_lateral_one(metadata, truth):
    frontal = {row["study_id"]: row["dicom_id"] for row in metadata if row["ViewPosition"] != "LATERAL"}
    lateral = [row["study_id"] for row in metadata if row["ViewPosition"] == "LATERAL"]
    assert len(frontal) + len(lateral) == len(metadata)
    assert len(set(lateral)) == len(lateral) and set(lateral) < frontal.keys()
    assert frontal == {str(study): line["dicom_id"] for study, line in truth.items()}
    # a reader that takes any image of a study as the prior makes mistakes: the lateral id is the greater one in some
    last = {row["study_id"]: row["ViewPosition"] for row in sorted(metadata, key=lambda row: row["dicom_id"])}
    assert {last[study] == "LATERAL" for study in lateral} == {True, False}


def test_patients_are_split_8_to_1_to_1(root):
    splits = defaultdict(set)
    for row in table(root / "mimic-cxr-2.0.0-split.csv.gz"):
        splits[row["subject_id"]].add(row["split"])
    assert Counter(map(tuple, splits.values())) == {("train",): 48, ("validate",): 6, ("test",): 6}


# ---------------------------------------------------------------------------------------- the truth, and questions


def compare(before, after, gone):
    """The changes that follow from a study's findings (or devices) and those of its prior."""
    changes = {name: gone for name in before.keys() - after.keys()}
    for name, now in after.items():
        was = before.get(name)
        if was is None:
            changes[name] = "new"
            continue
        assert (was["side"], was["place"]) == (now["side"], now["place"])
        difference = now.get("severity", 0) - was.get("severity", 0)
        changes[name] = "worse" if difference > 0 else "improved" if difference < 0 else "unchanged"
    return changes


def test_the_changes_follow_from_two_states(truth, metadata):
    days = {int(row["study_id"]): row["StudyDate"] for row in metadata}
    priors = 0
    for line in truth.values():
        if line["prior_study_id"] is None:
            assert line["changes"] == {}
            continue
        prior = truth[line["prior_study_id"]]
        priors += 1
        assert prior["subject_id"] == line["subject_id"]
        assert days[prior["study_id"]] < days[line["study_id"]]
        findings = compare(prior["findings"], line["findings"], "resolved")
        assert line["changes"] == findings | compare(prior["devices"], line["devices"], "removed")
    assert priors == len(truth) - PATIENTS


def test_questions_about_a_pair_are_answered_from_the_truth(root, truth):
    pairs = table(root / "mimic_pair_questions.csv")
    types, levels, edema = Counter(row["question_type"] for row in pairs), defaultdict(list), defaultdict(list)
    assert list(pairs[0]) == ["study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split"]
    for row in pairs:
        line, answer = truth[int(row["study_id"])], row["answer"]
        assert int(row["ref_id"]) == line["prior_study_id"]
        assert int(row["subject_id"]) == line["subject_id"]
        assert row["split"][:3] == line["split"][:3]
        asked = next((name for name in FINDINGS if name in row["question"]), None)
        finding = line["findings"].get(asked)
        match row["question_type"]:
            case "presence":
                assert answer == ("yes" if finding else "no")
            case "abnormality":
                assert {name for name in FINDINGS if name in answer} == line["findings"].keys()
            case "view":
                assert answer == f"{line['view']} view"
            case "location":
                assert answer == f"{finding['side']} {finding['place']}"
            case "level":
                levels[answer].append(finding["severity"])
            case "type":
                edema[answer].append(finding["severity"])
            case "difference":
                changed = {name for name, change in line["changes"].items() if change != "unchanged"}
                assert {name for name in [*FINDINGS, *DEVICES] if name in answer} == changed
    low, middle, high = levels["small"] + levels["mild"], levels["moderate"], levels["large"] + levels["severe"]
    assert max(low) < min(middle) and max(middle) < min(high)
    assert max(edema["interstitial"]) < min(edema["alveolar"])
    assert types["difference"] == len(truth) - PATIENTS  # one for each study with a prior
    assert min(types.values()) > 5 and len(types) == 7


@pytest.mark.parametrize("name, split", [("train", "train"), ("valid", "validate"), ("test", "test")])
def test_questions_about_an_image_are_answered_from_the_truth(root, truth, name, split):
    records = json.loads((root / f"cxr_vqa_{name}.json").read_text())
    assert {record["study_id"] for record in records} == {s for s, line in truth.items() if line["split"] == split}
    for record in records:
        line = truth[record["study_id"]]
        assert record["image_id"] == line["dicom_id"]
        assert (root / "files" / record["image_path"]).exists()
        assert isinstance(record["answer"], list)
        assert {"question", "semantic_type", "content_type"} < record.keys()
        if record["content_type"] == "abnormality":  # an empty list for a normal image
            assert set(record["answer"]) == line["findings"].keys()


# ----------------------------------------------------------------------------------------------- DICOM and preview


def test_dicom_files_have_the_same_pixels(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    hospital.write(tmp_path / "a", 2, size=33, workers=1, dicom=True)
    for patient in range(2):
        for state in history(0, patient):
            path = next((tmp_path / "a").rglob(f"{state.images[state.view]}.dcm"))
            data = pydicom.dcmread(path)
            assert np.array_equal(data.pixel_array, picture(state, state.view, 33))
            assert (data.PatientID, data.ViewPosition) == (str(state.subject_id), state.view)
            assert path.with_suffix(".jpg").exists()


def test_the_preview_shows_two_patients_and_coloured_words():
    sheet = np.asarray(hospital.preview(seed=3, patients=2, studies=3, size=100))
    firsts = [picture(history(3, patient)[0], history(3, patient)[0].view, 100) for patient in range(200)]
    column = sheet[:, 6:106, 0]  # the first images are in it, among text
    shown = 0
    for top in range(len(column) - 99):
        shown += any(np.array_equal(column[top : top + 100], image) for image in firsts)
    assert shown == 2
    assert (sheet.max(2).astype(int) - sheet.min(2) > 60).any()
