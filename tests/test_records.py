"""Record files, against the objects that Python's json wrote; the check, by an example of each oddity."""

import itertools
import json
import os
import pickle
import re
from dataclasses import replace

import pytest
from conftest import GOLDEN, load, one_line, training_record, write_lines
from PIL import Image

from data import ImageFolder, Question, Record, Records, check

TRICKY = [{"text": 'ab ,:[]{}"\\/\n\r\t\u0085é漢🫁\x00'}, {"[": [{"a": [1e-7, -1, None, True]}, []]}, {}, {'"}\n': ""}]

LAYOUTS = {
    "list": lambda records: json.dumps(records),
    "indented list": lambda records: "\ufeff \n" + json.dumps(records, indent=3, ensure_ascii=False),
    "list, Windows": lambda records: json.dumps(records, indent=1).replace("\n", "\r\n") + "\r\n\r\n",
    "lines": lambda records: "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
    "lines, Windows": lambda records: "\ufeff" + "\r\n\r\n".join(json.dumps(record) for record in records),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_are_what_json_reads(tmp_path, layout):
    path = tmp_path / "records"
    for records in [TRICKY, []] if "list" in layout else [TRICKY]:
        path.write_bytes(LAYOUTS[layout](records).encode())
        assert list(Records(path)) == records


@pytest.mark.parametrize("layout", ["list", "lines"])
def test_a_worker_process_opens_the_file_itself(tmp_path, layout):
    path = tmp_path / "records"
    path.write_text(LAYOUTS[layout]([{"number": number} for number in range(1000)]))
    message = pickle.dumps(Records(path))
    assert len(message) < 500
    assert list(pickle.loads(message)) == list(Records(path))


def test_a_list_that_is_cut_or_goes_on_is_refused(tmp_path):
    path = tmp_path / "records.json"
    text = json.dumps([{"a": 'b"]'}, {"c": [1, {"d": None}]}, {}])
    cut = [text[:end] for end in range(1, len(text))]
    for broken in [*cut, text + ",", text + text, text.replace("null", "nul"), "[" * 100_000]:
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"records\.json is not JSON") as error:
            Records(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", " \n", "\ufeff"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "records.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"records\.json is empty"):
        Records(path)


def test_a_broken_line_is_named(tmp_path):
    path = write_lines(tmp_path / "records.jsonl", [training_record()])
    path.write_text(path.read_text() + '\n{"id": \n')
    with pytest.raises(ValueError, match="line 3: is not JSON"):
        check(Records(path), Record, strict=True)
    with pytest.raises(ValueError, match=r"records\.jsonl line 3 is not JSON"):
        Records(path)[1]


@pytest.mark.parametrize("character", ["x", "{", "5", " ", "\x00", '"', "]"])
def test_a_line_of_one_character_is_not_lost(tmp_path, character):
    path = tmp_path / "records.jsonl"
    good = json.dumps(training_record())
    for text in (f"{good}\n{character}", f"{good}\n\n{character}\n{good}"):
        path.write_text(text)
        told = []
        assert check(Records(path), Record, tell=told.append).odd == 1
        assert "1 of" in told[0] and f"line {2 + text.count(chr(10) * 2)}: is not" in told[0]


