"""The drawn hospital's files against the layout of MIMIC-CXR and against their own truth.jsonl."""

import csv
import gzip
import json
import re
import resource
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_prepare
from PIL import Image

from phantom import hospital
from phantom.history import DEVICES, FINDINGS, history, picture
from plumbing.files import only_writer_in

PATIENTS = 60
PUBLISHED = ["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows",
             "Columns", "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
             "PatientOrientationCodeSequence_CodeMeaning"]  # fmt: skip
FORMS = {"dicom_id": r"[0-9a-f]{8}(-[0-9a-f]{8}){4}", "subject_id": r"1\d{7}", "study_id": r"5\d{7}", "Rows": "48",
         "Columns": "48", "StudyDate": r"\d{8}", "StudyTime": r"\d{6}\.\d{3}"}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("hospital") / "phantom"
    hospital.write(out, PATIENTS, seed=3, size=48, workers=2)
    return out


@pytest.fixture(scope="module")
def truth(root):
    """study_id -> line of truth.jsonl."""
    return {line["study_id"]: line for line in map(json.loads, (root / "truth.jsonl").open())}


def table(path):
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else open(path, newline="") as file:
        return list(csv.DictReader(file))


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_rerun_completes_an_interrupted_hospital_to_the_same_bytes(tmp_path, root):
    out, seen = tmp_path / "interrupted", []
    hospital.write(out, 5, seed=3, size=48, workers=1)
    complete, *_, lost = sorted(out.glob("files/p*/p*"))
    before = complete.stat().st_mtime_ns
    lost.rename(lost.with_name(f".{lost.name}.partial"))  # this patient was being written
    hospital.write(out, PATIENTS, seed=3, size=48, workers=3, progress=lambda *count: seen.append(count))
    assert tree(out) == tree(root)
    assert complete.stat().st_mtime_ns == before
    assert seen[-1] == (PATIENTS, PATIENTS)


MISTAKES = [("new", {"patients": 0}, "patients"), ("new", {"size": 8}, "size"), ("new", {"seed": -1}, "seed"),
            ("begun", {"seed": 4}, "phantom.json"), ("begun", {"aligned": True}, "phantom.json"),
            ("other", {}, "other")]  # fmt: skip


@pytest.mark.parametrize("folder, arguments, culprit", MISTAKES)
def test_a_mistake_is_named_and_changes_nothing(tmp_path, folder, arguments, culprit):
    hospital.write(tmp_path / "begun", 1, size=48)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").touch()
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=culprit):
        hospital.write(tmp_path / folder, **{"patients": 1, "size": 48} | arguments)
    assert tree(tmp_path) == before


def test_an_aligned_hospital_is_what_was_drawn_before_bodies_moved(tmp_path):
    """Oracle: images by the code of that time with today's wires, side by side.

    Another mathematical library may round greys otherwise.
    """
    hospital.write(tmp_path, 7, seed=32, size=48, aligned=True)
    images = [np.asarray(Image.open(path), dtype=int) for path in sorted(tmp_path.rglob("*.jpg"))]
    before = np.asarray(Image.open(ROOT / "tests" / "golden" / "phantom" / "aligned.png"), dtype=int)
    assert abs(np.concatenate(images, axis=1) - before).max() <= 4
    assert (tmp_path / "phantom.json").read_text() == '{"seed": 32, "size": 48, "dicom": false}\n'  # so it can go on


def test_a_hospital_whose_bodies_move_says_so_and_has_the_same_truth(tmp_path):
    for name in ("moving", "aligned"):
        hospital.write(tmp_path / name, 4, seed=3, size=48, aligned=name == "aligned")
    moving, aligned = tree(tmp_path / "moving"), tree(tmp_path / "aligned")
    assert moving.keys() == aligned.keys()
    different = {path for path in moving if moving[path] != aligned[path]}
    assert {path for path in different if path.suffix != ".jpg"} == {Path("phantom.json")}
    assert len(different) == 1 + sum(path.suffix == ".jpg" for path in moving)
    assert json.loads(moving[Path("phantom.json")])["aligned"] is False


