"""Answer files against `generate` called study by study, whatever kills, shares or spoils the run; what a prior does.

    python tests/test_answer.py 10     kill a run at ten random moments (a minute); the tests do it three times
"""

import fcntl
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, load
from PIL import Image
from test_house import commands

import eval as evaluation
import sample
from data import Records, Study
from decoder import Cache
from evaluation import answering, metrics
from phantom import hospital as phantom
from plumbing import checkpoint
from plumbing.distributed import World
from sample import Options, generate

MODEL, IMAGES = GOLDEN / "libra-7b" / "model", GOLDEN / "images"
WORDS = ("Describe", "the", "heart,", "lungs", "and", "bones;", "say", "what", "changed", "since", "prior")


def write_lines(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_questions() -> list[dict]:
    """20 of them; every third has no prior, one has its current image twice; ids are text and numbers."""
    draw = random.Random(0)
    pairs = [[f"{i % 6}.png", f"{(i + 1 + i // 6) % 6}.png"] for i in range(20)]
    images = [pair[:1] if i % 3 == 0 else pair for i, pair in enumerate(pairs)]
    images[3], images[4] = "5.png", ["2.png", "2.png"]
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 15))) for _ in images]
    return [{"question_id": i if i % 2 else f"q{i}", "image": image, "text": text, "reference": text}
            for i, (image, text) in enumerate(zip(images, texts, strict=True))]  # fmt: skip


def command(questions: Path, answers: Path, *more) -> list[str]:
    named = {"--model": MODEL, "--questions": questions, "--image-folder": IMAGES, "--answers": answers}
    given = list(map(str, more))  # of a flag given twice the last counts
    return ["answer", *(str(part) for pair in named.items() for part in pair), "--device", "cpu", *given]


def answer(questions: Path, answers: Path, *more) -> int:
    return evaluation.main(evaluation.parse(command(questions, answers, *more)))


@pytest.fixture
def asked(tmp_path):
    return write_lines(tmp_path / "q.jsonl", make_questions())


@pytest.fixture(autouse=True)
def no_meteor(monkeypatch):
    monkeypatch.setattr(metrics, "meteor_scorer", lambda: lambda prediction, reference: 0.5)


def study(question: dict) -> Study:
    images = [question["image"]] if isinstance(question["image"], str) else list(dict.fromkeys(question["image"]))
    return Study(*(IMAGES / name for name in images), query=question["text"], id=str(question["question_id"]))


def one_line(capsys) -> str:
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1 and printed.err.startswith("eval.py"), printed
    return printed.err


# ------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("settings", [
    dict(num_beams=3, length_penalty=2.0, max_new_tokens=20),
    dict(temperature=0.8, top_p=0.9, seed=5, max_new_tokens=20),
])  # fmt: skip
def test_answers_are_what_generate_gives_each_study(asked, tmp_path, settings):
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert answer(asked, tmp_path / "a.jsonl", "--batch-size", 6, *flags) == 0
    questions = make_questions()
    expected = [generate(load("libra-7b"), study(question), **settings)[0].text for question in questions]
    assert read_lines(tmp_path / "a.jsonl") == [
        {"question_id": question["question_id"], "prompt": question["text"], "text": text, "model_id": str(MODEL)}
        for question, text in zip(questions, expected, strict=True)
    ]
    assert len(set(expected)) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.settings.json", "q.jsonl"]


