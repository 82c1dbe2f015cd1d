"""Oracles: scores worked out by hand for files of a few lines. The command line's tables, files, JSON and mistakes."""

import csv
import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT, one_line, read_lines, write_lines

import eval as cli
from evaluation import pairs, tables
from phantom import hospital
from plumbing.files import atomic

pytestmark = pytest.mark.usefixtures("no_meteor")


def run(*arguments) -> int:
    return cli.main(cli.parse([str(argument) for argument in arguments]))


def scored(capsys, *arguments) -> dict:
    """What `eval.py … --json` prints."""
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


REFERENCES = ["Stable heart.", "New edema.", "Clear lungs.", "No change.", "Effusion."]
PREDICTIONS = ["Stable heart.", "Old edema.", "Clear lungs.", "No change.", "Effusion."]
IMAGES = [["a.png", "b.png"], ["c.png", "d.png"], ["e.png", "e.png"], "f.png", ["g.png", "h.png"]]


@pytest.fixture
def questions(tmp_path):
    """Five studies: three with a prior, one with its current image named twice, one without."""
    lines = [{"question_id": i, "image": IMAGES[i], "text": "Findings?", "reference": REFERENCES[i]} for i in range(5)]
    return write_lines(tmp_path / "q.jsonl", lines)


@pytest.fixture
def answers(tmp_path):
    """Answers in another order than the questions."""
    lines = [{"question_id": i, "prompt": "", "text": PREDICTIONS[i], "model_id": "tiny"} for i in range(5)]
    return write_lines(tmp_path / "a.jsonl", lines[::-1])


@pytest.fixture
def score(questions, answers):
    """The arguments that score the answers."""
    return ["score", "--references", questions, "--predictions", answers]


def test_scores_are_split_by_prior(score, capsys):
    result = scored(capsys, *score)
    assert (result["model"], result["studies"]) == ("tiny", {"all": 5, "with prior": 3, "without prior": 2})
    value = lambda key: {group: round(found["value"], 4) for group, found in result["scores"][key].items()}
    assert value("Temporal_entity_score") == {"all": 80, "with prior": 66.6667, "without prior": 100}
    assert value("Temporal_floor") == {"all": 40, "with prior": 33.3333, "without prior": 50}
    assert value("ROUGE-L")["all"] == 90
    assert result["scores"]["ROUGE-L"]["all"]["low"] < 90 <= result["scores"]["ROUGE-L"]["all"]["high"]
    assert scored(capsys, *score) == result  # the bootstrap is seeded
    assert run(*score) == 0
    table = capsys.readouterr().out
    assert "all (5)" in table and "90.00 [" in table and "never mentions change" in table


def test_ids_score_some_of_the_references(score, questions, answers, capsys):
    """Worked out by hand: of studies 0, 1 and 3 one is wrong in one word of two."""
    result = scored(capsys, *score, "--ids", "1,3,0")
    assert result["studies"] == {"all": 3, "with prior": 2, "without prior": 1}
    assert result["scores"]["ROUGE-L"]["all"]["value"] == pytest.approx(100 * (1 + 0.5 + 1) / 3)
    # answers to these questions alone are enough
    write_lines(answers, [line for line in read_lines(answers) if line["question_id"] in (0, 1, 3)])
    assert scored(capsys, *score, "--ids", "1,3,0") == result
    compare = ["score", "--references", questions, "--compare", answers, answers, "--ids", "0,1"]
    assert scored(capsys, *compare)["studies"]["all"] == 2


@pytest.mark.parametrize(("ids", "problem"), [("1,77", "has no question 77"), (",", "names no id"), ("4", "missing")])
def test_ids_that_cannot_be_scored_are_named(score, answers, capsys, ids, problem):
    write_lines(answers, read_lines(answers)[1:])
    assert run(*score, "--ids", ids) == 2
    assert problem in one_line(capsys)