def test_a_hospital_that_was_killed_before_its_first_record_goes_on(tmp_path):
    (tmp_path / ".phantom.json.partial").write_text("{")
    assert hospital.write(tmp_path, 1, size=48)["patients"] == 1


def test_a_full_disk_leaves_no_torn_picture(tmp_path):
    """A limit of the file size stands for the full disk; Pillow would not notice either."""
    command = f"from phantom import hospital; hospital.write({str(tmp_path / 'out')!r}, 2, size=400)"
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    run = subprocess.run([sys.executable, "-c", command], cwd=ROOT, preexec_fn=small, capture_output=True, text=True)
    assert "File too large" in run.stderr
    assert not list((tmp_path / "out").rglob("*.jpg"))


def test_only_one_process_writes_into_a_folder(tmp_path, capsys):
    with only_writer_in(tmp_path / "out"):
        assert run_prepare("phantom", "--out", tmp_path / "out", "--patients", 1) == 2
    assert "another process" in capsys.readouterr().err


def test_the_tables_have_the_published_columns_and_forms(root):
    metadata, split = (table(root / f"mimic-cxr-2.0.0-{name}.csv.gz") for name in ("metadata", "split"))
    assert list(metadata[0]) == PUBLISHED
    assert list(split[0]) == ["dicom_id", "study_id", "subject_id", "split"]
    assert [row["dicom_id"] for row in metadata] == [row["dicom_id"] for row in split]
    assert all(re.fullmatch(form, row[column]) for row in metadata for column, form in FORMS.items())
    # patients are split 8 to 1 to 1
    splits = {row["subject_id"]: row["split"] for row in split}
    assert len({(row["subject_id"], row["split"]) for row in split}) == len(splits)
    assert Counter(splits.values()) == {"train": 48, "validate": 6, "test": 6}


def test_files_are_where_the_tables_say_and_each_study_has_one_frontal_image(root, truth):
    frontal, lateral, images, reports = {}, {}, set(), set()
    for row in table(root / "mimic-cxr-2.0.0-metadata.csv.gz"):
        views = lateral if row["ViewPosition"] == "LATERAL" else frontal
        assert views.setdefault(row["study_id"], row["dicom_id"]) == row["dicom_id"]
        study = root / "files" / f"p{row['subject_id'][:2]}" / f"p{row['subject_id']}" / f"s{row['study_id']}"
        images.add(study / f"{row['dicom_id']}.jpg")
        reports.add(study.with_suffix(".txt"))
    assert images == set(root.rglob("*.jpg")) and reports == set(root.rglob("*.txt"))
    with Image.open(min(images)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "L", (48, 48))
    assert frontal == {str(study): line["dicom_id"] for study, line in truth.items()}
    # whoever takes a study's last image, by id, gets the lateral one in some studies
    assert {frontal[study] < lateral[study] for study in lateral} == {True, False}


def compare(before, after, gone):
    """What has changed between the findings, or the devices, of two studies."""
    changes = {name: gone for name in before.keys() - after.keys()}
    changes |= {name: "new" for name in after.keys() - before.keys()}
    for name in before.keys() & after.keys():
        assert before[name] | {"severity": 0} == after[name] | {"severity": 0}  # side and place stay
        difference = after[name].get("severity", 0) - before[name].get("severity", 0)
        changes[name] = ("unchanged", "worse", "improved")[int(np.sign(difference))]
    return changes


def test_the_changes_follow_from_two_states(root, truth):
    days = {int(row["study_id"]): row["StudyDate"] for row in table(root / "mimic-cxr-2.0.0-metadata.csv.gz")}
    followed = [line for line in truth.values() if line["prior_study_id"]]
    assert len(followed) == len(truth) - PATIENTS
    for line in followed:
        prior = truth[line["prior_study_id"]]
        assert prior["subject_id"] == line["subject_id"]
        assert days[prior["study_id"]] < days[line["study_id"]]
        findings = compare(prior["findings"], line["findings"], "resolved")
        assert line["changes"] == findings | compare(prior["devices"], line["devices"], "removed")


