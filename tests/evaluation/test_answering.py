"""Oracle: `generate`, called for one study at a time. Answer files stay the same whatever interrupts or shares the run.

    KILLS=10 pytest tests/evaluation/test_answering.py -k killed      more kills than the two of every run
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, load, one_line, read_lines, write_lines
from PIL import Image

import eval as cli
import sample
from data import Question, Study
from evaluation import answering
from sample import generate

MODEL, IMAGES = GOLDEN / "libra-7b" / "model", GOLDEN / "images"
WORDS = ("Describe", "the", "heart,", "lungs", "and", "bones;", "say", "what", "changed", "since", "prior")


def make_questions() -> list[dict]:
    """20 questions; every third has no prior, one has its current image twice; ids are text and numbers."""
    draw = random.Random(0)
    pairs = [[f"{i % 6}.png", f"{(i + 1 + i // 6) % 6}.png"] for i in range(20)]
    images = [pair[:1] if i % 3 == 0 else pair for i, pair in enumerate(pairs)]
    images[3], images[4] = "5.png", ["2.png", "2.png"]
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 15))) for _ in images]
    return [{"question_id": i if i % 2 else f"q{i}", "image": image, "text": text, "reference": text}
            for i, (image, text) in enumerate(zip(images, texts, strict=True))]  # fmt: skip


def command(questions: Path, answers: Path, *more) -> list[str]:
    files = ["--model", MODEL, "--questions", questions, "--image-folder", IMAGES, "--answers", answers]
    return [str(part) for part in ("answer", *files, "--device", "cpu", *more)]  # of a flag given twice the last counts


def answer(questions: Path, answers: Path, *more) -> int:
    return cli.main(cli.parse(command(questions, answers, *more)))


def start(arguments: list[str], *launcher) -> subprocess.Popen:
    """eval.py in a process of its own."""
    words = [sys.executable, *launcher, ROOT / "eval.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def questions(tmp_path):
    return write_lines(tmp_path / "q.jsonl", make_questions())


def study(question: dict) -> Study:
    images = [question["image"]] if isinstance(question["image"], str) else list(dict.fromkeys(question["image"]))
    return Study(*(IMAGES / name for name in images), query=question["text"], id=str(question["question_id"]))


@pytest.mark.parametrize("settings", [
    dict(num_beams=3, length_penalty=2.0, max_new_tokens=20),
    dict(temperature=0.8, top_p=0.9, seed=5, max_new_tokens=20),
])  # fmt: skip
def test_answers_are_what_generate_gives_each_study(questions, tmp_path, settings):
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert answer(questions, tmp_path / "a.jsonl", "--batch-size", 6, *flags) == 0
    lines = make_questions()
    texts = [generate(load("libra-7b"), study(line), **settings)[0].text for line in lines]
    assert read_lines(tmp_path / "a.jsonl") == [
        {"question_id": line["question_id"], "prompt": line["text"], "text": text, "model_id": str(MODEL)}
        for line, text in zip(lines, texts, strict=True)
    ]
    assert len(set(texts)) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.settings.json", "q.jsonl"]


def make_scores() -> list[dict]:
    """An expert's scores of every question; every other line has its labels in an object."""
    draw = random.Random(1)
    scores = [{"Edema": draw.random(), "Fracture": draw.random(), "Frontal": 0.9} for _ in make_questions()]
    ids = [line["question_id"] for line in make_questions()]
    return [{"question_id": id} | ({"scores": own} if number % 2 else own)
            for number, (id, own) in enumerate(zip(ids, scores, strict=True))]  # fmt: skip


def test_an_expert_guides_each_question_by_its_own_scores(questions, tmp_path):
    lines = make_scores()
    file = write_lines(tmp_path / "scores.jsonl", lines[::-1])
    flags = ("--alpha", 0.4, "--gamma", 5, "--max-new-tokens", 8, "--batch-size", 6)
    assert answer(questions, tmp_path / "a.jsonl", "--expert", file, *flags) == 0
    for question, line, answered in zip(make_questions(), lines, read_lines(tmp_path / "a.jsonl"), strict=True):
        scores = line.get("scores") or {label: score for label, score in line.items() if label != "question_id"}
        settings = dict(alpha=0.4, gamma=5, max_new_tokens=8)
        assert answered["text"] == generate(load("libra-7b"), study(question), expert=scores, **settings)[0].text
        assert answered["prompt"] == question["text"]


