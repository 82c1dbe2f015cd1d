"""Measuring: every row is there, a peer that computes something else is named, costs on paper agree with counting."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as bench
from bench import costs
from data import IGNORED
from decoder import decoder_config
from encoder import encoder_config
from model import Libra
from train import TrainConfig, build

TINY = (
    bench.RAD_DINO | dict(image_size=56, hidden_size=64, num_hidden_layers=4, num_attention_heads=4),
    dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
         vocab_size=600, max_position_embeddings=2048),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return bench.write(tmp_path_factory.mktemp("tiny"), *TINY)


@pytest.fixture(scope="module")
def given(tiny, tmp_path_factory):
    return bench.give(Libra.from_pretrained(tiny, device="cpu"), tmp_path_factory.mktemp("given") / "given.pt")


def test_the_model_to_measure_with_has_the_published_layout_in_shards(tiny):
    libra = Libra.from_pretrained(tiny, device="cpu")
    assert len(list(tiny.glob("*.safetensors"))) >= 3
    assert libra.vocabulary == 600 and libra.decoder.config.num_key_value_heads == 2 and libra.image_positions == 16


# -------------------------------------------------------------------------------------------- measuring


def test_every_row_is_measured_beside_peers_that_compute_the_same(tiny, tmp_path, capsys, monkeypatch):
    peers = ["transformers.models.llama.modeling_llama", "transformers.models.dinov2.modeling_dinov2", "peft"]
    monkeypatch.setattr(bench, "PRELOADED", ["bench", *peers])  # imported once instead of eight times
    arguments = ["--model", str(tiny), "--json", "--runs", "1", "--plot", str(tmp_path / "bars.svg")]
    assert bench.main(bench.parse(arguments)) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["work"], row["other"]): row for row in found["rows"]}
    peers = {(work, "transformers") for work in ("load", "encoder", "prefill", "greedy", "beams", "step", "questions")}
    assert rows.keys() == peers | {
        ("connector", None), ("studies", "8 × one study"), ("questions", "rows of their own"), ("lora", "peft"),
    }  # fmt: skip
    for (work, other), row in rows.items():
        assert "note" not in row, (work, row)
        numbers = ("seconds", "encoders", "memory", *(("other_seconds", "ratio", "other_memory") if other else ()))
        assert all(row[name] > 0 for name in numbers), (work, other)
        assert "%" in row["limit"] or work == "load"
    assert rows["encoder", "transformers"]["encoders"] == 1
    assert found["flops_per_second"] > 1e9 and found["bytes_per_second"] > 1e9
    text = "".join(xml.parse(tmp_path / "bars.svg").getroot().itertext())
    assert all(row["label"] in text for row in found["rows"])


def constant(setup, values=(1.0, 2.0)):
    return lambda: list(values)


def broken(setup):
    raise ValueError("pip install something")


def dying(setup):
    return lambda: os._exit(1)


def test_a_side_that_differs_fails_or_dies_is_named_and_not_compared():
    setup = bench.Setup("", "cpu", 1, "")
    others = dict(close=(1.00001, 2.0), off=(1.01, 2.0), short=(1.0,))
    sides = {name: partial(constant, values=values) for name, values in others.items()}
    sides = dict(ours=constant, **sides, broken=broken, dying=dying)
    measured, failed = bench.measure(sides, setup, 2)
    assert measured.keys() == {"ours", "close"} and measured["ours"][1] > 10**7
    assert failed["off"] == failed["short"] == "it computed something else: no comparison"
    assert failed["broken"] == "pip install something" and "killed" in failed["dying"]
    assert not bench.agree([1, 2], [1, 3], setup) and bench.agree([1, 2], [1, 2], setup)  # ids, to the last
    with pytest.raises(ValueError, match="ours failed: pip install something"):
        bench.measure(dict(ours=broken), setup, 1)


def test_a_missing_peer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"^pip install transformers$"):
        bench.peer("encoder", bench.Setup("", "cpu", 1, ""))
    with pytest.raises(ValueError, match=r"^pip install peft$"):
        bench.adapt(torch.nn.Linear(1, 1))


def test_shared_and_separate_rows_ask_the_same(given):
    shared, separate = (bench.batch(given, [0], 4, way) for way in (True, False))
    assert shared.ids.shape == (1, 16 + 40 + 4 * 117) and separate.ids.shape == (4, 16 + 40 + 117)
    learnt = [batch.labels[batch.labels != IGNORED] for batch in (shared, separate)]
    assert len(learnt[0]) == 4 * 79 and torch.equal(*learnt)
    assert shared.segments.unique().tolist() == [0, 1, 2, 3, 4] and not separate.segments.any()


def test_attention_on_a_cpu_says_what_it_cannot_show(capsys):
    assert bench.main(bench.parse(["attention", "--runs", "1"])) == 0
    printed = capsys.readouterr().out
    assert "no GPU here" in printed and "one row against rows of their own" in printed


# -------------------------------------------------------------------------------------------- on paper


def counted(run) -> int:
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def test_flops_on_paper_are_those_that_pytorch_counts(tiny, given):
    libra = Libra.from_pretrained(tiny, device="cpu")
    encoder, decoder = libra.encoder.config, libra.decoder.config
    pixels = torch.zeros(2, 3, 56, 56)
    with torch.no_grad():
        features = libra.features(pixels)[None]
        assert counted(lambda: libra.features(pixels)) == costs.encoder_flops(encoder, 2)
        # one extra key and value for each attention, and the layers' sum, are left out on paper
        assert counted(lambda: libra.connector(features)) == pytest.approx(costs.connector_flops(encoder, 64), rel=0.03)
    for learns, questions in (("connector", 4), ("lora", 1)):
        libra = build(TrainConfig(model=str(tiny), device="cpu", train=(learns,)))
        batch = bench.batch(given, [0], questions, True)
        length, (prefix, text) = batch.ids.shape[1], (16 + 40, 117)
        everything = counted(lambda libra=libra, batch=batch: libra.loss(batch).backward())
        # PyTorch's plain attention computes all pairs, on paper only those that are seen count
        seen = prefix**2 / 2 + questions * (text * prefix + text**2 / 2)
        unseen = 3 * costs.mixing_flops(decoder, length**2 - seen)
        paper = costs.step_flops(encoder, decoder, 1, questions, learns == "lora")
        assert everything - unseen == pytest.approx(paper, rel=0.05)


def test_sizes_on_paper_are_those_of_the_published_models():
    seven, three = (decoder_config(costs.MODELS[name], name) for name in ("7b", "3b"))
    assert costs.decoder_parameters(seven) == 6_738_149_376  # 6,738,415,616 with the norms
    assert costs.decoder_parameters(three) == 3_212_574_720  # 3,212,749,824 with the norms
    assert costs.lora_parameters(seven) == 319_815_680
    sizes = encoder_config(bench.RAD_DINO, "RAD-DINO", {})
    assert costs.encoder_parameters(sizes) == 84_934_656
    assert costs.connector_parameters(sizes, 4096) == 61_734_912


def test_a_plan_by_hand():
    sizes = encoder_config(bench.RAD_DINO, "RAD-DINO", {}), decoder_config(costs.MODELS["7b"], "7b")
    found = costs.plan(*sizes, "H100", gpus=2, rows=4, questions=4, records=100_000)
    first, second, greedy, beams = ({term: value for term, value, *_ in terms} for terms in found.values())
    assert first["frozen weights"] == 2 * (6_738_149_376 + 84_934_656)
    assert first["what learns"] == 16 * 61_734_912
    # in each of 32 layers: 8 × 4096 of norms, 2 × 4 × 4096 of attention, 4 × 11008 of the gate
    assert first["activations"] == 4 * (1369 + 40 + 4 * 117) * 32 * (32768 + 32768 + 44032)
    assert second["activations"] == 4 * (1369 + 157) * 32 * (109568 + 2 * (3 * 4096 + 11008) + 14 * 128)
    assert first["memory"] == first["frozen weights"] + first["what learns"] + first["activations"]
    # 25,000 rows on two GPUs; a row takes some 2 × 2 × 6.5 G × 1,877
    assert first["time"] == pytest.approx(25_000 * first["work"] / (0.4 * 2 * 989e12))
    assert first["work"] == pytest.approx(4 * 6.476e9 * 1877, rel=0.1)
    assert greedy["keys and values"] == 8 * (1431 + 120) * 524_288
    assert beams["keys and values"] == 8 * (1431 + 10 * 120) * 524_288
    assert greedy["read for a token"] == 2 * (6_476_005_376 + 131_072_000) + 8 * (1431 + 60) * 524_288


def test_a_plan_says_what_fits(capsys):
    assert bench.main(bench.parse(["plan", "--gpu", "4090", "--model", "7b"])) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(line[3:]) for line in lines if line[:1] == ["memory"]] == [
        "does not fit 24 GB", "does not fit 24 GB", "fits 24 GB", "does not fit 24 GB"
    ]  # fmt: skip
    assert bench.main(bench.parse(["plan", "--gpu", "A100", "--model", "3b", "--json"])) == 0
    assert all(term["value"] > 0 for terms in json.loads(capsys.readouterr().out).values() for term in terms)


# -------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--runs", "0"], "--runs 0 is not at least 1"),
        (["--treads=2"], "did you mean --threads?"),
        (["plan", "--model", "70b"], "--model 70b is neither a folder with a config.json nor one of 7b, 3b"),
        (["plan", "--gpu", "H1000"], "--gpu H1000 is not one of A100"),
        (["--model", "nowhere/model"], "nowhere/model"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_mistakes_are_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit) as exit:
        sys.exit(bench.main(bench.parse(arguments)))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and text in error and error.startswith("bench.py: ") and error.count("\n") == 1


def test_help_answers_before_torch_is_imported():
    command = [sys.executable, "-X", "importtime", "-m", "bench", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "plan --gpu H100" in done.stdout and "torch" not in done.stderr