def test_training_records_are_questions_with_references(tmp_path, capsys):
    turn = lambda question, answer: [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    two_turns = turn("<image>\nHeart?", "Stable.") + turn("Lungs?", "Clear.")
    records = [
        {"id": "a", "image": ["0.png", "1.png"], "conversations": two_turns},
        {"id": 7, "image": "2.png", "conversations": turn("Bones?\n<image>", "No fracture.")},
    ]
    (tmp_path / "train.json").write_text(json.dumps(records, indent=1))
    out = tmp_path / "a.jsonl"
    assert answer(tmp_path / "train.json", out, "--max-new-tokens", 5) == 0
    questions = [{"image": ["0.png", "1.png"], "text": "Heart?"}, {"image": "2.png", "text": "Bones?"}]
    expected = [generate(load("libra-7b"), study(q | {"question_id": 0}), max_new_tokens=5)[0].text for q in questions]
    assert [(line["question_id"], line["prompt"], line["text"]) for line in read_lines(out)] == [
        ("a", "Heart?", expected[0]), (7, "Bones?", expected[1])
    ]  # fmt: skip
    pairs = evaluation.read_pairs(tmp_path / "train.json", out)
    assert [(pair.reference, pair.has_prior) for pair in pairs] == [("Stable.", True), ("No fracture.", False)]


def test_ids_and_limit_choose(asked, tmp_path, capsys):
    chosen = lambda name: [line["question_id"] for line in read_lines(tmp_path / name)]
    short = ("--max-new-tokens", 1)
    (tmp_path / "ids").write_text("7\n\nq2 \nq18\n")
    assert answer(asked, tmp_path / "a", "--ids", tmp_path / "ids", *short) == 0
    assert answer(asked, tmp_path / "b", "--ids", "q18,7,q2", "--limit", 2, *short) == 0
    assert (chosen("a"), chosen("b")) == (["q2", 7, "q18"], ["q2", 7])
    capsys.readouterr()
    assert answer(asked, tmp_path / "c", "--ids", "q18,8,9,10", *short) == 2
    assert f"{asked} has no question 10 (and 1 more of --ids)" in one_line(capsys)


# ------------------------------------------------------------------------------------------ stopping and sharing

LONG = ("--batch-size", 2, "--num-beams", 8, "--max-new-tokens", 50)


SERVER = """
import json, os, sys
import eval as evaluation

for line in sys.stdin:  # each command in a process of its own, which need not import all anew
    child = os.fork()
    if not child:
        os._exit(evaluation.main(evaluation.parse(json.loads(line))))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def kill(folder: Path, times: int) -> int:
    """Kill runs at random moments: how many answers were kept in all."""
    asked, killed, work = write_lines(folder / "q.jsonl", make_questions()), folder / "killed", folder / ".killed.0"
    environment, pipe = os.environ | {"OMP_NUM_THREADS": "1"}, dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=environment, text=True, bufsize=1, **pipe)
    kept = lambda: work.read_bytes().count(b"\n") if work.exists() else 20 * killed.exists()

    def begin(answers: Path) -> int:
        server.stdin.write(json.dumps(command(asked, answers, *LONG)) + "\n")
        return int(server.stdout.readline())

    def end() -> int:
        return int(server.stdout.readline())

    begun = time.monotonic()
    begin(folder / "whole")
    assert end() == 0
    duration = time.monotonic() - begun
    for number in range(times):
        before, child = kept(), begin(killed)
        while kept() < min(20, before + 2 * (number % 2)):  # it dies in the next batch, or in the one behind it
            time.sleep(0.001)
        time.sleep(random.uniform(0, duration / (4 if number % 2 == 0 else 15)))
        if not killed.exists():
            os.kill(child, signal.SIGKILL)
        end()
        assert kept() >= before
    saved = kept()
    begin(killed)
    assert end() == 0
    server.communicate()
    assert killed.read_bytes() == (folder / "whole").read_bytes()
    assert sorted(path.name for path in folder.iterdir() if "killed" in path.name) == ["killed", "killed.settings.json"]
    return saved


def test_killed_at_any_moment_the_file_is_the_same_in_the_end(tmp_path):
    assert kill(tmp_path, 3) > 0


def test_two_processes_write_what_one_does(asked, tmp_path):
    assert answer(asked, tmp_path / "one", *LONG[:4], "--max-new-tokens", 10) == 0
    shared = command(asked, tmp_path / "two", *LONG[:4], "--max-new-tokens", 10)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "eval.py", *shared]
    run = subprocess.run(torchrun, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    assert run.stderr.count("20 answers") == 1


def test_whoever_answered_a_batch_it_is_kept(asked, tmp_path):
    """What is left of two ranks: a batch each, and the beginning of another."""
    out = tmp_path / "a.jsonl"
    assert answer(asked, out, "--batch-size", 4, "--max-new-tokens", 5) == 0
    whole, settings = out.read_bytes(), json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    libra, lines = load("libra-7b"), dict(zip(map(str, range(20)), whole.splitlines(keepends=True), strict=True))
    lengths = {id: len(sample.prompt_of(libra, json.loads(line)["prompt"]).ids) for id, line in lines.items()}
    order = sorted(lines, key=lengths.get, reverse=True)
    marked = [lines[id].replace(b'"text": "', b'"text": "kept ') for id in order]
    (tmp_path / ".a.jsonl.0").write_bytes(b"".join(marked[4:8]) + marked[0][:50])
    half = lines[order[12]] + lines[order[13]][:-1]
    (tmp_path / ".a.jsonl.1").write_bytes(b"".join(marked[8:12]) + half)
    out.unlink()
    assert settings["batch_size"] == 4
    assert answer(asked, out, "--max-new-tokens", 5) == 0  # it goes on with the batch size it was begun with
    kept = [b'"text": "kept ' in line for line in out.read_bytes().splitlines()]
    assert sum(kept) == 8 and all(kept[int(id)] for id in order[4:12])
    assert out.read_bytes().replace(b'"text": "kept ', b'"text": "') == whole


def test_an_interrupt_keeps_what_is_done(asked, tmp_path, monkeypatch, capsys):
    real, calls = sample.decode, []

    def decode(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sample, "decode", decode)
    assert answer(asked, tmp_path / "a", "--batch-size", 5, "--max-new-tokens", 2) == 130
    assert len((tmp_path / ".a.0").read_bytes().splitlines()) == 10
    assert answer(asked, tmp_path / "a", "--batch-size", 5, "--max-new-tokens", 2) == 0
    assert len(calls) == 3 + 2 and len(read_lines(tmp_path / "a")) == 20


def test_a_full_disk_keeps_what_is_done(asked, tmp_path):
    assert answer(asked, tmp_path / "whole", "--batch-size", 3, "--max-new-tokens", 20) == 0
    size = (tmp_path / "whole").stat().st_size // 2
    arguments = command(asked, tmp_path / "a", "--batch-size", 3, "--max-new-tokens", 20)
    run = [sys.executable, "eval.py", *arguments]
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    run = subprocess.run(run, cwd=ROOT, preexec_fn=small, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "/a: File too large: make room and run this again" in run.stderr
    assert not (tmp_path / "a").exists() and len((tmp_path / ".a.0").read_bytes()) == size
    assert answer(asked, tmp_path / "a", "--batch-size", 3, "--max-new-tokens", 20) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()


def test_other_settings_are_not_mixed(asked, tmp_path, capsys):
    out, short = tmp_path / "a", ("--max-new-tokens", 2)
    assert answer(asked, out, *short) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert answer(asked, out, *short) == 0
    assert capsys.readouterr().err == f"{out}: 20 answers, all there before\n"
    other = write_lines(tmp_path / "other.jsonl", make_questions()[::-1])
    shutil.copytree(GOLDEN / "libra-7b", tmp_path / "model")
    shard = next((tmp_path / "model" / "model").glob("*00002*.safetensors"))
    trained = bytearray(shard.read_bytes())
    trained[len(trained) // 2 :] = bytes(len(trained) - len(trained) // 2)
    shard.write_bytes(trained)
    for flags, changed in {
        ("--max-new-tokens", 3): "max_new_tokens 2, not 3: give another file, or delete",
        ("--num-beams", 2, "--prior", "blank"): "prior true, not blank; num_beams 1, not 2:",
        ("--limit", 4): "asked 20 ids",
        ("--batch-size", 3): "batch_size 16, not 3:",
        ("--questions", other): "questions ",
        ("--model", GOLDEN / "libra-3b" / "model"): "libra-3b/model; weights ",
        ("--model", tmp_path / "model" / "model"): f"not {tmp_path}/model/model; weights ",
        ("--template", "v1"): "template None, not v1:",
    }.items():
        assert answer(asked, out, *short, *flags) == 2
        assert changed in one_line(capsys), flags
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    # and while it is not finished
    lines = out.read_bytes().splitlines(keepends=True)
    out.rename(tmp_path / "finished")
    (tmp_path / ".a.0").write_bytes(lines[0])
    assert answer(asked, out, "--max-new-tokens", 3) == 2
    assert f"delete {tmp_path}/.a.0, {out}.settings.json" in one_line(capsys)
    assert (tmp_path / ".a.0").read_bytes() == lines[0]
    (tmp_path / "a.settings.json").unlink()
    assert answer(asked, out, *short) == 2
    assert f"{tmp_path}/.a.0 is there, and no a.settings.json says how it was made" in one_line(capsys)
    # nothing done is nothing to mix with
    (tmp_path / ".a.0").write_bytes(lines[0][:-1])
    assert answer(asked, out, "--max-new-tokens", 3) == 0
    assert json.loads((tmp_path / "a.settings.json").read_text())["max_new_tokens"] == 3


def test_two_runs_do_not_write_one_file(asked, tmp_path, capsys):
    with open(tmp_path / ".a.0", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert answer(asked, tmp_path / "a") == 2
    assert "a is being written by another process" in one_line(capsys)


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(("change", "flags", "message"), [
    (lambda q: q[3].update(image="9.png"), (), "question 3: no image 9.png in"),
    (lambda q: q[3].update(image="../q.jsonl"), (), "question 3: image ../q.jsonl leads out of the image folder"),
    (lambda q: q[3].update(question_id="q2"), (), "line 4: its id was there already"),
    (lambda q: q[3].update(question_id=None), (), "line 4: question_id is missing"),
    (lambda q: q[3].pop("image"), (), "line 4: there is no image"),
    (lambda q: q[3].pop("text"), (), "line 4: text is not the question's text"),
    (lambda q: q[3].update(text="word " * 3000), (), "question 3: the prompt needs"),
    (lambda q: q.clear(), (), "is empty"),
    (lambda q: None, ("--answers", "/nowhere/a"), "no folder /nowhere for a"),
    (lambda q: None, ("--image-folder", "/nowhere"), "no image folder /nowhere"),
    (lambda q: None, ("--model", "/nowhere"), "no model folder /nowhere"),
    (lambda q: None, ("--template", "x"), "template"),
    (lambda q: None, ("--num-beams", "2", "--temperature", "1"), "beam search and sampling exclude each other"),
    (lambda q: [question.update(image=question["image"][:1]) for question in q], ("--ids", "z"), "no question z"),
    (lambda q: [question.update(image=["p1/p10000001/a", "p1/p10000001/b"]) for question in q],
     ("--prior", "shuffled"), "priors of one patient only"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line_and_leave_nothing(tmp_path, capsys, change, flags, message):
    questions = make_questions()
    change(questions)
    path = write_lines(tmp_path / "q.jsonl", questions)
    assert answer(path, tmp_path / "a", *flags) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("arguments", "message"), [
    (["answer", "--questions", "q"], "the following arguments are required: --model, --image-folder, --answers"),
    (["answer", "--model", "m", "--questions", "q", "--image-folder", "i", "--answers", "a", "--limit", "0"],
     "--limit 0 is not at least 1"),
    (["answer", "--model", "m", "--questions", "q", "--image-folder", "i", "--answers", "a", "--batchsize", "1"],
     "unknown argument --batchsize; did you mean --batch-size"),
    (["prior", "--questions", "q", "--out", "o", "--model", "m"], "--model answers, and needs --image-folder"),
    (["prior", "--questions", "q", "--out", "o", "--conditions", "true,black"], "not 'black'"),
])  # fmt: skip
def test_wrong_arguments_are_told_before_anything_is_read(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        evaluation.parse(arguments)
    assert ended.value.code == 2 and message in one_line(capsys)


def test_an_image_that_cannot_be_read_names_its_question_and_keeps_the_others(tmp_path, capsys):
    questions = make_questions()[:6]
    for i, question in enumerate(questions):
        question["text"] = "word " * (6 - i)
    shutil.copytree(IMAGES, tmp_path / "images")
    questions[4]["image"] = ["0.png", "torn.png"]
    (tmp_path / "images" / "torn.png").write_bytes((IMAGES / "1.png").read_bytes()[:400])
    path, more = write_lines(tmp_path / "q", questions), ("--image-folder", tmp_path / "images", "--batch-size", 2)
    assert answer(path, tmp_path / "a", *more, "--max-new-tokens", 2) == 2
    assert "question q4: " in (said := one_line(capsys)) and "torn.png" in said
    assert (tmp_path / ".a.0").read_bytes().count(b"\n") == 4
    shutil.copy(IMAGES / "1.png", tmp_path / "images" / "torn.png")
    assert answer(path, tmp_path / "a", *more, "--max-new-tokens", 2) == 0
    assert [line["question_id"] for line in read_lines(tmp_path / "a")] == ["q0", 1, "q2", 3, "q4", 5]


def test_a_batch_is_what_fits_half_the_memory(monkeypatch):
    libra, options = load("libra-7b"), Options(num_beams=3, max_new_tokens=64)
    cache = Cache(libra.decoder.config, 1, 100, "cpu", torch.float32)
    cache.start(3)
    for _ in range(64):
        libra.decode_step(cache, [[5, 5, 5]])
    held = sum(keys.nbytes + values.nbytes for keys, values in cache.prefix) + sum(x.nbytes for x in cache.suffix)
    one = held + 3 * 4 * 4 * libra.vocabulary
    for free, size in {0: 1, 2 * one: 1, 2 * 7 * one + 1: 7, 2 * 7 * one - 1: 6, 10**12: 16}.items():
        monkeypatch.setattr(checkpoint, "free_memory", lambda device, free=free: free)
        assert answering.fitting(libra, 100, options, World()) == size


# ------------------------------------------------------------------------------------------ priors


def test_every_condition_shows_the_prior_that_it_names(asked, tmp_path):
    questions, short = make_questions(), ("--max-new-tokens", 15, "--batch-size", 7)
    with_prior = [i for i, question in enumerate(questions) if len(study(question).images()) == 2]
    texts = {}
    for condition in evaluation.CONDITIONS:
        assert answer(asked, tmp_path / condition, "--prior", condition, *short) == 0
        texts[condition] = [line["text"] for line in read_lines(tmp_path / condition)]
    libra = load("libra-7b")
    write = lambda *studies: [generate(libra, study, max_new_tokens=15)[0].text for study in studies]
    for i, question in enumerate(questions):
        seen = study(question)
        if i not in with_prior:
            assert len({texts[condition][i] for condition in texts}) == 1
            continue
        black = Image.new("RGB", Image.open(seen.current).size)
        expected = write(seen, *(Study(current, prior, seen.query) for current, prior in (
            (seen.current, None), (seen.prior, seen.current), (seen.current, black))))  # fmt: skip
        assert [texts[name][i] for name in ("true", "dummy", "reversed", "blank")] == expected
        others = {questions[j]["image"][1] for j in with_prior} - {seen.prior.name}
        assert texts["shuffled"][i] in write(*(Study(seen.current, IMAGES / name, seen.query) for name in others))
    assert all(texts[one] != texts["true"] for one in texts if one != "true")


def test_a_shuffled_prior_is_another_patient_s_and_anyone_s(tmp_path):
    draw = random.Random(1)
    sizes = [draw.randint(1, 9) for _ in range(30)]
    images = [[f"files/p10/p100000{p:02}/s{s}/a.jpg", f"files/p10/p100000{p:02}/s{s - 1}/b.jpg"]
              for p, size in enumerate(sizes) for s in range(1, size + 1)]  # fmt: skip
    path = write_lines(tmp_path / "q", [{"question_id": i, "image": x, "text": "?"} for i, x in enumerate(images)])
    records, found = Records(path), []
    for seed in range(200):
        shuffled = answering.shuffle_priors(records, seed)
        question = answering.Question.parse(records[3])
        found.append(shuffled(question))
        assert shuffled(question) == found[-1]
    own = images[3][1].split("/")[2]
    assert all(own not in name for name in found)
    counts = np.array([found.count(prior) for _, prior in images if own not in prior])
    assert counts.sum() == 200 and (counts > 0).sum() > len(counts) / 2 and counts.max() < 8  # 1.4 each, on average
    seen = [answering.shuffle_priors(records, 0)(answering.Question.parse(raw)) for raw in records]
    assert len(set(seen)) > len(seen) / 2


def test_directions_flip():
    for true, other, expected in (
        ("The effusion has worsened.", "The effusion has improved.", (1, 1)),
        ("New edema; the effusion is larger.", "Resolved edema; smaller effusion.", (2, 2)),
        ("New edema, improved effusion.", "New edema, improved effusion.", (0, 2)),
        ("New edema, improved effusion.", "Resolved edema, worse effusion.", (2, 2)),
        ("New edema. Improved effusion.", "Improved effusion.", (0, 2)),  # gone, but nothing came in its stead
        ("Improved effusion.", "New edema. Improved effusion.", (0, 1)),
        ("Unchanged. Persistent edema.", "Worse.", (0, 0)),
        ("Improved.", "Unchanged.", (0, 1)),
        ("", "", (0, 0)),
    ):
        assert metrics.flips(true, other) == expected, (true, other)
    assert not metrics.WORSE & metrics.BETTER
    assert metrics.WORSE | metrics.BETTER < metrics.WORDS_OF_CHANGE


def prior(*arguments) -> int:
    return evaluation.main(evaluation.parse(["prior", *map(str, arguments)]))


def test_the_prior_table_from_made_up_answers(tmp_path, capsys):
    """Four studies with a prior and one without, whose answers must not count."""
    references = ["New edema.", "The effusion has improved.", "Stable heart.", "Worse edema.", "Clear."]
    answers = {
        "true": references,
        "reversed": ["Resolved edema.", "The effusion has worsened.", "Stable heart.", "Worse edema.", "x"],
        "dummy": ["Edema.", "The effusion.", "Stable heart.", "Edema.", "y"],
    }
    questions = [{"question_id": i, "image": ["a", "b"] if i < 4 else "a", "text": "?", "reference": text}
                 for i, text in enumerate(references)]  # fmt: skip
    path = write_lines(tmp_path / "q", questions)
    for condition, texts in answers.items():
        lines = [{"question_id": i, "text": text, "model_id": "made"} for i, text in enumerate(texts)]
        write_lines(tmp_path / f"{condition}.jsonl", lines[::-1] if condition == "true" else lines[:4])
    files = ("--questions", path, "--out", tmp_path, "--conditions", "reversed,dummy")
    assert prior(*files, "--json", "--csv", tmp_path / "p.csv") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["studies"]) == ("made", 4)
    value = lambda key: {name: round(cell["value"], 6) for name, cell in result["scores"][key].items()}
    assert value("reports changed") == {"reversed": 50, "dummy": 75}
    assert value("directions flipped") == {"reversed": pytest.approx(200 / 3), "dummy": 0}
    assert value("Temporal_entity_score") == {"true": 100, "reversed": 50, "dummy": 25}
    assert value("Temporal_floor") == {"true": 0}
    questions.pop()
    alone = write_lines(tmp_path / "four", questions)
    true = write_lines(tmp_path / "true4", read_lines(tmp_path / "true.jsonl")[1:])
    compared = ["score", "--references", alone, "--compare", true, tmp_path / "reversed.jsonl", "--json"]
    assert evaluation.main(evaluation.parse(list(map(str, compared)))) == 0
    theirs = json.loads(capsys.readouterr().out)["scores"]
    for key in ("BLEU1", "BLEU4", "ROUGE-L", "Temporal_entity_score"):
        assert result["scores"][key]["reversed"]["difference"] == theirs[key]["with prior"]["difference"], key
    header, *rows = (tmp_path / "p.csv").read_text().splitlines()
    assert header == "Model Name,score,prior,value,low,high,difference value,difference low,difference high"
    row = next(row.split(",") for row in rows if "reports changed,reversed" in row)
    assert row[:4] == ["made", "reports changed", "reversed", "50.0"] and row[6:] == ["", "", ""]
    assert prior(*files) == 0
    table = capsys.readouterr().out
    assert re.search(r"made, 4 studies with a prior.*\n +true +reversed +dummy", table)
    assert re.search(r"Temporal_entity_score.*\n  minus true +-50\.00 \[.*-75\.00 \[", table)
    assert "of 3 words of direction" in table
    (tmp_path / "dummy.jsonl").unlink()
    assert prior(*files) == 2
    assert "dummy.jsonl" in one_line(capsys)
    lines = read_lines(tmp_path / "reversed.jsonl")
    for wrong, message in ((lines[1:], "1 ids of"), ([*lines, {"question_id": "x", "text": ""}], "are not in")):
        write_lines(tmp_path / "reversed.jsonl", wrong)
        assert prior(*files) == 2
        assert message in one_line(capsys)


def test_prior_answers_what_has_one_and_goes_on(asked, tmp_path, capsys):
    model = ("--model", MODEL, "--image-folder", IMAGES, "--device", "cpu", "--max-new-tokens", 4)
    files = ("--questions", asked, "--out", tmp_path / "new" / "priors", "--limit", 5)
    assert prior(*files, *model, "--conditions", "reversed") == 0
    capsys.readouterr()
    assert prior(*files, *model) == 0
    assert capsys.readouterr().err.count("all there before") == 2
    for condition in evaluation.CONDITIONS:
        assert answer(asked, tmp_path / condition, "--prior", condition, "--max-new-tokens", 4) == 0
        all_of_them = {line["question_id"]: line for line in read_lines(tmp_path / condition)}
        found = read_lines(tmp_path / "new" / "priors" / f"{condition}.jsonl")
        assert [line["question_id"] for line in found] == [1, "q2", 5, 7, "q8"]
        assert all(all_of_them[line["question_id"]] == line for line in found)
    alone = [question | {"image": "0.png"} for question in make_questions()]
    assert prior("--questions", write_lines(tmp_path / "alone", alone), "--out", tmp_path, *model) == 2
    assert "has no question with a prior" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ the README


def test_the_readme_s_recipe_runs_on_a_phantom_hospital(tmp_path, monkeypatch, capsys):
    """Every command on evaluation, in their order; RadEval's result is made up."""
    monkeypatch.chdir(tmp_path)
    phantom.write("images", patients=3, size=64, workers=1)
    lines, place = [], "files/p{0[0]}{0[1]}/p{0}/s{1}".format
    for truth in read_lines(Path("images/truth.jsonl")):
        folder = place(str(truth["subject_id"]), truth["study_id"])
        image = [f"{folder}/{truth['dicom_id']}.jpg"]
        if lines and lines[-1]["study"] == truth["prior_study_id"]:
            image.append(lines[-1]["image"][0])
        report = re.search("FINDINGS:(.*)IMPRESSION:", Path("images", f"{folder}.txt").read_text(), re.S)[1]
        lines.append({"question_id": truth["study_id"], "study": truth["study_id"], "image": image,
                      "text": "Provide a detailed description of the findings in the radiology image.",
                      "reference": " ".join(report.split())})  # fmt: skip
    write_lines(Path("questions.jsonl"), lines)
    shutil.copy("images/truth.jsonl", "truth.jsonl")
    names = set()
    for line in commands("eval.py"):
        arguments = shlex.split(line, comments=True)
        names.add(arguments[0])
        if "--model" in arguments:
            arguments += ["--max-new-tokens", "3"]
        if "--merge" in arguments:
            count = len(json.loads(Path("pairs.json").read_text())["references"])
            Path("radeval.json").write_text(json.dumps({"radgraph_simple": [0.5] * count}))
        assert evaluation.main(evaluation.parse(arguments)) == 0, line
    assert names == {"answer", "score", "prior"}
    assert {"answers.jsonl", "page.html", "scores.csv"} <= {path.name for path in tmp_path.iterdir()}
    assert "minus true" in capsys.readouterr().out


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(f"{sys.argv[1]} kills, {kill(Path(place), int(sys.argv[1]))} of 20 answers kept: the same bytes")