def test_answers_under_other_scores_are_other_answers(questions, tmp_path, capsys):
    lines, out = make_scores(), tmp_path / "a"
    file = write_lines(tmp_path / "scores.jsonl", lines)
    assert answer(questions, out, "--expert", file, "--max-new-tokens", 2) == 0
    assert answer(questions, out, "--expert", file, "--max-new-tokens", 2) == 0
    write_lines(file, [lines[0] | {"Edema": 0.123}, *lines[1:]])
    for flags in (["--expert", file], ["--expert", file, "--beta", 0.1], []):
        capsys.readouterr()
        assert answer(questions, out, "--max-new-tokens", 2, *flags) == 2
        assert "was made with expert " in one_line(capsys)


@pytest.mark.parametrize(("change", "flags", "culprit"), [
    (lambda lines: lines.pop(3), (), "has no scores for question 3 (1 such questions in all)"),
    (lambda lines: lines.append(lines[0]), (), "line 21: question q0 has scores in an earlier line"),
    (lambda lines: lines[2].update(Edema=7), (), "scores.jsonl line 3: Edema is 7"),
    (lambda lines: lines[3].update(scores=0.5), (), "line 4: the expert's scores is 0.5"),
    (lambda lines: lines[2].pop("question_id"), (), "line 3: question_id is None"),
    (lambda lines: lines.clear(), (), "scores.jsonl is empty"),
    (lambda lines: None, ("--num-beams", 2), "not beams"),
    (lambda lines: None, ("--alpha", 2), "alpha is 2"),
])  # fmt: skip
def test_wrong_scores_are_refused_before_the_model_is_read(questions, tmp_path, capsys, change, flags, culprit):
    lines = make_scores()
    change(lines)
    file = write_lines(tmp_path / "scores.jsonl", lines)
    assert answer(questions, tmp_path / "a", "--model", "/nowhere", "--expert", file, *flags) == 2
    assert culprit in one_line(capsys) and not (tmp_path / "a").exists()


def test_a_guided_prompt_that_is_too_long_names_its_question(questions, tmp_path, capsys):
    lines = make_scores()
    lines[2]["word " * 3000] = 0.9
    file = write_lines(tmp_path / "scores.jsonl", lines)
    assert answer(questions, tmp_path / "a", "--expert", file) == 2
    assert "question q2: the prompt needs" in one_line(capsys)