def test_each_two_studies_of_a_patient_have_a_difference_in_both_orders(root, truth):
    """Oracle: the two hidden states. A pair is missing only where a severity differs by less than one step, 0.2."""
    answers = {(int(row["study_id"]), int(row["ref_id"])): row for row in table(root / "every_pair_difference.csv")}
    words = {"new": "additional", "worse": "worse", "improved": "better", "resolved": "missing", "removed": "missing"}
    missing = 0
    for study, reference in permutations(truth.values(), 2):
        if study["subject_id"] != reference["subject_id"]:
            continue
        row = answers.pop((study["study_id"], reference["study_id"]), None)
        then, now = reference["findings"], study["findings"]
        steps = [abs(then[name]["severity"] - now[name]["severity"]) for name in then.keys() & now.keys()]
        assert (row is None) == any(0 < step < 0.195 for step in steps)
        if row is None:
            missing += 1
            continue
        changes = compare(then, now, "resolved") | compare(reference["devices"], study["devices"], "removed")
        changed = {name: change for name, change in changes.items() if change != "unchanged"}
        told = row["answer"].split(", ") if changed else []
        assert len(told) == len(changed)
        for name, change in changed.items():
            assert any(name in part and words[change] in part for part in told), (row["answer"], changed)
        assert row["split"][:3] == study["split"][:3]
    assert not answers and missing > 10


def test_questions_about_a_pair_are_answered_from_the_truth(root, truth):
    pairs = table(root / "mimic_pair_questions.csv")
    assert list(pairs[0]) == ["study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split"]
    severities, named = defaultdict(list), lambda answer: {name for name in [*FINDINGS, *DEVICES] if name in answer}
    for row in pairs:
        line, kind, answer = truth[int(row["study_id"])], row["question_type"], row["answer"]
        assert (int(row["ref_id"]), int(row["subject_id"])) == (line["prior_study_id"], line["subject_id"])
        assert row["split"][:3] == line["split"][:3]
        finding = next((line["findings"].get(name) for name in FINDINGS if name in row["question"]), None)
        if kind == "presence":
            assert answer == ("yes" if finding else "no")
        elif kind == "abnormality":
            assert named(answer) == line["findings"].keys()
        elif kind == "difference":
            assert named(answer) == {name for name, change in line["changes"].items() if change != "unchanged"}
        elif kind == "view":
            assert answer == f"{line['view']} view"
        elif kind == "location":
            assert answer == f"{finding['side']} {finding['place']}"
        else:
            severities[answer].append(finding["severity"])
    for order in (("small", "moderate", "large"), ("mild", "moderate", "severe"), ("interstitial", "alveolar")):
        for lower, higher in pairwise(order):
            assert max(severities[lower]) < min(severities[higher])
    types = Counter(row["question_type"] for row in pairs)
    assert types["difference"] == len(truth) - PATIENTS  # one for each study with a prior
    assert min(types.values()) > 5 and len(types) == 7


@pytest.mark.parametrize("name, split", [("train", "train"), ("valid", "validate"), ("test", "test")])
def test_questions_about_an_image_are_answered_from_the_truth(root, truth, name, split):
    records = json.loads((root / f"cxr_vqa_{name}.json").read_text())
    assert {record["study_id"] for record in records} == {s for s, line in truth.items() if line["split"] == split}
    for record in records:
        line = truth[record["study_id"]]
        assert record["image_id"] == line["dicom_id"] and (root / "files" / record["image_path"]).exists()
        assert {"question", "semantic_type", "content_type"} < record.keys()
        if record["content_type"] == "abnormality":  # an empty list for a normal image
            assert sorted(record["answer"]) == sorted(line["findings"])


def test_dicom_files_have_the_same_pixels(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    hospital.write(tmp_path, 1, size=33, dicom=True)
    for state in history(0, 0):
        path = next(tmp_path.rglob(f"{state.images[state.view]}.dcm"))
        data = pydicom.dcmread(path)
        assert np.array_equal(data.pixel_array, picture(state, state.view, 33))
        assert (data.PatientID, data.ViewPosition) == (str(state.subject_id), state.view)
        assert path.with_suffix(".jpg").exists()
