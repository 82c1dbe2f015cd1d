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
