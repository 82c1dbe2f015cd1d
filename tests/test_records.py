"""Record files, against the objects that Python's json wrote; the check, by an example of each mistake."""

import json
import pickle
from dataclasses import replace

import pytest
from conftest import GOLDEN, load, training_record, write_jsonl
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
    path = write_jsonl(tmp_path / "records.jsonl", [training_record()])
    path.write_text(path.read_text() + '\n{"id": \n')
    with pytest.raises(ValueError, match="line 3: is not JSON"):
        check(Records(path), Record)
    with pytest.raises(ValueError, match=r"records\.jsonl line 3 is not JSON"):
        Records(path)[1]


SAID = training_record()["conversations"]
MISTAKES = {  # words of the message: the record
    "id is missing": training_record(id=None),
    "neither a file name nor a list": training_record(image=["0.png"] * 3),
    "image [None]": training_record(image=[None]),
    "conversations is not": training_record(conversations=[{"from": "human"}]),
    "speakers are none": training_record(conversations=[]),
    "speakers are gpt, human": training_record(conversations=SAID[::-1]),
    "speakers are human, not": training_record(conversations=SAID[:1]),
    "speakers are human, human": training_record(conversations=SAID[:1] * 2),
    "answer is empty": training_record(answer=" \n"),
    "answer contains <image>": training_record(answer="<image>"),
    "<image> occurs 1 times in the questions, not 0": training_record(image=[]),
    "<image> occurs 2 times in the questions, not 1": training_record("<image>"),
    "<image> occurs 0 times": training_record(conversations=[{"from": "human", "value": "?"}, SAID[1]]),
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


def test_all_mistakes_come_in_one_line_of_text(tmp_path, folder):
    records = [training_record(), *MISTAKES.values(), training_record(image="inside.png"), [], "text", None, 3]
    path = write_jsonl(tmp_path / "records.jsonl", records)
    with pytest.raises(ValueError) as error:
        check(Records(path), Record, folder.find)
    head, problems = str(error.value).split(", 22 in all: ")
    assert str(path) in head
    assert "\n" not in problems
    problems = problems.split("; ")
    for line, (words, problem) in enumerate(zip(MISTAKES, problems, strict=False), 2):
        assert problem.startswith(f"line {line}: ")
        assert words in problem
    # no more than 20 are listed
    assert problems[18:] == ["line 21: is not a JSON object", "line 22: is not a JSON object"]


def test_a_missing_image_is_reported_once(tmp_path, folder):
    records = [training_record(image="none.png"), training_record(image="none.png")]
    with pytest.raises(ValueError, match="1 in all: line 1: no image none"):
        check(Records(write_jsonl(tmp_path / "records.jsonl", records)), Record, folder.find)


def test_a_good_file_is_counted(tmp_path, folder):
    text = training_record(id=9, image=None, conversations=[{"from": "human", "value": "Hi?"}, SAID[1]])
    pair, again = training_record(id=8, image=["1.png", "0.png"]), training_record(id="7", image="inside.png")
    path = write_jsonl(tmp_path / "records.jsonl", [training_record(id=7), pair, again, text])
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


def test_mistakes_in_questions(tmp_path, folder):
    line = {"question_id": 1, "image": "0.png", "text": "Has it grown?"}
    lines = [line, line, line | {"text": "<image>?"}, line | {"image": []}, line | {"findings": 3}, {"text": "?"}]
    with pytest.raises(ValueError) as error:
        check(Records(write_jsonl(tmp_path / "questions.jsonl", lines)), Question, folder.find)
    for words in ("2: its id was there", "3: text is", "4: there is no", "5: findings is", "6: there is no"):
        assert f" line {words}" in str(error.value)


def test_a_missing_image_folder_is_refused(tmp_path):
    for folder in (tmp_path / "none", ""):
        with pytest.raises(NotADirectoryError, match="no image folder"):
            ImageFolder(folder, None)
