"""Oracles: direction words and scores worked out by hand; `score --compare` for differences."""

import csv
import json
import re

import pytest
from conftest import one_line, read_lines, write_lines

import eval as cli
from evaluation import metrics, truth
from evaluation import prior as prior_module
from phantom import hospital

pytestmark = pytest.mark.usefixtures("no_meteor")


def run(*arguments) -> int:
    return cli.main(cli.parse([str(argument) for argument in arguments]))


@pytest.mark.parametrize(("flag", "problem"), [("--csv", "no folder"), ("--truth", "No such file")])
def test_files_are_looked_at_before_a_model_answers(tmp_path, capsys, flag, problem):
    questions = write_lines(tmp_path / "q", [{"question_id": 1, "image": ["a", "b"], "text": "?", "reference": "x"}])
    command = ["prior", "--model", "nowhere", "--image-folder", tmp_path, "--questions", questions, "--out"]
    assert run(*command, tmp_path / "out", flag, tmp_path / "nowhere" / "file") == 2
    assert problem in one_line(capsys) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("true", "other", "expected"), [
    ("The effusion has worsened.", "The effusion has improved.", (1, 1)),
    ("New edema; the effusion is larger.", "Resolved edema; smaller effusion.", (2, 2)),
    ("New edema, improved effusion.", "New edema, improved effusion.", (0, 2)),
    ("New edema, improved effusion.", "Resolved edema, worse effusion.", (2, 2)),
    ("New edema. Improved effusion.", "Improved effusion.", (0, 2)),  # gone, but nothing came in its stead
    ("Improved effusion.", "New edema. Improved effusion.", (0, 1)),
    ("Unchanged. Persistent edema.", "Worse.", (0, 0)),
    ("Improved.", "Unchanged.", (0, 1)),
    ("", "", (0, 0)),
])  # fmt: skip
def test_a_direction_flips_where_its_opposite_comes(true, other, expected):
    assert prior_module.flips(true, other) == expected


def test_each_direction_is_a_word_of_change_and_only_one_of_both():
    assert not prior_module.WORSE & prior_module.BETTER
    assert prior_module.WORSE | prior_module.BETTER < metrics.WORDS_OF_CHANGE


def test_a_severity_is_turned_round_where_two_reports_say_opposites():
    changes = {"edema": "worse", "nodule": "improved", "atelectasis": "new", "consolidation": "unchanged"}
    edema, nodule = "Mild pulmonary edema has {}.", "The small left mid lung nodule has {}."
    one = " ".join((edema.format("worsened"), nodule.format("decreased"), "New left basilar atelectasis is seen."))
    other = " ".join((edema.format("improved"), nodule.format("decreased"), "Left basilar atelectasis has improved."))
    for pair, changed, expected in [
        ((one, other), changes, (1, 2)),
        ((other, one), changes, (1, 2)),
        ((one, one), changes, (0, 2)),
        (("", other), changes, (0, 2)),
        ((one, other), {}, (0, 0)),
    ]:
        assert truth.severity_flips(*pair, {"changes": changed}) == expected


def test_the_hospital_s_own_reports_score_100():
    states = [state for patient in range(60) for state in hospital.history(0, patient)]
    texts = [re.search("FINDINGS:(.*)IMPRESSION:", hospital.report(state), re.S)[1] for state in states]
    for key, rows in truth.truth_statistics(texts, list(map(hospital.truth_of, states))).items():
        assert metrics.corpus_score(rows) == 100, key


REFERENCES = ["New edema.", "The effusion has improved.", "Stable heart.", "Worse edema.", "Clear."]
REVERSED = ["Resolved edema.", "The effusion has worsened.", "Stable heart.", "Worse edema."]
DUMMY = ["Edema.", "The effusion.", "Stable heart.", "Edema."]