def test_questions_without_images_are_not_split(tmp_path):
    questions = [{"question_id": 1, "findings": "a"}, {"question_id": "2", "impression": "b"}]
    answers = [{"question_id": "1", "text": "a"}, {"question_id": 2, "text": "b"}]
    found = pairs.read_pairs(write_lines(tmp_path / "q", questions), write_lines(tmp_path / "a", answers))
    assert [pair.reference for pair in found] == ["a", "b"]
    assert list(pairs.groups_of(found)) == ["all"]


def test_the_csv_file_gets_a_row_with_the_published_columns(score, tmp_path):
    table = tmp_path / "s.csv"
    for _ in range(2):
        assert run(*score, "--csv", table, "--model-name", 'a "b", c') == 0
    header, *rows = csv.reader(table.read_text().splitlines())
    assert header == ["Model Name", "BLEU1", "BLEU2", "BLEU3", "BLEU4", "METEOR", "ROUGE-L", "Bert_score",
                      "Temporal_entity_score"]  # fmt: skip
    assert len(rows) == 2 and rows[0] == rows[1]
    row = dict(zip(header, rows[0], strict=True))
    assert (row["Model Name"], row["ROUGE-L"], row["Bert_score"]) == ('a "b", c', "90.0", "")


def test_compare_prints_paired_differences(questions, answers, tmp_path, capsys):
    perfect = [{"question_id": i, "text": REFERENCES[i]} for i in range(5)]
    compare = ["score", "--references", questions, "--compare", answers, write_lines(tmp_path / "b", perfect)]
    rouge = scored(capsys, *compare)["scores"]["ROUGE-L"]
    assert (rouge["all"]["a"], rouge["all"]["b"], rouge["all"]["difference"]["value"]) == (90, 100, 10)
    assert rouge["without prior"]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert run(*compare) == 0
    assert "with prior (3)" in capsys.readouterr().out


def test_export_writes_what_radeval_takes(score, tmp_path):
    assert run(*score, "--export", tmp_path / "pairs.json") == 0
    lists = json.loads((tmp_path / "pairs.json").read_text())
    assert (lists["references"], lists["hypotheses"]) == (REFERENCES, PREDICTIONS)


def test_merge_adds_radeval_s_scores_to_json_csv_and_page(score, tmp_path, capsys):
    merged, table, page = (tmp_path / name for name in ("radeval.json", "s.csv", "p.html"))
    merged.write_text(json.dumps({"radgraph_simple": [1, 0.5, 1, 1, 0], "f1chexbert_5_micro_f1": 0.75}))
    scores = scored(capsys, *score, "--merge", merged, "--csv", table, "--html", page)["scores"]
    assert scores["radgraph_simple"]["all"]["value"] == pytest.approx(0.7)
    assert scores["radgraph_simple"]["without prior"] == {"value": 1, "low": 1, "high": 1}
    assert scores["f1chexbert_5_micro_f1"] == {"all": {"value": 0.75, "low": None, "high": None}}
    row = next(csv.DictReader(table.read_text().splitlines()))
    assert (row["radgraph_simple"], row["f1chexbert_5_micro_f1"]) == ("0.7", "0.75")
    assert page.read_text().count("radgraph_simple") == 2  # a score, and a value of each study


@pytest.mark.parametrize("content", ['{"a": [1, 2]}', '{"a": {"b": 1}}', '{"a": NaN}', '{"BLEU1": 1}', "[1]", "x"])
def test_what_radeval_did_not_write_is_refused(score, tmp_path, capsys, content):
    (tmp_path / "radeval.json").write_text(content)
    assert run(*score, "--merge", tmp_path / "radeval.json") == 2
    assert "radeval.json" in one_line(capsys)


ANSWERS = [{"question_id": i, "text": text} for i, text in enumerate(PREDICTIONS)]


