"""The checks on toy sizes, on a CPU: each runs, and the figures say that no GPU gave them. Oracles: golden values, and
checks made to fail."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import read_lines

from bench import __main__ as bench
from bench import checks, costs, gpu
from bench.checks import Card
from bench.gpu import CHECKS, Check


def run(tmp_path, todo, minutes=8.0):
    """The lines of some checks, behind the machine's."""
    out = tmp_path / "gpu.jsonl"
    gpu.run(SimpleNamespace(device="cpu", minutes=minutes, out=str(out)), todo)
    return read_lines(out)


# ------------------------------------------------------------------------------------------ all checks


def test_every_check_runs_on_a_cpu_or_says_what_it_needs(tmp_path, capfd):
    out = tmp_path / "gpu.jsonl"
    assert bench.main(["gpu", "--device", "cpu", "--out", str(out)]) == 0
    machine, *lines = read_lines(out)
    assert (machine["device"], machine["gpu"], machine["torch"]) == ("cpu", None, torch.__version__)
    assert [line["name"] for line in lines] == [check.function.__name__ for check in CHECKS]

    assert [line for line in lines if line["ok"] is False] == []
    skipped = {(line["name"], line.get("mode") or line.get("processes")) for line in lines if line["ok"] is None}
    assert skipped == {("decode_ms", "graph"), ("sharding", 2)}
    # nothing can be taken for a GPU's
    assert not any("share" in line or line.get("floor_ms") or line.get("mfu") for line in lines)
    assert f"{len(lines) - 4 + 1} of {len(lines) + 1} checks ran on cpu, 0 failed" in capfd.readouterr().out


# ------------------------------------------------------------------------------------------ checks that fail


def wrong(card):
    return dict(ok=False, error_of_logits=3.0)


def raising(card, number):
    raise KeyError(f"number {number}")


def dying(card):
    os._exit(1)


def breaking(card, number):
    """As after an illegal access on a card: its process computes nothing more."""
    raise RuntimeError(f"CUDA error: an illegal memory access, in process {os.getpid()}")


def hanging(card):
    time.sleep(600)


def right(card):
    return dict(milliseconds=1.5)


def test_a_check_that_is_wrong_raises_or_dies_does_not_stop_the_others(tmp_path, capfd):
    todo = [Check(wrong, 1), Check(raising, 1, dict(number=7)), Check(dying, 1), Check(right, 1)]
    _, first, second, third, last = run(tmp_path, todo)
    assert (first["ok"], first["error_of_logits"]) == (False, 3.0)
    assert (second["ok"], second["number"]) == (False, 7) and second["error"] == "KeyError: 'number 7'"
    assert any("raising" in frame for frame in second["traceback"])
    assert (third["ok"], third["error"]) == (False, "its process died")
    assert (last["ok"], last["milliseconds"]) == (True, 1.5)
    assert "failed: raising number=7" in capfd.readouterr().out


def test_after_an_error_on_the_card_the_others_have_a_new_process(tmp_path):
    _, first, second = run(tmp_path, [Check(breaking, 1, dict(number=number)) for number in range(2)])
    assert first["error"] != second["error"]


def test_when_the_minutes_are_over_one_that_hangs_is_ended_and_the_others_are_named(tmp_path):
    begin = time.monotonic()
    _, hung, skipped = run(tmp_path, [Check(hanging, 1), Check(right, 9)], minutes=0.5)
    assert time.monotonic() - begin < 80
    assert hung["ok"] is False and "did not end" in hung["error"]
    assert skipped["ok"] is None and skipped["name"] == "right" and "0 s are left" in skipped["skipped"]


def test_a_second_run_keeps_the_lines_of_the_first(tmp_path):
    # no time for a single check
    assert len(run(tmp_path, [], minutes=1e-9)) == 1
    assert len(run(tmp_path, [], minutes=1e-9)) == 2


def test_a_step_reads_the_bytes_that_a_plan_counts():
    step = checks.make_step(Card("cpu"), "bfloat16", studies=3, beams=4)
    work = costs.Costs(step.libra.encoder.config, step.libra.decoder.config)
    norms = 2 * (2 * 2 + 1) * 64  # bytes of two in each of two layers, and the last
    positions = int(step.cache.lengths.sum()) + 3 * 4 * 3  # half of six tokens
    # two layers, keys and values, two heads of 16, 2 bytes each
    expected = 2 * (work.layers + work.head) + norms + positions * 2 * 2 * 2 * 16 * 2
    assert checks.step_bytes(step.libra, step.cache) == expected