@pytest.fixture
def files(tmp_path):
    """Four studies with a prior and a fifth without, whose answer must not count."""
    for condition, texts in {"true": REFERENCES[::-1], "reversed": REVERSED, "dummy": DUMMY}.items():
        numbers = range(4, -1, -1) if condition == "true" else range(4)
        lines = [{"question_id": i, "text": text, "model_id": "made"} for i, text in zip(numbers, texts, strict=True)]
        write_lines(tmp_path / f"{condition}.jsonl", lines)
    questions = [{"question_id": i, "image": ["a", "b"] if i < 4 else "a", "text": "?", "reference": text}
                 for i, text in enumerate(REFERENCES)]  # fmt: skip
    path = write_lines(tmp_path / "q", questions)
    return ["prior", "--questions", path, "--out", tmp_path, "--conditions", "reversed,dummy"]


def test_scores_and_reactions_of_answers_made_by_hand(files, capsys):
    assert run(*files, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["studies"]) == ("made", 4)
    value = lambda key: {name: round(cell["value"], 2) for name, cell in result["scores"][key].items()}
    assert value("reports changed") == {"reversed": 50, "dummy": 75}
    assert value("directions flipped") == {"reversed": 66.67, "dummy": 0}
    assert value("Temporal_entity_score") == {"true": 100, "reversed": 50, "dummy": 25}
    assert value("Temporal_floor") == {"true": 0}
    assert result["empty"]["dummy"] == {"answers": 0, "references": 0}


def test_differences_are_those_of_compare(files, tmp_path, capsys):
    assert run(*files, "--json") == 0
    ours = json.loads(capsys.readouterr().out)["scores"]
    four = [line for line in read_lines(tmp_path / "q") if line["question_id"] < 4]
    true = [line for line in read_lines(tmp_path / "true.jsonl") if line["question_id"] < 4]
    compared = [write_lines(tmp_path / "true4", true), tmp_path / "reversed.jsonl"]
    assert run("score", "--references", write_lines(tmp_path / "q4", four), "--compare", *compared, "--json") == 0
    theirs = json.loads(capsys.readouterr().out)["scores"]
    for key in ("BLEU1", "BLEU4", "ROUGE-L", "Temporal_entity_score"):
        assert ours[key]["reversed"]["difference"] == theirs[key]["with prior"]["difference"], key


def test_questions_that_tell_of_the_prior_are_counted(files, tmp_path, capsys):
    assert run(*files) == 0
    assert "Comparison" not in capsys.readouterr().err
    lines = read_lines(tmp_path / "q")
    for line, said in zip(lines, ["___.", "None.", "Radiograph from ___.", "NONE.", "___."], strict=True):
        line["text"] = f"? Following clinical context: History: Asthma. Comparison: {said}"
    write_lines(tmp_path / "q", lines)
    assert run(*files) == 0
    # the fifth question has no prior
    assert "2 of 4 questions repeat what the report says under Comparison" in capsys.readouterr().err


def test_the_csv_file_has_a_row_for_each_score_and_condition(files, tmp_path):
    assert run(*files, "--csv", tmp_path / "p.csv") == 0
    header, *rows = csv.reader((tmp_path / "p.csv").read_text().splitlines())
    assert header[:6] == ["Model Name", "score", "prior", "value", "low", "high"]
    assert header[6:] == ["difference value", "difference low", "difference high"]
    (row,) = [row for row in rows if row[1:3] == ["reports changed", "reversed"]]
    assert row[:4] == ["made", "reports changed", "reversed", "50.0"] and row[6:] == ["", "", ""]


def test_the_table_has_a_column_for_each_condition(files, capsys):
    assert run(*files) == 0
    table = capsys.readouterr().out
    assert re.search(r"made, 4 studies with a prior.*\n +true +reversed +dummy", table)
    assert re.search(r"Temporal_entity_score.*\n  minus true +-50\.00 \[.*-75\.00 \[", table)
    assert "true: the patient's prior" in table and "worse: bigger, enlarging" in table


@pytest.mark.parametrize("lines", [None, [], [{"question_id": i, "text": ""} for i in (0, 1, 2, 3, "x")]])
def test_answers_that_are_missing_or_too_many_are_refused(files, tmp_path, capsys, lines):
    (tmp_path / "dummy.jsonl").unlink()
    if lines is not None:
        write_lines(tmp_path / "dummy.jsonl", lines)
    assert run(*files) == 2
    assert "dummy.jsonl" in one_line(capsys)
