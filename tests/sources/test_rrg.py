"""The published evaluation set, from parquet files written by pyarrow."""

import pytest
from conftest import picture, read_lines, run_prepare


@pytest.fixture
def published(tmp_path):
    """A folder with four rows in two files, the third of which has no readable image."""
    pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({
        "main_image": [picture(1), picture(2, "JPEG"), {"bytes": b"no image", "path": None}, picture(1)],
        "prior_image": [picture(3), None, picture(1), picture(1)],
        "default_prompt": ["What?", "And?", "Why?", "So?"],
        "findings": ["A heart.\nTwo lungs.", "None.", "Lost.", "Again."],
    })  # fmt: skip
    folder = tmp_path / "set" / "findings_section"
    folder.mkdir(parents=True)
    parquet.write_table(table.slice(0, 2), folder / "test-00000-of-00002.parquet")
    parquet.write_table(table.slice(2), folder / "test-00001-of-00002.parquet")
    return tmp_path / "set"


def test_rows_become_questions_and_image_files(published, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_prepare("rrg", "--source", published, "--out", out, "--reference", "findings") == 0
    assert "1  rows whose image is missing or cannot be read" in capsys.readouterr().out
    questions = read_lines(out / "findings_section_test_questions.jsonl")
    assert [question["question_id"] for question in questions] == [f"findings_section_test_{row}" for row in (0, 1, 3)]
    assert [question["text"] for question in questions] == ["What?", "And?", "So?"]
    assert [question["reference"] for question in questions] == ["A heart. Two lungs.", "None.", "Again."]

    # the current image in the prior's place is a dummy
    images = [[(out / name).read_bytes() for name in question["image"]] for question in questions]
    assert images == [[picture(1)["bytes"], picture(3)["bytes"]], [picture(2, "JPEG")["bytes"]], [picture(1)["bytes"]]]
    # equal images share a file
    assert sorted(path.suffix for path in (out / "images").iterdir()) == [".jpg", ".png", ".png"]


def write_set(folder, **columns):
    from pyarrow import Table, parquet

    folder.mkdir()
    parquet.write_table(Table.from_pydict(columns), folder / "test.parquet")
    return folder


def test_the_reference_is_the_column_of_the_configuration_and_mimics_ids_are_kept(published, tmp_path):
    columns = dict(main_image=[picture(1)] * 3, prior_image=[None] * 3, default_prompt=["What?"] * 3)
    columns |= dict(findings_section=["A heart.", "Lungs.", ""], dicom_id=["a", "b", None], study_id=[1.0, 1.0, 1.0])
    assert run_prepare("rrg", "--source", write_set(tmp_path / "ids", **columns), "--out", tmp_path / "out") == 0
    lines = read_lines(tmp_path / "out" / "findings_section_test_questions.jsonl")
    assert [line["reference"] for line in lines] == ["A heart.", "Lungs.", ""]
    assert [line["question_id"] for line in lines] == ["a", "b", "1"]
    assert [line["study_id"] for line in lines] == ["1", "1", "1"] and lines[0]["dicom_id"] == "a"


def test_what_is_no_image_and_no_id_is_left_out(published, tmp_path, capsys):
    empty = {"bytes": None, "path": None}
    columns = dict(main_image=[empty, picture(1)], prior_image=[picture(2), empty], default_prompt=["What?"] * 2)
    folder = write_set(tmp_path / "empty", **columns, dicom_id=[[1], [1]])
    assert run_prepare("rrg", "--source", folder, "--out", tmp_path / "out") == 0
    assert "1  rows whose image is missing or cannot be read" in capsys.readouterr().out
    (line,) = read_lines(tmp_path / "out" / "findings_section_test_questions.jsonl")
    assert line["question_id"] == "findings_section_test_1" and len(line["image"]) == 1


def test_a_row_cannot_name_a_file_outside_of_its_set(published, tmp_path, capsys):
    (tmp_path / "secret.png").write_bytes(picture(9)["bytes"])
    paths = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "inside.png"]
    images = [{"bytes": None, "path": path} for path in paths]
    columns = dict(main_image=images, prior_image=[None] * 4, default_prompt=["What?"] * 4)
    folder = write_set(tmp_path / "paths", **columns)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inside.png").write_bytes(picture(1)["bytes"])
    assert run_prepare("rrg", "--source", folder, "--out", tmp_path / "out") == 0
    assert "3  rows whose image is missing or cannot be read" in capsys.readouterr().out
    (image,) = (tmp_path / "out" / "images").iterdir()
    assert image.read_bytes() == picture(1)["bytes"]


def test_without_a_column_for_it_there_is_no_reference(published, tmp_path):
    assert run_prepare("rrg", "--source", published / "findings_section", "--out", tmp_path) == 0
    questions = read_lines(tmp_path / "findings_section_test_questions.jsonl")
    assert all("reference" not in question for question in questions)


@pytest.mark.parametrize("flag, value", [("--reference", "impressions"), ("--split", "dev")])
def test_what_the_set_lacks_is_named(published, tmp_path, capsys, flag, value):
    assert run_prepare("rrg", "--source", published, "--out", tmp_path / "out", flag, value) == 2
    error = capsys.readouterr().err
    assert value in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