def test_a_record_that_is_nested_too_deeply_or_too_long_is_left_out(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    deep = '{"id": ' + "[" * 100_000 + "]" * 100_000 + "}"
    path.write_text("\n".join([deep, json.dumps(training_record()), json.dumps(training_record("Why? " * 99_999))]))
    monkeypatch.setattr("data.RECORD_BYTES", 300_000)
    told = []
    checked = check(Records(path), Record, tell=told.append)
    assert list(checked.numbers) == [1]
    assert "1 × is not JSON" in told[0] and "1 × is too long" in told[0]


def test_a_pipe_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe"):
        Records(tmp_path / "pipe")


SAID = training_record()["conversations"]
HUMAN, GPT = SAID
ASKED = {"from": "human", "value": "<image> And now?"}
ODD = {  # the reason for which a record is left out: such records
    "image has the wrong type": [
        training_record(image=image) for image in ([None], 3, {"a": 1}, float("nan"), ["0.png"] * 3, False)
    ],
    "image holds an empty name": [training_record(image=[""])],
    "conversations has the wrong type": [training_record(conversations=value) for value in ("Hi", ["Hi"], None, 0)],
    "value has the wrong type": [
        training_record(conversations=messages)
        for messages in ([{"from": "human"}, GPT], [HUMAN, {"from": "gpt", "value": ["It has."]}])
    ],
    "human and gpt do not speak in turn": [
        training_record(conversations=messages)
        for messages in ([], [GPT], [HUMAN, HUMAN], [GPT, GPT, HUMAN, GPT], [{"from": ["a"] * 99, "value": ""}, GPT])
    ],
    "the last question has no answer": [training_record(conversations=SAID[:1])],
    "an answer is empty": [training_record(answer=""), training_record(answer=" \n")],
    "an answer contains <image>": [training_record(answer="<image>")],
    "a question contains <image>, but image names none": [training_record(image=[]), training_record(image=None)],
    "several questions contain <image>": [training_record(conversations=[*SAID, ASKED, GPT])],
    "is not a JSON object": ["text", None, 3, []],
    "holds half a character (a lone surrogate)": [training_record("\ud83e"), training_record(id="\udfff")],
}
MISSING = {  # words of the message: a record whose image is not there
    "none.png": training_record(image=["0.png", "none.png"]),
    "image /0.png leads out": training_record(image="/0.png"),
    "image a/../../0.png leads out": training_record(image="a/../../0.png"),
    "image link.png leads out": training_record(image="link.png"),
    "null byte": training_record(image="a\x00.png"),
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        Image.new("L", (3, 3)).save(folder / name)
    (folder / "link.png").symlink_to(GOLDEN / "images" / "0.png")
    (folder / "inside.png").symlink_to("0.png")
    return ImageFolder(folder, replace(load("libra-7b").pixels, pad="black"))


@pytest.mark.parametrize("reason", ODD)
def test_odd_records_are_left_out_and_counted_by_reason(tmp_path, folder, reason):
    odd = ODD[reason]
    path = write_lines(tmp_path / "records.jsonl", [training_record(), *odd, training_record(id="2")])
    told = []
    checked = check(Records(path), Record, folder.find, tell=told.append)
    assert list(checked.numbers) == [0, 1 + len(odd)]
    (line,) = told
    assert f"{path}: {len(odd)} of {len(odd) + 2} records are left out, {len(odd)} × {reason};" in line
    assert line.count("line ") == min(len(odd), 5) and f"line 2: {reason}" in line
    # strict refuses the file, and so does everybody if nothing is left
    for records, strict in (([training_record(), *odd], True), (odd, False)):
        with pytest.raises(ValueError, match=f"has problems, {len(odd)} in all: line .: {re.escape(reason)}"):
            check(Records(write_lines(path, records)), Record, folder.find, strict=strict)


def test_one_line_says_what_is_left_out(tmp_path, capsys, monkeypatch):
    path = write_lines(tmp_path / "records.jsonl", [training_record(), *itertools.chain(*ODD.values())])
    check(Records(path), Record)
    printed = one_line(capsys)
    assert all(f" × {reason}" in printed for reason in ODD) and len(printed) < 2000
    # the other processes of torchrun are silent
    monkeypatch.setenv("RANK", "1")
    check(Records(path), Record)
    assert not capsys.readouterr().err


def test_images_that_are_not_there_are_an_error_in_one_line(tmp_path, folder):
    records = [training_record(), *MISSING.values(), training_record(image="inside.png"), *ODD["an answer is empty"]]
    path = write_lines(tmp_path / "records.jsonl", records)
    with pytest.raises(ValueError) as error:
        check(Records(path), Record, folder.find)
    head, problems = str(error.value).split(", 5 in all: ")
    assert str(path) in head and "\n" not in problems
    for line, (words, problem) in enumerate(zip(MISSING, problems.split("; "), strict=True), 2):
        assert problem.startswith(f"line {line}: ") and words in problem


def test_no_more_than_20_problems_are_listed(tmp_path):
    path = write_lines(tmp_path / "records.jsonl", [training_record(answer="")] * 30)
    with pytest.raises(ValueError, match="30 in all") as error:
        check(Records(path), Record)
    assert str(error.value).count("an answer is empty") == 20


TAKEN = {  # records that the published code takes: (the record, its images, its turns)
    "no id": (training_record(id=None), ["0.png"], [("<image>\nHas it grown?", "It has.")]),
    "an id of another type": (training_record(id=1.5), ["0.png"], [("<image>\nHas it grown?", "It has.")]),
    "gpt speaks first": (
        training_record(conversations=[{"from": "gpt", "value": "Hello."}, *SAID]),
        ["0.png"], [("<image>\nHas it grown?", "It has.")],
    ),
    "two <image> in a question": (training_record("<image>Why?"), ["0.png"], [("<image>\nWhy?", "It has.")]),
    "no <image>": (training_record(conversations=[{"from": "human", "value": "Why?"}, GPT]), [], [("Why?", "It has.")]),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_what_the_published_code_takes_in_a_clear_way_is_taken_so(case):
    """preprocess_multimodal and preprocess_libra in libra/train/train.py, by hand."""
    raw, images, turns = TAKEN[case]
    record = Record.parse(raw)
    assert (record.images, record.turns) == (images, turns)


def test_images_that_no_question_shows_are_told(tmp_path):
    told = []
    raw, _, _ = TAKEN["no <image>"]
    path = write_lines(tmp_path / "records.jsonl", [raw, training_record()])
    checked = check(Records(path), Record, tell=told.append)
    assert checked.alone == 1 and "1 records name images, but no question has <image>" in told[0]


def test_a_missing_image_is_reported_once(tmp_path, folder):
    records = [training_record(image="none.png"), training_record(image="none.png")]
    with pytest.raises(ValueError, match="1 in all: line 1: no image none"):
        check(Records(write_lines(tmp_path / "records.jsonl", records)), Record, folder.find)


def test_a_good_file_is_counted(tmp_path, folder):
    text = training_record(id=9, image=None, conversations=[{"from": "human", "value": "Hi?"}, SAID[1]])
    pair, again = training_record(id=8, image=["1.png", "0.png"]), training_record(id="7", image="inside.png")
    path = write_lines(tmp_path / "records.jsonl", [training_record(id=7), pair, again, text])
    checked = check(Records(path), Record, folder.find)
    assert (checked.duplicates, checked.images, checked.alone) == (1, 3, 1)


def test_the_image_moves_to_the_front_of_its_question():
    said = [{"from": "human", "value": "Look <image> here"}, {"from": "gpt", "value": "Yes."}]
    record = Record.parse(training_record(image=["0.png", "0.png"], conversations=said))
    assert record == Record("1", ["0.png"], [("<image>\nLook  here", "Yes.")])
    assert record.starts_with_image


def test_the_reference_of_a_question_is_its_first_field_with_a_value():
    line = {"question_id": 1, "image": ["0.png", "1.png"], "text": "Has it grown?"}
    assert Question.parse(line).reference is None
    assert Question.parse(line | {"impression": "I", "findings": "F"}).reference == "F"
    question = Question.parse(line | {"findings": "F", "reference": "R"})
    assert question == Question(1, ["0.png", "1.png"], "Has it grown?", "R")
    # a training record is a question too
    assert Question.parse(training_record()) == Question("1", ["0.png"], "Has it grown?", "It has.")


def test_every_name_of_a_reference_is_read():
    """reference_report is the name in the released IU-Xray split (X-iZhang/CCD#3)."""
    line = {"question_id": 0, "image": "0.png", "text": "Describe.", "reference_report": "Normal."}
    assert Question.parse(line).reference == "Normal."
    assert Question.parse(line | {"findings": "F"}).reference == "F"


def test_questions_as_llava_med_writes_them():
    """Its evaluation takes "<image>" out of the text; its records name themselves by id."""
    line = {"question_id": 5, "image": "0.png", "text": "What is it?\n<image>"}
    assert Question.parse(line) == Question(5, ["0.png"], "What is it?", None)
    assert Question.parse({"id": "a", "image": "0.png", "text": "?"}).id == "a"
    # a conversation that waits for its answer is a question without a reference
    assert Question.parse(training_record(conversations=SAID[:1])) == Question("1", ["0.png"], "Has it grown?", None)


def test_odd_questions_are_left_out(tmp_path, folder):
    line = {"question_id": 1, "image": "0.png", "text": "Has it grown?"}
    reasons = {
        "its id was there already": [line, line | {"question_id": "1"}],
        "there is no image": [line | {"image": []}, {"text": "?"}],
        "text has the wrong type": [line | {"text": None}, line | {"text": 3}],
        "findings has the wrong type": [line | {"findings": 3}],
        "reference has the wrong type": [line | {"reference": float("nan")}],
        "question_id has the wrong type": [line | {"question_id": True}, line | {"question_id": [1]}],
        "has no question_id": [line | {"question_id": None}],
    }
    lines = [line, *itertools.chain(*reasons.values())]
    told = []
    checked = check(Records(write_lines(tmp_path / "q.jsonl", lines)), Question, folder.find, tell=told.append)
    assert list(checked.numbers) == [0]
    assert all(f"{len(odd)} × {reason}" in told[0] for reason, odd in reasons.items())


def test_a_missing_image_folder_is_refused(tmp_path):
    for folder in (tmp_path / "none", ""):
        with pytest.raises(NotADirectoryError, match="no image folder"):
            ImageFolder(folder, None)