@pytest.mark.parametrize(("lines", "culprit"), [
    ([*ANSWERS, ANSWERS[1]], "1 ids come twice .*first: 1"),
    ([*ANSWERS, {"question_id": "x", "text": ""}], "1 ids .*not in .*first: x"),
    (ANSWERS[:2], "3 ids .*missing .*first: 2"),
    ([{"question_id": i} for i in range(5)], "a.jsonl line 1: .*findings, impression, text"),
    ([{"question_id": i, "text": 3} for i in range(5)], "a.jsonl line 1: text is 3, expected a text"),
    ([ANSWERS[0], ANSWERS[1] | {"impression": []}, *ANSWERS[2:]], r"a.jsonl line 2: impression is \[\], expected"),
    ([*ANSWERS[:4], ANSWERS[4] | {"model_id": 7}], "a.jsonl line 5: model_id is 7, expected a text or null"),
    ([{"text": "a"}], "a.jsonl line 1 .*question_id"),
    ([12], "a.jsonl line 1"),
    # questions have a text, too: their prompt
    ([{"question_id": i, "image": "a.png", "text": "Findings?"} for i in range(5)], "a.jsonl line 1 is a question"),
    ([{"question_id": i, "text": "Findings?"} for i in range(5)], "a.jsonl repeats the texts of the questions"),
    ([{"id": i, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nFindings?"},
                                                    {"from": "gpt", "value": "x"}]} for i in range(5)],
     "a.jsonl line 1 is a question"),
    ([], "a.jsonl is empty"),
])  # fmt: skip
def test_wrong_answers_are_reported_in_one_line(score, answers, capsys, lines, culprit):
    write_lines(answers, lines)
    assert run(*score) == 2
    assert re.search(culprit, one_line(capsys))


@pytest.mark.parametrize(("change", "culprit"), [
    (lambda line: line.pop("reference"), "q.jsonl line 1: .*reference, findings, impression"),
    (lambda line: line.update(reference=3), "q.jsonl line 1: reference is 3, expected a text"),
    (lambda line: line.update(image=[1]), "q.jsonl line 1: image"),
    (lambda line: line.update(text={}), "q.jsonl line 1: text is {}, expected a text"),
])  # fmt: skip
def test_wrong_questions_are_reported_in_one_line(score, questions, capsys, change, culprit):
    lines = read_lines(questions)
    change(lines[0])
    write_lines(questions, lines)
    assert run(*score) == 2
    assert re.search(culprit, one_line(capsys))


def test_an_answer_may_name_its_images(score, answers, capsys):
    lines = read_lines(answers)
    for name in ("prompt", "model_id"):  # the other one says that it is an answer
        write_lines(answers, [{key: line[key] for key in line if key != name} | {"image": "a.png"} for line in lines])
        assert scored(capsys, *score)["studies"]["all"] == 5


def test_empty_texts_are_counted(score, questions, answers, capsys):
    texts = ["", " \n", "___", "No change.", "Effusion."]
    write_lines(answers, [{"question_id": i, "text": text} for i, text in enumerate(texts)])
    write_lines(questions, [*read_lines(questions)[:4], {"question_id": 4, "image": "g.png", "reference": "."}])
    assert run(*score) == 0
    printed = capsys.readouterr()
    assert "empty: 3 answers, 1 references" in printed.out
    assert "of 5 studies 3 answers, 1 references are empty" in printed.err
    assert scored(capsys, *score)["empty"] == {"answers": 3, "references": 1}


def test_empty_texts_are_counted_in_each_group(questions, answers, tmp_path, capsys):
    """Counted by hand: studies 0, 1 and 4 have a prior."""
    lines = read_lines(questions)
    write_lines(questions, [lines[0] | {"reference": ""}, *lines[1:]])
    texts = ["Stable.", " \n", "", "", "Clear."]
    made = write_lines(tmp_path / "b.jsonl", [{"question_id": i, "text": text} for i, text in enumerate(texts)])
    score, page = ["score", "--references", questions], tmp_path / "p.html"
    empty = {"all": {"answers": 3, "references": 1}, "with prior": {"answers": 1, "references": 1},
             "without prior": {"answers": 2, "references": 0}}  # fmt: skip
    text = "3 answers, 1 references; with prior: 1 answers, 1 references; without prior: 2 answers, 0 references"
    assert scored(capsys, *score, "--predictions", made, "--html", page)["empty_by_group"] == empty
    assert f"empty: {text}" in page.read_text()
    assert run(*score, "--predictions", made) == 0
    assert f"empty: {text}" in capsys.readouterr().out
    assert scored(capsys, *score, "--compare", answers, made)["empty_by_group"]["b"] == empty
    assert run(*score, "--compare", answers, made) == 0
    assert f"empty in B: {text}" in capsys.readouterr().out


