"""Questions about MIMIC-CXR in its two sets: every case is written down by hand."""

import csv
import json

import pytest
from conftest import Hospital, read_lines, run_prepare

from sources.vqa import DIFF_VQA

ONE, TWO = "files/p10/p10000001/s1/a.jpg", "files/p10/p10000001/s2/c.jpg"


@pytest.fixture
def root(tmp_path):
    hospital = Hospital(tmp_path / "hospital")
    hospital.image(10000001, 1, "a", "21800101", 90000)
    hospital.image(10000001, 1, "b", "21800101", 80000)
    hospital.image(10000001, 1, "lateral", "21800101", 100000, view="LATERAL")
    hospital.image(10000001, 1, "lost", "21800101", 110000, suffix="")
    hospital.image(10000001, 2, "c", "21800102")
    hospital.image(12000003, 8, "side", "21800101", view="LATERAL")
    hospital.image(12000003, 10, "lost too", "21800101", suffix="")
    return hospital.close()

PAIRS = [  # study, patient, reference study, type, question, answer, split
    ("2", "10000001", "1", "difference", "what has changed?", "the café, closed", "train"),
    ("s2", "10000001", "1.0", "location", "where?", "left", "train"),
    ("1", "10000001", "2", "level", "how bad?", "mild", "val"),
    ("1", "10000001", "1", "view", "which view?", "", "test"),
    ("1", "10000001", "1", "view", "which view?", "pa", "dev"),
    ("8", "12000003", "1", "view", "which view?", "pa", "test"),
    ("10", "12000003", "1", "view", "which view?", "pa", "test"),
    ("1", "10000001", "999", "view", "which view?", "pa", "test"),
]


@pytest.fixture
def pairs(tmp_path):
    with open(tmp_path / "pairs.csv", "w", newline="", encoding="latin-1") as file:
        csv.writer(file).writerows([DIFF_VQA, *PAIRS])
    return tmp_path / "pairs.csv"


def test_difference_questions_show_a_study_beside_its_reference_study(root, pairs, tmp_path, capsys):
    assert run_prepare("diff-vqa", "--root", root, "--questions", pairs, "--out", tmp_path) == 0
    first, second = read_lines(tmp_path / "diff_vqa_train.jsonl")
    turns = [{"from": "human", "value": "<image>\nwhat has changed?"}, {"from": "gpt", "value": "the café, closed"}]
    # a study is shown by its first frontal image in the metadata
    assert first == {"id": "diff_vqa_0", "image": [TWO, ONE], "conversations": turns}
    assert second["id"] == "diff_vqa_1" and second["image"] == [TWO, ONE]
    (question,) = read_lines(tmp_path / "diff_vqa_validate_questions.jsonl")
    assert question == {"question_id": "diff_vqa_2", "image": [ONE, TWO], "text": "how bad?", "reference": "mild"}
    assert not (tmp_path / "diff_vqa_test_questions.jsonl").exists()
    out = capsys.readouterr().out
    assert "1  questions without a question or an answer" in out
    assert "1  questions of a split of another name" in out
    assert "3  questions about a study" in out
    assert "question_type: difference 1, level 1, location 1" in out
    row = next(line for line in out.splitlines() if line.startswith("diff_vqa_train.jsonl"))
    assert row.split()[1:] == ["1", "1", "2", "2", "(100%)", "2.0", "2.0"]