def test_a_training_record_asks_its_first_question(tmp_path):
    turn = lambda question, answer: [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    two_turns = turn("<image>\nHeart?", "Stable.") + turn("Lungs?", "Clear.")
    records = [
        {"id": "a", "image": ["0.png", "1.png"], "conversations": two_turns},
        {"id": 7, "image": "2.png", "conversations": turn("Bones?\n<image>", "No fracture.")},
    ]
    (tmp_path / "train.json").write_text(json.dumps(records, indent=1))
    assert answer(tmp_path / "train.json", tmp_path / "a.jsonl", "--max-new-tokens", 5) == 0
    asked = [{"image": ["0.png", "1.png"], "text": "Heart?"}, {"image": "2.png", "text": "Bones?"}]
    texts = [generate(load("libra-7b"), study(q | {"question_id": 0}), max_new_tokens=5)[0].text for q in asked]
    lines = [(line["question_id"], line["prompt"], line["text"]) for line in read_lines(tmp_path / "a.jsonl")]
    assert lines == [("a", "Heart?", texts[0]), (7, "Bones?", texts[1])]
    pairs = cli.read_pairs(tmp_path / "train.json", tmp_path / "a.jsonl")
    assert [(pair.reference, pair.has_prior) for pair in pairs] == [("Stable.", True), ("No fracture.", False)]


def test_answers_do_not_replace_what_is_read(questions, tmp_path, capsys):
    file = write_lines(tmp_path / "scores", make_scores())
    for name in (questions, file):
        assert answer(questions, name, "--expert", file) == 2
        assert f"{name} is given twice" in one_line(capsys)


def test_ids_and_limit_choose(questions, tmp_path, capsys):
    chosen = lambda name: [line["question_id"] for line in read_lines(tmp_path / name)]
    (tmp_path / "ids").write_text("7\n\nq2 \nq18\n")
    assert answer(questions, tmp_path / "a", "--ids", tmp_path / "ids", "--max-new-tokens", 1) == 0
    assert answer(questions, tmp_path / "b", "--ids", "q18,7,q2", "--limit", 2, "--max-new-tokens", 1) == 0
    assert (chosen("a"), chosen("b")) == (["q2", 7, "q18"], ["q2", 7])
    capsys.readouterr()
    assert answer(questions, tmp_path / "c", "--ids", "q18,8,9,10", "--max-new-tokens", 1) == 2
    assert "q.jsonl has no question 10" in one_line(capsys)


@pytest.mark.parametrize(("ids", "culprit"), [
    (" ", "--ids ' ' names no id"), ("," * 9999, "names no id"), ("word " * 9999, "no question word word"),
    ("pipe", "pipe is a pipe"), ("q.jsonl", "has no question {"), ("empty", "--ids 'empty' names no id"),
])  # fmt: skip
def test_ids_that_name_nothing_are_one_short_line(questions, tmp_path, monkeypatch, capsys, ids, culprit):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("empty").write_text("\n")
    assert answer(questions, tmp_path / "a", "--ids", ids) == 2
    line = one_line(capsys)
    assert culprit in line and len(line) < 300


def test_a_list_of_ids_may_be_longer_than_the_name_of_a_file(questions, tmp_path):
    assert answer(questions, tmp_path / "a", "--ids", "q0,7," * 2000, "--max-new-tokens", 1) == 0
    assert len(read_lines(tmp_path / "a")) == 2


def test_the_batch_size_depends_on_the_beams_alone():
    assert [answering.default_batch_size(beams) for beams in (1, 4, 10, 100)] == [16, 16, 6, 1]


SLOW = ("--batch-size", 2, "--num-beams", 8, "--max-new-tokens", 50)


def test_killed_at_any_moment_the_file_is_the_same_in_the_end(questions, tmp_path):
    killed, work = tmp_path / "killed", tmp_path / ".killed.0"
    batches = lambda: len(work.read_text().splitlines()) if work.exists() else 0
    for _ in range(int(os.environ.get("KILLS", 2))):
        before, process = batches(), start(command(questions, killed, *SLOW))
        # wait for a batch or two, so that the kill falls into the next
        while process.poll() is None and batches() < before + random.choice((1, 2)):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert killed.exists() or batches() > before
    assert answer(questions, killed, *SLOW) == 0
    assert answer(questions, tmp_path / "whole", *SLOW) == 0
    assert killed.read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*killed*")) == ["killed", "killed.settings.json"]


def test_two_processes_write_what_one_does(questions, tmp_path):
    short = (*SLOW[:4], "--max-new-tokens", 10)
    assert answer(questions, tmp_path / "one", *short) == 0
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    process = start(command(questions, tmp_path / "two", *short), *torchrun)
    assert "20 answers" in process.communicate()[1] and process.returncode == 0
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*two*")) == ["two", "two.settings.json"]


def test_an_interrupted_run_keeps_its_batches_whoever_answered_them(questions, tmp_path, monkeypatch):
    whole, out, decode, calls = tmp_path / "whole", tmp_path / "a", sample.decode, []
    assert answer(questions, whole, "--batch-size", 4, "--max-new-tokens", 5) == 0

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(sample, "decode", interrupted)
    assert answer(questions, out, "--batch-size", 4, "--max-new-tokens", 5) == 130
    # as if rank 1 had answered them, marked, and died in its next batch
    (tmp_path / ".a.0").rename(tmp_path / ".a.1")
    marked = (tmp_path / ".a.1").read_text().replace('"text": "', '"text": "kept ')
    (tmp_path / ".a.1").write_text(f'{marked}\n[{{"question_id": "q0", "te')
    assert answer(questions, out, "--max-new-tokens", 5) == 0  # with the batch size that it was begun with
    assert len(calls) == 3 + 3 and out.read_text().count('"text": "kept ') == 8
    assert out.read_text().replace('"text": "kept ', '"text": "') == whole.read_text()


@pytest.fixture
def answered(questions, tmp_path, capsys):
    assert answer(questions, tmp_path / "a", "--max-new-tokens", 2) == 0
    capsys.readouterr()
    return tmp_path / "a"


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_file_is_left_as_it_is(questions, answered, tmp_path, capsys):
    before = contents(tmp_path)
    assert answer(questions, answered, "--max-new-tokens", 2) == 0
    assert "20 answers, all there before" in one_line(capsys) and contents(tmp_path) == before


@pytest.mark.parametrize("change", [
    lambda lines: [], lambda lines: lines[:-1], lambda lines: [*lines[:-1], lines[-1][:20]], lambda lines: lines[::-1],
    lambda lines: [*lines, "7"], lambda lines: [line.replace('"text": "', '"said": "') for line in lines],
])  # fmt: skip
def test_a_finished_file_that_is_torn_does_not_count_as_answered(questions, answered, tmp_path, capsys, change):
    answered.write_text("".join(line + "\n" for line in change(answered.read_text().splitlines())))
    before = contents(tmp_path)
    assert answer(questions, answered, "--max-new-tokens", 2) == 2
    line = one_line(capsys)
    assert str(answered) in line and "delete it and run eval.py answer again" in line and contents(tmp_path) == before


@pytest.mark.parametrize("text", ['[{"question_id": 1}]', "[7]", '{"a": 1}'])
def test_a_work_file_of_something_else_is_named(questions, answered, tmp_path, capsys, text):
    (tmp_path / ".a.0").write_text(text)
    answered.unlink()
    assert answer(questions, answered, "--max-new-tokens", 2) == 2
    assert f"{tmp_path}/.a.0 holds a line that is no batch of answers" in one_line(capsys)


@pytest.mark.parametrize(("text", "culprit"), [
    ("{}", "a.settings.json holds no settings"),
    ("[1]", "a.settings.json holds no settings"),
    ('{"model": "tin', "a.settings.json holds no settings"),
    ('{"model": 5, "seed": ' + "[" * 900 + "]" * 900 + "}", "was made with model 5, not"),
    ('{"batch_size": "2"}', "batch_size is '2', expected a whole number"),
])  # fmt: skip
def test_damaged_settings_do_not_pass_for_the_same(questions, answered, tmp_path, capsys, text, culprit):
    (tmp_path / "a.settings.json").write_text(text)
    before = contents(tmp_path)
    assert answer(questions, answered, "--max-new-tokens", 2) == 2
    line = one_line(capsys)
    assert culprit in line and len(line) < 1500 and contents(tmp_path) == before


@pytest.mark.parametrize(("flags", "changed"), [
    (("--max-new-tokens", 3), "max_new_tokens 2, not 3"),
    (("--num-beams", 2, "--prior", "blank"), "num_beams 1, not 2"),
    (("--limit", 4), "not 4 questions"),
    (("--batch-size", 3), "batch_size 16, not 3"),
    (("--questions", "other.jsonl"), "questions 20 questions"),
    (("--model", GOLDEN / "libra-3b" / "model"), "libra-3b"),
    (("--template", "v1"), "template None, not v1"),
])  # fmt: skip
def test_other_settings_are_refused_and_leave_the_files(questions, answered, capsys, monkeypatch, flags, changed):
    monkeypatch.chdir(answered.parent)
    write_lines(Path("other.jsonl"), make_questions()[::-1])
    before = contents(answered.parent)
    assert answer(questions, answered, "--max-new-tokens", 2, *flags) == 2
    assert changed in one_line(capsys) and contents(answered.parent) == before


def test_an_unfinished_file_is_not_mixed_with_other_settings(questions, answered, tmp_path, capsys):
    (tmp_path / ".a.0").write_text(f"\n[{answered.read_text().splitlines()[0]}]")
    answered.unlink()
    assert answer(questions, answered, "--max-new-tokens", 3) == 2
    assert f"delete {tmp_path}/.a.0, {answered}.settings.json" in one_line(capsys)
    (tmp_path / "a.settings.json").unlink()
    assert answer(questions, answered, "--max-new-tokens", 2) == 2
    assert f"{tmp_path}/.a.0" in one_line(capsys)


def test_nothing_answered_is_nothing_to_mix_with(questions, answered, tmp_path):
    (tmp_path / ".a.0").write_text('\n[{"question_id"')
    answered.unlink()
    assert answer(questions, answered, "--max-new-tokens", 3) == 0
    assert json.loads((tmp_path / "a.settings.json").read_text())["max_new_tokens"] == 3


@pytest.mark.parametrize(("change", "flags", "culprit"), [
    (lambda q: q[3].update(image="9.png"), (), "question 3: no image 9.png"),
    (lambda q: q[3].update(image="../q.jsonl"), (), "question 3: image ../q.jsonl"),
    (lambda q: [line.pop("text") for line in q], (), "line 4: "),
    (lambda q: q[3].update(text="word " * 3000), (), "question 3: "),
    (lambda q: q.clear(), (), "q.jsonl is empty"),
    (lambda q: None, ("--answers", "/nowhere/a"), "no folder /nowhere"),
    (lambda q: None, ("--image-folder", "/nowhere"), "/nowhere"),
    (lambda q: None, ("--model", "/nowhere"), "/nowhere"),
    (lambda q: None, ("--template", "x"), "template"),
    (lambda q: None, ("--num-beams", "2", "--temperature", "1"), "num_beams"),
    (lambda q: [line.update(image=["p10000001/a", "p10000001/b"]) for line in q], ("--prior", "shuffled"), "patient"),
])  # fmt: skip
def test_mistakes_are_reported_in_one_line_and_leave_nothing(tmp_path, capsys, change, flags, culprit):
    lines = make_questions()
    change(lines)
    path = write_lines(tmp_path / "q.jsonl", lines)
    assert answer(path, tmp_path / "a", *flags) == 2
    assert culprit in one_line(capsys)
    assert list(tmp_path.iterdir()) == [path]


def test_odd_questions_are_left_out_by_answering_and_by_scoring(tmp_path, capsys, no_meteor):
    lines = make_questions()[:6]
    lines[2]["reference_report"] = lines[2].pop("reference")
    odd = [lines[0] | {"text": "Again?"}, {"question_id": "x", "image": [], "text": "?", "reference": "."}, 3, {"a": 1}]
    path = write_lines(tmp_path / "q.jsonl", [*lines, *odd])
    assert answer(path, tmp_path / "a.jsonl", "--max-new-tokens", 2) == 0
    assert "4 of 10 records are left out" in capsys.readouterr().err
    alone = write_lines(tmp_path / "alone.jsonl", lines)
    assert answer(alone, tmp_path / "b.jsonl", "--max-new-tokens", 2) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()

    def score(references):
        capsys.readouterr()
        words = ["score", "--json", "--references", references, "--predictions", tmp_path / "a.jsonl"]
        assert cli.main(cli.parse([str(word) for word in words])) == 0
        return capsys.readouterr()

    told = score(path)
    assert json.loads(told.out) == json.loads(score(alone).out)
    assert "2 odd lines and 1 with an earlier one's id" in told.err
    assert "1 odd questions without an answer are left out; the first: x" in told.err


def test_an_image_that_cannot_be_read_names_its_question_and_keeps_the_others(tmp_path, capsys):
    lines = make_questions()[:6]
    for i, line in enumerate(lines):
        line["text"] = "word " * (6 - i)
    lines[4]["image"] = ["0.png", "torn.png"]
    shutil.copytree(IMAGES, tmp_path / "images")
    (tmp_path / "images" / "torn.png").write_bytes((IMAGES / "1.png").read_bytes()[:400])
    path = write_lines(tmp_path / "q", lines)
    more = ("--image-folder", tmp_path / "images", "--batch-size", 2, "--max-new-tokens", 2)
    assert answer(path, tmp_path / "a", *more) == 2
    message = one_line(capsys)
    assert "question q4: " in message and "torn.png" in message
    assert (tmp_path / ".a.0").read_text().count("question_id") == 4
    shutil.copy(IMAGES / "1.png", tmp_path / "images" / "torn.png")
    assert answer(path, tmp_path / "a", *more) == 0
    assert [line["question_id"] for line in read_lines(tmp_path / "a")] == ["q0", 1, "q2", 3, "q4", 5]


def test_every_condition_shows_the_prior_that_it_names(questions, tmp_path):
    texts = {}
    for condition in answering.CONDITIONS:
        assert answer(questions, tmp_path / condition, "--prior", condition, "--max-new-tokens", 15) == 0
        texts[condition] = [line["text"] for line in read_lines(tmp_path / condition)]
    write = lambda *images: generate(load("libra-7b"), Study(*images, query=seen.query), max_new_tokens=15)[0].text
    studies = [study(line) for line in make_questions()]
    for i, seen in enumerate(studies):
        current, prior = seen.current, seen.prior
        if prior is None:
            assert len({texts[condition][i] for condition in texts}) == 1
            continue
        assert texts["true"][i] == write(current, prior)
        assert texts["dummy"][i] == write(current)
        assert texts["reversed"][i] == write(prior, current)
        assert texts["blank"][i] == write(current, Image.new("RGB", Image.open(current).size))
        others = {other.prior for other in studies} - {None, prior}
        assert texts["shuffled"][i] in [write(current, other) for other in others]
    assert all(texts[condition] != texts["true"] for condition in texts if condition != "true")


def test_a_shuffled_prior_is_another_patient_s_and_anyone_s():
    draw = random.Random(1)
    images = [[f"files/p10/p100000{p:02}/s{s}/a.jpg", f"files/p10/p100000{p:02}/s{s - 1}/b.jpg"]
              for p in range(30) for s in range(1, draw.randint(1, 9) + 1)]  # fmt: skip
    questions = [Question(i, pair, "?", None) for i, pair in enumerate(images)]
    found = [answering.draw_other_priors(questions, seed)["3"] for seed in range(200)]
    own = images[3][1].split("/")[2]
    assert all(own not in name for name in found)
    counts = np.array([found.count(prior) for _, prior in images if own not in prior])
    assert counts.sum() == 200 and (counts > 0).sum() > len(counts) / 2 and counts.max() < 8  # 1.4 each, on average
    assert answering.draw_other_priors(questions, 0) == answering.draw_other_priors(questions, 0)
    assert len(set(answering.draw_other_priors(questions, 0).values())) > len(questions) / 2


@pytest.mark.parametrize(("flags", "culprit"), [
    (("--csv", "priors/true.jsonl"), "true.jsonl is given twice"),
    (("--conditions", "shuffled", "--questions", "one.jsonl"), "all priors are of one patient"),
    (("--conditions", "blank", "--questions", "bare.jsonl"), "question 19 has no reference"),
    (("--conditions", "shuffled", "--questions", "lost.jsonl"), "question 19: no image 9.png"),
    (("--out", "q.jsonl"), "q.jsonl is a file"),
    (("--out", "torn", "--conditions", "dummy,blank"), "blank.jsonl line 1 is not JSON"),
    (("--out", "other", "--conditions", "dummy,blank"), "blank.jsonl was made with max_new_tokens 2, not 1"),
    (("--out", "none", "--conditions", "dummy,blank"), "blank.jsonl.settings.json holds no settings"),
])  # fmt: skip
def test_prior_looks_at_every_condition_before_it_answers(questions, tmp_path, monkeypatch, capsys, flags, culprit):
    monkeypatch.chdir(tmp_path)
    *others, last = lines = make_questions()
    write_lines(Path("one.jsonl"), [line | {"image": ["p10000001/a.png", "p10000001/b.png"]} for line in lines])
    write_lines(Path("bare.jsonl"), [*others, last | {"reference": None}])
    write_lines(Path("lost.jsonl"), [*others, last | {"image": ["0.png", "9.png"]}])
    # a blank.jsonl that another run has made, and what has become of it
    short = ("--device", "cpu", "--max-new-tokens", 1)
    with_prior = [line for line in lines if len(set(line["image"])) == 2]
    for folder in ("torn", "other", "none"):
        Path(folder).mkdir()
        chosen = write_lines(Path("chosen.jsonl"), with_prior)
        assert answer(chosen, Path(folder, "blank.jsonl"), "--prior", "blank", *short) == 0
    Path("torn/blank.jsonl").write_text("{\n")
    Path("none/blank.jsonl.settings.json").write_text("{}")
    settings = Path("other/blank.jsonl.settings.json")
    settings.write_text(settings.read_text().replace('"max_new_tokens": 1', '"max_new_tokens": 2'))
    prior = ("prior", "--model", MODEL, "--image-folder", IMAGES, "--questions", questions, "--out", "priors", *short)
    capsys.readouterr()
    monkeypatch.setattr(cli, "write_answers", None)
    assert cli.main(cli.parse([str(part) for part in (*prior, *flags)])) == 2
    assert culprit in one_line(capsys)
    assert not Path("priors").exists()


def test_prior_answers_the_questions_that_have_one_and_resumes(questions, tmp_path, no_meteor, capsys):
    out, short = tmp_path / "new" / "priors", ("--device", "cpu", "--max-new-tokens", "4", "--batch-size", "8")
    files = ("--model", MODEL, "--image-folder", IMAGES, "--questions", questions, "--out", out, "--limit", 5)
    prior = lambda *more: cli.main(cli.parse(["prior", *map(str, files), *short, *map(str, more)]))
    assert prior("--conditions", "reversed") == 0
    capsys.readouterr()
    assert prior() == 0
    assert capsys.readouterr().err.count("all there before") == 2
    for condition in answering.CONDITIONS:
        assert answer(questions, tmp_path / condition, "--prior", condition, *short) == 0
        every = {line["question_id"]: line for line in read_lines(tmp_path / condition)}
        found = read_lines(out / f"{condition}.jsonl")
        assert found == [every[id] for id in (1, "q2", 5, 7, "q8")]
    capsys.readouterr()
    single = write_lines(tmp_path / "single", [line | {"image": "0.png"} for line in make_questions()])
    assert prior("--questions", single) == 2
    assert "no question with a prior" in one_line(capsys)