def test_a_line_of_one_character_is_not_dropped(score, answers, capsys):
    answers.write_text(answers.read_text() + "7\n")
    assert run(*score) == 2
    assert "a.jsonl line 6 is not a JSON object" in one_line(capsys)


def test_files_to_write_are_looked_at_before_the_scores_are_computed(score, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "statistics_of", None)
    (tmp_path / "others.csv").write_text("name,score\n")
    for flag, path, problem in [
        ("--csv", tmp_path / "nowhere" / "s.csv", "no folder"), ("--csv", tmp_path / "others.csv", "has the columns"),
        ("--html", tmp_path, "is a folder"), ("--html", tmp_path / "nowhere" / "p.html", "no folder"),
    ]:  # fmt: skip
        assert run(*score, flag, path) == 2
        assert problem in one_line(capsys)


@pytest.mark.parametrize(("flags", "problem"), [
    ("--html q.jsonl", "q.jsonl is given twice"), ("--export a.jsonl", "a.jsonl is given twice"),
    ("--csv link", "link is given twice"), ("--merge r.json --export r.json", "r.json is given twice"),
    ("--truth t --html ./t", "t is given twice"), ("--ids ids --csv ids", "ids is given twice"),
    ("--html new --csv new", "new is given twice"), ("--export new --html new", "new is given twice"),
    ("--html r.json", "r.json is no HTML page"), ("--export other.jsonl", "other.jsonl is no file of --export"),
    ("--html p.html --image-folder nowhere", "no image folder nowhere"),
])  # fmt: skip
def test_what_is_written_replaces_no_other_file(score, answers, tmp_path, capsys, monkeypatch, flags, problem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "statistics_of", None)
    shutil.copy(answers, "other.jsonl")
    Path("link").symlink_to("q.jsonl")
    for name in ("r.json", "t", "ids"):
        Path(name).write_text('{"x": 1}')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(*score, *flags.split()) == 2
    assert problem in one_line(capsys)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_page_an_export_and_an_empty_file_are_replaced(score, tmp_path):
    for name in ("p", "e"):
        (tmp_path / name).touch()
    for _ in range(2):
        assert run(*score, "--html", tmp_path / "p", "--export", tmp_path / "e") == 0
    assert run(*score, "--html", "/dev/null", "--export", "/dev/null") == 0