def test_the_data_sets_own_choice_of_images_counts(root, pairs, tmp_path, capsys):
    columns = ["subject_id", "study_id", "dicom_id", "view", "split", "study_date", "study_order"]
    rows = [["1", "b", "antero-posterior"], ["2.0", "c", ""], ["8", "side", "lateral"]]
    with open(tmp_path / "mimic_all.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *(["10000001", *row, "", "", ""] for row in rows)])
    assert run_prepare("diff-vqa", "--root", root, "--questions", pairs, "--out", tmp_path / "out") == 0
    first = read_lines(tmp_path / "out" / "diff_vqa_train.jsonl")[0]
    assert first["image"] == [TWO, ONE.replace("a.jpg", "b.jpg")]
    # the lateral image of a study that has no other
    (lateral,) = read_lines(tmp_path / "out" / "diff_vqa_test_questions.jsonl")
    assert lateral["image"][0].endswith("s8/side.jpg")
    assert "no mimic_all.csv" not in capsys.readouterr().out


def test_an_image_of_another_study_is_not_taken(root, pairs, tmp_path, capsys):
    (tmp_path / "mimic_all.csv").write_text("study_id,dicom_id\n1,a\n2,b\n")
    assert run_prepare("diff-vqa", "--root", root, "--questions", pairs, "--out", tmp_path / "out") == 2
    assert "1 studies whose image in mimic_all.csv is not theirs" in capsys.readouterr().err


def test_the_first_frontal_image_counts_even_if_another_is_on_disk(tmp_path):
    """Its view may be what a question is about."""
    hospital = Hospital(tmp_path / "hospital")
    hospital.image(10000001, 1, "late", "21800101", 90000)
    hospital.image(10000001, 1, "early", "21800101", 80000)
    hospital.image(10000001, 2, "lost", "21800102", suffix="")
    hospital.image(10000001, 2, "there", "21800102")
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        rows = [(study, "10000001", "1", "view", "which view?", "pa view", "train") for study in "12"]
        csv.writer(file).writerows([DIFF_VQA, *rows])
    command = "diff-vqa", "--root", hospital.close(), "--questions", tmp_path / "pairs.csv", "--out", tmp_path / "out"
    assert run_prepare(*command) == 0
    (record,) = read_lines(tmp_path / "out" / "diff_vqa_train.jsonl")
    assert set(record["image"]) == {"files/p10/p10000001/s1/late.jpg"}


def test_one_type_of_question_goes_to_files_of_its_name(root, pairs, tmp_path, capsys):
    command = "diff-vqa", "--root", root, "--questions", pairs, "--out", tmp_path / "out", "--type"
    assert run_prepare(*command, "difference") == 0
    assert [record["id"] for record in read_lines(tmp_path / "out" / "difference_train.jsonl")] == ["diff_vqa_0"]
    assert run_prepare(*command, "differences") == 2
    assert "'differences'" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["difference_train.jsonl"]


def row(path, question, answer):
    subject, study, image = path.split("/")[-3:]
    ids = {"subject_id": subject[1:], "study_id": study[1:], "image_id": image[:-4], "image_path": path}
    return ids | {"question": question, "semantic_type": "choose", "content_type": "anatomy", "answer": answer}


def test_questions_about_one_image_have_no_prior(root, tmp_path, capsys):
    train = [row("p10/p10000001/s2/c.jpg", "what?", ["left", "right"]), row("p10/p10000001/s2/c.jpg", "is it?", [])]
    valid = [row("p10/p10000001/s1/lost.jpg", "what?", ["no"]), row(TWO, "so?", ["yes"]), row("../x/x.jpg", "?", ["a"])]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "valid.json").write_text(json.dumps(valid, indent=1))
    assert run_prepare("cxr-vqa", "--root", root, "--questions", tmp_path, "--out", tmp_path) == 0
    (record,) = read_lines(tmp_path / "cxr_vqa_train.jsonl")
    assert record["image"] == [TWO] and record["conversations"][1]["value"] == "left, right"
    (question,) = read_lines(tmp_path / "cxr_vqa_validate_questions.jsonl")
    assert question == {"question_id": "cxr_vqa_validate_1", "image": [TWO], "text": "so?", "reference": "yes"}
    out = capsys.readouterr().out
    assert "2  questions whose image is missing on disk" in out
    assert "1  questions with an empty answer" in out
    assert "1  missing file *test.json" in out
    assert "semantic_type: choose 2" in out


@pytest.mark.parametrize("field, value, reason", [
    ("answer", None, "answer has the wrong type"),
    ("answer", ["left", None], "answer has the wrong type"),
    ("answer", {"side": "left"}, "answer has the wrong type"),
    ("question", None, "question has the wrong type"),
    ("question", " ", "an empty text"),
    ("image_path", 5, "image_path has the wrong type"),
    ("semantic_type", [], "semantic_type has the wrong type"),
])  # fmt: skip
def test_no_answer_is_made_of_what_is_no_text(root, tmp_path, capsys, field, value, reason):
    rows = [row(TWO, "so?", ["yes"]), row(TWO, "what?", ["no"]) | {field: value}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert run_prepare("cxr-vqa", "--root", root, "--questions", tmp_path, "--out", tmp_path) == 0
    (record,) = read_lines(tmp_path / "cxr_vqa_train.jsonl")
    assert record["conversations"][1]["value"] == "yes"
    assert reason in capsys.readouterr().out


def test_all_files_are_found_before_one_is_written(root, tmp_path, capsys):
    rows = [row("p10/p10000001/s2/c.jpg", "what?", ["left"])]
    for name in ("train.json", "valid.json", "_valid.json", "a_test.json", "b_test.json"):
        (tmp_path / name).write_text(json.dumps(rows))
    command = "cxr-vqa", "--root", root, "--questions", tmp_path, "--out", tmp_path / "out"
    assert run_prepare(*command) == 2
    assert "a_test.json, b_test.json" in capsys.readouterr().err and not (tmp_path / "out").exists()
    # a file of the exact name is the one
    (tmp_path / "b_test.json").unlink()
    assert run_prepare(*command) == 0
    assert len(read_lines(tmp_path / "out" / "cxr_vqa_validate.jsonl")) == 1


def test_a_line_that_would_fill_the_memory_is_refused(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sources.records.LINE_BYTES", 1000)
    (tmp_path / "pairs.csv").write_text(",".join(DIFF_VQA) + "\n" + "x" * 2000)
    assert run_prepare("diff-vqa", "--root", root, "--questions", tmp_path / "pairs.csv", "--out", tmp_path) == 2
    assert "pairs.csv has a line of more than 1,000 bytes" in capsys.readouterr().err


def test_a_column_that_is_missing_is_named_with_its_place(root, tmp_path, capsys):
    (tmp_path / "test.json").write_text('[\n{"question": "what?"}\n]')
    assert run_prepare("cxr-vqa", "--root", root, "--questions", tmp_path, "--out", tmp_path) == 2
    assert "test.json record 1 has no column subject_id" in capsys.readouterr().err