def test_attention_that_is_wrong_is_found(monkeypatch):
    attention = checks.attention

    def without_window(q, k, v, impl, window=None, **mask):
        return attention(q, k, v, impl=impl, window=window if q.dtype == torch.float64 else None, **mask)

    monkeypatch.setattr(checks, "attention", without_window)
    figures = checks.attention_numerics(Card("cpu"), "float32", [24, 16])
    assert figures["ok"] is False and len(figures["wrong"]) > 10
    assert all("window" in text for text in figures["wrong"])


def test_ids_that_differ_from_the_published_ones_are_found(monkeypatch):
    generate = checks.generate

    def cut(*arguments, **options):
        outputs = generate(*arguments, **options)
        if "num_beams" in options:
            outputs[0].token_ids.pop()
        return outputs

    monkeypatch.setattr(checks, "generate", cut)
    figures = checks.golden_ids(Card("cpu"))
    assert figures["ok"] is False and len(figures["differing"]) == figures["cases"]
    assert all(text.endswith("beams") for text in figures["differing"])


# ------------------------------------------------------------------------------------------ what plans take from it


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", None), ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB", "A100-40"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA RTX A6000", "A6000"), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_a_card_is_known_by_the_name_that_its_driver_gives(name, row):
    assert costs.find_gpu(name) == row


def test_on_a_known_card_the_checks_give_the_shares_that_a_plan_looks_for(monkeypatch):
    class Names(dict):
        def __contains__(self, name):
            self[name] = None
            return False

    options = SimpleNamespace(gpu="H100", gpus=1, rows=4, questions=4, records=1000)
    names = Names()
    libra = checks.random_libra(Card("cpu"), "bfloat16")
    costs.plan(costs.Costs(libra.encoder.config, libra.decoder.config), options, names)
    monkeypatch.setattr(Card, "gpu", "H100")
    shares = {}
    for check in CHECKS:
        if check.function in (checks.decode_ms, checks.first_token, checks.training_step):
            if check.arguments.get("mode", "eager") != "eager":
                continue
            shares |= check.function(Card("cpu"), **check.arguments).get("share", {})
    assert shares.keys() == names.keys()
    assert all(0 < share < 1 for share in shares.values())


H100 = dict(name="machine", device="NVIDIA H100 80GB HBM3", gpu="H100")
SHARES = [{"stage 1": 0.5}, {"first token": 0.8}, {"bandwidth, 10 beam(s), 8 together": 0.3}]


def write(path, *lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def hours(capsys, *flags) -> list[tuple]:
    """(hours, how they were estimated) of the times in a plan."""
    assert bench.main(["plan", "--json", "--gpu", "H100", *flags]) == 0
    parts = json.loads(capsys.readouterr().out).values()
    return [(term["value"], term["how"]) for terms in parts for term in terms if term["term"] == "time"]


def test_a_plan_takes_measured_shares_where_there_are_some_and_says_so(tmp_path, capsys):
    other = [H100 | dict(device="NVIDIA L40S", gpu="L40S"), dict(name="training_step", share={"stage 2": 0.99})]
    file = write(tmp_path / "m.jsonl", H100, *(dict(name="x", ok=True, share=share) for share in SHARES), *other)
    # the test set has two parts, greedy and beams; each computes first tokens, then reads for the others
    ratios = [0.5 / 0.4, 1, 0.8 / 0.4, 1, 0.8 / 0.4, 0.3 / 0.6]
    pairs = zip(hours(capsys), hours(capsys, "--measured", file), ratios, strict=True)
    for (assumed, how), (measured, new_how), ratio in pairs:
        assert measured == pytest.approx(assumed / ratio)
        assert "(assumed)" in how and ("(measured)" in new_how) == (ratio != 1)


@pytest.mark.parametrize(
    ("lines", "culprit"),
    [
        ([dict(name="machine", device="cpu", gpu=None)], "measured on cpu"),
        ([H100 | dict(gpu="H200", device="NVIDIA H200"), dict(share={"stage 1": 0.5})], "NVIDIA H200"),
        ([H100, dict(share={"stage 1": 0})], "line 2: share"),
        ([H100, dict(share={"stage 1": 45})], "line 2: share"),
        ([H100, dict(share=0.5)], "line 2: share"),
    ],
)
def test_a_plan_refuses_figures_that_are_not_of_its_gpu(lines, culprit, tmp_path, capsys):
    assert bench.main(["plan", "--gpu", "H100", "--measured", write(tmp_path / "m.jsonl", *lines)]) == 2
    error = capsys.readouterr().err
    assert culprit in error and error.count("\n") == 1
