"""Oracle: the bytes of the file that one run writes. Parts that do not make a whole are refused; nothing is written."""

import json
import os
from pathlib import Path

import pytest
from conftest import one_line, read_lines, write_lines
from test_answering import answer, make_questions

import eval as cli
import sample

SHORT = ("--batch-size", 4, "--max-new-tokens", 4)


def merge(questions: Path, out: Path, *parts) -> int:
    words = ["merge", "--questions", questions, "--answers", out, *parts]
    return cli.main(cli.parse([str(word) for word in words]))


@pytest.fixture
def questions(tmp_path):
    return write_lines(tmp_path / "q.jsonl", make_questions())


@pytest.fixture
def parts(questions, tmp_path, capsys):
    """20 questions in three parts of five batches."""
    paths = [tmp_path / f"part{k}" for k in (1, 2, 3)]
    for k, path in enumerate(paths, start=1):
        assert answer(questions, path, *SHORT, "--part", f"{k}/3") == 0
    capsys.readouterr()
    return paths


def sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def test_merged_parts_are_what_one_run_writes(questions, parts, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert answer(questions, whole, *SHORT) == 0
    assert sorted(len(read_lines(path)) for path in parts) == [4, 8, 8]
    assert merge(questions, out, parts[2], parts[0], parts[1]) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert sidecar(out).read_bytes() == sidecar(whole).read_bytes()
    # merging again changes nothing
    assert merge(questions, out, *parts) == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("flags", [("--ids", "1,q2,q4,5"), ("--limit", 7, "--prior", "shuffled", "--seed", 3)])
def test_parts_of_chosen_questions_merge_and_a_part_may_be_empty(questions, tmp_path, flags):
    whole, out, parts = tmp_path / "whole", tmp_path / "out", [tmp_path / f"part{k}" for k in (1, 2, 3)]
    assert answer(questions, whole, *SHORT, *flags) == 0
    for k, path in enumerate(parts, start=1):
        for _ in range(2):
            assert answer(questions, path, *SHORT, *flags, "--part", f"{k}/3") == 0
    assert parts[2].read_bytes() == b""
    assert merge(questions, out, *parts) == 0
    assert out.read_bytes() == whole.read_bytes() and sidecar(out).read_bytes() == sidecar(whole).read_bytes()


def test_a_part_resumes_and_is_not_mixed_with_another(questions, parts, tmp_path, monkeypatch, capsys):
    out, decode, calls = tmp_path / "again", sample.decode, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(sample, "decode", interrupted)
    assert answer(questions, out, *SHORT, "--part", "1/3") == 130
    capsys.readouterr()
    assert answer(questions, out, *SHORT, "--part", "2/3") == 2
    assert "part 1/3, not 2/3" in one_line(capsys)
    assert answer(questions, out, *SHORT, "--part", "1/3") == 0
    assert len(calls) == 3 and out.read_bytes() == parts[0].read_bytes()


def test_several_sequences_are_kept_beside_the_best(questions, tmp_path):
    """The oracle: a run that returns one."""
    for flags in (("--num-beams", 3), ("--temperature", 1)):
        one, three = tmp_path / f"one{flags[0]}", tmp_path / f"three{flags[0]}"
        assert answer(questions, one, *SHORT, *flags, "--limit", 4) == 0
        assert answer(questions, three, *SHORT, *flags, "--limit", 4, "--num-return-sequences", 3) == 0
        lines = read_lines(three)
        texts = [line.pop("texts") for line in lines]
        assert lines == read_lines(one)
        assert all(len(set(some)) == 3 and some[0] == line["text"] for some, line in zip(texts, lines, strict=True))


def set_field(path: Path, **fields):
    settings = json.loads(sidecar(path).read_text())
    sidecar(path).write_text(json.dumps(settings | fields))


def write_settings(parts: list[Path], **fields):
    for path in parts:
        set_field(path, **fields)


def changed_questions() -> list[dict]:
    *others, last = make_questions()
    return [*others, last | {"text": "Another question?"}]


@pytest.mark.parametrize(("change", "chosen", "problem"), [
    (lambda parts: None, (0, 2), "part 2/3 is missing"),
    (lambda parts: None, (0, 1, 2, 1), "are both part 2/3"),
    (lambda parts: parts[1].unlink(), (0, 1, 2), "(part 2/3) is not finished"),
    (lambda parts: sidecar(parts[1]).unlink(), (0, 1, 2), "has no part2.settings.json"),
    (lambda parts: set_field(parts[1], part=None), (0, 1, 2), "part2 is no part"),
    (lambda parts: set_field(parts[1], part="2/4"), (0, 1, 2), "part of 4, not of 3"),
    (lambda parts: set_field(parts[1], part="x"), (0, 1, 2), "x is no part K/N"),
    (lambda parts: set_field(parts[1], num_beams=2), (0, 1, 2), "part2 was made with num_beams 2, not 1"),
    (lambda parts: set_field(parts[1], part_ids=7), (0, 1, 2), "part_ids is 7"),
    (lambda parts: set_field(parts[1], part=2), (0, 1, 2), "part is 2, expected a text"),
    (lambda parts: set_field(parts[1], model="x" * 9999), (0, 1, 2), "part2 was made with model xxx"),
    (lambda parts: sidecar(parts[1]).write_text("{}"), (0, 1, 2), "part2 is no part"),
    (lambda parts: sidecar(parts[1]).write_text('{"a'), (0, 1, 2), "part2.settings.json is not JSON"),
    (lambda parts: write_settings(parts, seed="0"), (0, 1, 2), "seed is '0', expected a whole number"),
    (lambda parts: write_settings(parts, prior=["true"]), (0, 1, 2), "prior is ['true']"),
    (lambda parts: write_settings(parts, questions=20), (0, 1, 2), "questions is 20"),
    (lambda parts: write_settings(parts, batch_size=None), (0, 1, 2), "batch_size is None"),
    (lambda parts: write_settings(parts, num_beams="1"), (0, 1, 2), "num_beams is '1', expected a whole number"),
    (lambda parts: (parts[1].unlink(), parts[1].mkdir()), (0, 1, 2), "part2 is a folder"),
    (lambda parts: parts[1].write_bytes(b"\xff\n"), (0, 1, 2), "part2 line 1"),
    (lambda parts: parts[1].write_text(""), (0, 1, 2), "part2 is empty"),
    (lambda parts: parts[1].write_text(parts[1].read_text()[:-9]), (0, 1, 2), "part2"),
    (lambda parts: write_lines(parts[1].with_name("q.jsonl"), make_questions()[:-1]), (0, 1, 2), "20 questions"),
    (lambda parts: write_lines(parts[1].with_name("q.jsonl"), changed_questions()), (0, 1, 2), "20 questions"),
    (lambda parts: parts[1].with_name("out").write_text("{}"), (0, 1, 2), "holds other answers"),
    (lambda parts: parts[1].with_name(".out.0").write_text(""), (0, 1, 2), "a run that has not ended"),
    (lambda parts: parts[1].with_name("out").write_bytes(b"\xff"), (0, 1, 2), "holds other answers"),
], ids=range(27))  # fmt: skip
def test_parts_that_make_no_whole_are_refused(questions, parts, tmp_path, capsys, change, chosen, problem):
    change(parts)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert merge(questions, tmp_path / "out", *(parts[k] for k in chosen)) == 2
    line = one_line(capsys)
    assert problem in line and len(line) < 700
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_output_is_no_pipe_and_has_no_other_settings(questions, parts, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert merge(questions, tmp_path / "pipe", *parts) == 2
    assert "pipe holds other answers" in one_line(capsys)
    assert merge(questions, tmp_path / "out", *parts) == 0
    set_field(tmp_path / "out", num_beams=2)
    before = sidecar(tmp_path / "out").read_bytes()
    capsys.readouterr()
    assert merge(questions, tmp_path / "out", *parts) == 2
    assert "holds other answers" in one_line(capsys) and sidecar(tmp_path / "out").read_bytes() == before


def test_a_folder_is_no_part(questions, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for out, part in (("out", "."), (".", "part1"), ("out", "..")):
        assert merge(questions, out, part) == 2
        assert "is a folder: give" in one_line(capsys)


def test_the_output_is_no_part_and_no_questions(questions, parts, capsys):
    before = {path.name: path.read_bytes() for path in questions.parent.iterdir()}
    for name in (parts[1], questions, sidecar(parts[0])):
        assert merge(questions, name, *parts) == 2
        assert f"{name} is given twice" in one_line(capsys)
    assert {path.name: path.read_bytes() for path in questions.parent.iterdir()} == before


def test_an_id_in_two_parts_is_named(questions, parts, tmp_path, capsys):
    """As if the parts were cut with two tokenizers."""
    first = read_lines(parts[0])[0]
    write_lines(parts[1], [first, *read_lines(parts[1])])
    ids = json.loads(sidecar(parts[1]).read_text())["part_ids"]
    set_field(parts[1], part_ids=[str(first["question_id"]), *ids])
    assert merge(questions, tmp_path / "out", *parts) == 2
    assert f"both answer question {first['question_id']}" in one_line(capsys)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5"])
def test_a_part_is_k_of_n(questions, tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        answer(questions, tmp_path / "a", f"--part={text}")
    assert "is no part K/N" in one_line(capsys)