def test_a_csv_file_may_be_a_link_or_a_pipe(score, tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link.csv", "link.csv", "pipe"):
        assert run(*score, "--csv", tmp_path / name) == 0
    assert (tmp_path / "link.csv").is_symlink() and len((tmp_path / "real.csv").read_text().splitlines()) == 3
    assert os.read(reader, 10**6).startswith(b"Model Name") and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_a_row_is_added_to_what_is_there_as_it_is(score, tmp_path):
    """A cell with line breaks of several kinds, a byte order mark, and no break at the end."""
    table = tmp_path / "s.csv"
    assert run(*score, "--csv", table, "--model-name", "a\nb\u2028c") == 0
    before = f"\ufeff{table.read_text()}".removesuffix("\n")
    table.write_text(before)
    assert run(*score, "--csv", table) == 0
    assert table.read_text().startswith(f"{before}\ntiny,")


def test_a_csv_file_is_read_under_the_lock_under_which_it_is_written(score, tmp_path, capsys, monkeypatch):
    """Another process cannot add a row between our reading and our writing."""
    table, read, locked = tmp_path / "s.csv", tables.read_csv, []

    def read_and_try(*arguments):
        try:
            with atomic(table):
                raise InterruptedError
        except (ValueError, InterruptedError) as error:
            locked.append(isinstance(error, ValueError))
        return read(*arguments)

    monkeypatch.setattr(tables, "read_csv", read_and_try)
    assert run(*score, "--csv", table) == 0
    assert locked == [False, True]  # before the work, and for the row
    with atomic(table):
        assert run(*score, "--csv", table) == 2
    assert "s.csv is being written by another process" in capsys.readouterr().err


def test_a_csv_file_of_others_is_refused_and_left_alone(score, tmp_path, capsys):
    table = tmp_path / "s.csv"
    table.write_text("name,score\na,1\n")
    assert run(*score, "--csv", table) == 2
    assert "s.csv" in one_line(capsys)
    assert table.read_text() == "name,score\na,1\n"


@pytest.mark.parametrize(("line", "culprit"), [
    ("scores", "scores"),
    ("score --references q", "--predictions --compare"),
    ("score --references q --compare a b --csv c", "--csv"),
    ("score --references q --predictions a --image-folder i", "--html"),
    ("score --references q --predictions a --htlm c", "did you mean --html"),
    ("answer --questions q", "--model, --image-folder, --answers"),
    ("answer --model m --questions q --image-folder i --answers a --limit 0", "--limit"),
    ("answer --model m --questions q --image-folder i --answers a --batchsize 1", "did you mean --batch-size"),
    ("prior --questions q --out o --conditions true,black", "black"),
])  # fmt: skip
def test_wrong_arguments_are_reported_in_one_line(capsys, line, culprit):
    try:
        status = run(*line.split())
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and culprit in one_line(capsys)


def write_phantom(tmp_path) -> list:
    """Arguments for three studies with their truth; reports right and wrong, by hand."""
    edema, nodule = {"edema": {"side": "bilateral", "severity": 0.5}}, {"nodule": {"side": "left", "severity": 0.1}}
    changes = {"edema": "worse", "nodule": "resolved"}
    truths = [{"subject_id": 1, "prior_study_id": 2, "study_id": i, "dicom_id": f"d{i}",
               "devices": {"pacemaker": {"side": "left"}}, "findings": edema, "changes": changes}
              for i in range(3)]  # fmt: skip
    truths[2] |= {"findings": nodule, "changes": {}}
    texts = [
        "Moderate pulmonary edema has worsened. The nodule has resolved. A pacemaker is seen.",  # all right
        "Severe edema is unchanged.",  # wrong severity and direction; a change and a device missing
        "There is small right nodule. New edema. No pacemaker.",  # wrong side, a finding too many, a device missing
    ]
    questions = [{"question_id": i, "image": f"files/p1/d{i}.jpg", "reference": "x"} for i in range(3)]
    answers = [{"question_id": i, "text": text} for i, text in enumerate(texts)]
    return ["score", "--references", write_lines(tmp_path / "q", questions), "--predictions",
            write_lines(tmp_path / "a", answers), "--truth", write_lines(tmp_path / "t", truths)]  # fmt: skip


def test_phantom_truth_is_scored(tmp_path, capsys):
    phantom = write_phantom(tmp_path)
    scores = scored(capsys, *phantom, "--csv", tmp_path / "s.csv", "--html", tmp_path / "p.html")["scores"]
    values = {key: round(found["all"]["value"], 2) if found else None for key, found in scores.items()}
    assert values | {
        "findings precision": 75, "findings recall": 100, "findings F1": 85.71, "edema precision": 66.67,
        "edema recall": 100, "nodule F1": 100, "devices precision": 100, "devices recall": 33.33, "devices F1": 50,
        "pneumothorax F1": None, "side": 0, "severity": 66.67, "direction of change": 50,
    } == values  # fmt: skip
    row = next(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert (row["findings F1"], row["pneumothorax F1"]) == ("85.7143", "")


def test_a_wrong_truth_is_refused(tmp_path, score, capsys):
    *_, truth = write_phantom(tmp_path)
    assert run(*score, "--truth", truth) == 2
    assert "2 of 5 studies (first: 3)" in one_line(capsys)
    assert run(*score, "--truth", score[2]) == 2
    assert "q.jsonl line 1" in one_line(capsys)


@pytest.mark.parametrize(("field", "value"), [
    ("findings", None), ("findings", []), ("findings", {"edema": 3}), ("findings", {"edema": {"severity": "high"}}),
    ("findings", {"edema": {"severity": math.nan}}), ("findings", {"edema": {"severity": 1, "side": 5}}),
    ("devices", "pacemaker"), ("changes", {"edema": None}), ("dicom_id", 7), ("study_id", None), ("study_id", [1]),
    ("changes", json.loads("[" * 400 + "]" * 400)),
    ("findings", {"edemas": {"severity": 1, "side": None}}), ("devices", {"edema": {}}), ("changes", {"edema": "wors"}),
    ("changes", {"oedema": "worse"}),
], ids=range(16))  # fmt: skip
def test_a_wrong_field_of_a_truth_is_named(tmp_path, capsys, field, value):
    *score, truth = write_phantom(tmp_path)
    lines = read_lines(truth)
    write_lines(truth, [lines[0], lines[1] | {field: value}, lines[2]])
    assert run(*score, truth) == 2
    line = one_line(capsys)
    assert "t line 2" in line and "expected" in line and (field in line or "edema" in line)


def test_a_study_has_one_line_of_truth(tmp_path, capsys):
    *score, truth = write_phantom(tmp_path)
    lines = read_lines(truth)
    write_lines(truth, [*lines, lines[0]])
    assert run(*score, truth) == 0
    capsys.readouterr()
    write_lines(truth, [*lines, lines[0] | {"changes": {}}])
    assert run(*score, truth) == 2
    assert "t line 4: 'd0' has another line before" in one_line(capsys)


def test_a_truth_that_is_nested_without_end_is_one_line(tmp_path, capsys):
    *score, truth = write_phantom(tmp_path)
    truth.write_text("[" * 10**5)
    assert run(*score, truth) == 2
    assert "t line 1" in one_line(capsys)


def write_hospital(folder: Path):
    """A drawn hospital as images/, its truth.jsonl, and a question for each study."""
    hospital.write(folder / "images", patients=3, size=64, workers=1)
    shutil.copy(folder / "images" / "truth.jsonl", folder / "truth.jsonl")
    states = {state.study_id: state for patient in range(3) for state in hospital.history(0, patient)}
    images = {id: f"files/p{str(state.subject_id)[:2]}/p{state.subject_id}/s{id}/{state.images[state.view]}.jpg"
              for id, state in states.items()}  # fmt: skip
    lines = []
    for id, state in states.items():
        reference = re.search("FINDINGS:(.*)IMPRESSION:", hospital.report(state), re.S)[1].strip()
        names = [images[id]]
        if state.prior:
            names.append(images[state.prior.study_id])
        lines.append({"question_id": id, "image": names, "text": "Findings?", "reference": reference})
    write_lines(folder / "questions.jsonl", lines)


@pytest.mark.parametrize("text, subcommands", [("README.md", 3), ("docs/scores.md", 6)])
def test_the_documented_commands_run_in_order(text, subcommands, tmp_path, monkeypatch, capsys):
    """On a drawn hospital and a tiny model; RadEval's result is made up."""
    monkeypatch.chdir(tmp_path)
    write_hospital(tmp_path)
    text = (ROOT / text).read_text().replace("X-iZhang/libra-v1.0-7b", str(GOLDEN / "libra-7b" / "model"))
    commands = re.findall(r"^(?:python|torchrun --nproc-per-node 8) eval\.py (.+)", text, re.M)
    for command in commands:
        arguments = shlex.split(command, comments=True)
        if "--model" in arguments:
            arguments += ["--max-new-tokens", "3"]
        if "--merge" in arguments:
            count = len(read_lines("questions.jsonl"))
            Path("radeval.json").write_text(json.dumps({"radgraph_simple": [0.5] * count}))
        assert run(*arguments) == 0, command
    assert len(commands) >= subcommands
    assert {"answers.jsonl", "page.html"} <= {path.name for path in tmp_path.iterdir()}
    assert "minus true" in capsys.readouterr().out
