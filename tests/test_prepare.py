"""The command line: the drawn hospital prepared from end to end, files checked, mistakes refused in one line."""

import gzip
import json

import pytest
from conftest import Hospital, one_line, read, read_lines, run_prepare, training_record, write_lines


def test_the_drawn_hospital_is_prepared_from_end_to_end(tmp_path, capsys):
    root, out = tmp_path / "hospital", tmp_path / "data"
    folders = "--root", root, "--out", out
    assert run_prepare("phantom", "--out", root, "--patients", 12, "--size", 64, "--workers", 1) == 0
    assert run_prepare("mimic-cxr", *folders) == 0
    assert run_prepare("mimic-cxr", *folders, "--section", "findings", "--no-context") == 0
    assert run_prepare("diff-vqa", *folders, "--questions", root / "mimic_pair_questions.csv") == 0
    assert run_prepare("cxr-vqa", *folders, "--questions", root) == 0
    capsys.readouterr()
    for name in ("findings", "findings_no_context", "impression", "diff_vqa", "cxr_vqa"):
        for end in ("train", "validate", "validate_questions", "test_questions"):
            assert run_prepare("check", out / f"{name}_{end}.jsonl", "--image-folder", root) == 0
            assert "no problem in" in capsys.readouterr().out
    assert {len(record["image"]) for record in read_lines(out / "findings_train.jsonl")} == {1, 2}

    # without the context the questions are shorter, and nothing else changes
    with_context, without = (read_lines(out / f"findings{name}_train.jsonl") for name in ("", "_no_context"))
    for one, other in zip(with_context, without, strict=True):
        (long, answer), (short, same) = one.pop("conversations"), other.pop("conversations")
        assert long["value"].startswith(f"{short['value']} Following clinical context: ")
        assert (one, answer) == (other, same)


def test_records_are_checked_beside_their_images(tmp_path, capsys):
    records, file = read("training", "records.json"), tmp_path / "list.json"
    file.write_text(json.dumps(records + records))
    for number in range(4):
        (tmp_path / f"{number}.png").touch()
    assert run_prepare("check", file, "--image-folder", tmp_path) == 0
    assert "no problem in 6 records; 3 have the id" in capsys.readouterr().out
    (tmp_path / "0.png").unlink()
    assert run_prepare("check", file, "--image-folder", tmp_path) == 2
    assert "record 1: no image 0.png" in capsys.readouterr().err
    # without their folder, images are not looked for
    assert run_prepare("check", file) == 0


QUESTION = '{"question_id": 7, "image": "../0.png", "text": "What?"}'


@pytest.mark.parametrize("text, culprits", [
    ("", ["mine.jsonl"]),
    ("[]", ["mine.jsonl"]),
    ('{"id": 1}\n{"id": \n', ["line 2"]),
    (f'{QUESTION}\n{QUESTION}\n["a"]\n{{"text": 3}}', ["line 1", "line 2", "line 3", "line 4"]),
])  # fmt: skip
def test_check_lists_what_is_wrong_in_one_line(tmp_path, capsys, text, culprits):
    (tmp_path / "mine.jsonl").write_text(text)
    assert run_prepare("check", tmp_path / "mine.jsonl", "--image-folder", tmp_path) == 2
    error = capsys.readouterr().err
    assert all(culprit in error for culprit in culprits) and error.count("\n") == 1


def test_odd_records_cost_no_more_than_themselves_unless_strict(tmp_path, capsys):
    records = [training_record(answer=""), training_record(), training_record("Why?")]
    file = write_lines(tmp_path / "mine.jsonl", records)
    assert run_prepare("check", file) == 0
    printed = capsys.readouterr()
    assert "1 of 3 records are left out, 1 × an answer is empty; the first: line 1" in printed.err
    assert "1 records are odd; 1 have the id" in printed.out
    assert run_prepare("check", file, "--strict") == 2
    assert "1 in all: line 1: an answer is empty" in one_line(capsys)


METADATA, SPLIT = "mimic-cxr-2.0.0-metadata.csv.gz", "mimic-cxr-2.0.0-split.csv.gz"


@pytest.mark.parametrize("name, change, culprit", [
    (METADATA, lambda data: data[:20], METADATA),
    (METADATA, lambda data: data[:-5], METADATA),
    (METADATA, lambda data: b"dicom_id,subject_id", METADATA),
    (METADATA, lambda data: gzip.compress(b"dicom_id,subject_id,study_id\n"), "ViewPosition, StudyDate, StudyTime"),
    (METADATA, lambda data: gzip.compress(b""), "it has none"),
    (SPLIT, lambda data: gzip.compress(b"dicom_id,study_id,split\nz,1,train\n"), "1 frontal images outside of train"),
    (SPLIT, None, "mimic-cxr-*-split.csv*"),
])  # fmt: skip
def test_damaged_tables_are_refused_and_no_file_appears(tmp_path, capsys, name, change, culprit):
    hospital = Hospital(tmp_path / "hospital")
    hospital.report(10000001, 1, "\n FINDINGS:  Clear.\n")
    hospital.image(10000001, 1, "a", "21800101")
    root = hospital.close()
    if change:
        (root / name).write_bytes(change((root / name).read_bytes()))
    else:
        (root / name).unlink()
    assert run_prepare("mimic-cxr", "--root", root, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert culprit in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command, culprit", [
    ("mimic-cxr --root NONE --out OUT", "NONE/files"),
    ("mimic-cxr --root NONE --out OUT --reprots c", "did you mean --reports?"),
    ("diff-vqa --root NONE --out OUT --questions NONE", "NONE/files"),
    ("check NONE", "NONE"),
    ("phantom --out OUT --patients 0", "patients 0"),
    ("phantom --out OUT --workers 0", "--workers 0"),
    ("phantom --out OUT --workers 3000", "--workers 3000"),
    ("cache --worker 3", "--records"),
    ("chekc FILE", "chekc"),
])  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(tmp_path, monkeypatch, capsys, command, culprit):
    monkeypatch.chdir(tmp_path)
    try:
        status = run_prepare(*command.split())
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2 and culprit in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
