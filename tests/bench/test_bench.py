"""The oracles: PyTorch's FLOP counter, published parameter counts, and plans computed by hand."""

import json
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as bench
from bench import costs, sides
from bench.measure import agree, measure, measure_peak
from data import IGNORED
from encoder import encoder_config
from model import Libra
from plumbing.families import decoder_config
from train import TrainConfig, build

ENCODER = bench.RAD_DINO | dict(image_size=56, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
DECODER = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               intermediate_size=96, vocab_size=600)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return bench.write_random_model(tmp_path_factory.mktemp("tiny"), ENCODER, DECODER)


@pytest.fixture
def libra(tiny):
    return Libra.from_pretrained(tiny, device="cpu")


def published(name):
    return costs.Costs(encoder_config(bench.RAD_DINO, "RAD-DINO", {}), decoder_config(costs.MODELS[name], name))


# ------------------------------------------------------------------------------------------ measuring


WORKS = {"decode": sides.DECODING, "modes": tuple(sides.MODES), "train": sides.TRAINING}


@pytest.mark.parametrize("what", WORKS)
def test_every_piece_of_work_is_measured_beside_a_peer_that_computes_the_same(what, tiny, capsys):
    assert bench.main([what, "--model", tiny, "--json", "--runs", "1", "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["work"] for row in rows] == list(WORKS[what])
    for row in rows:
        for name in ("seconds", "memory", "other_seconds", "other_memory", "ratio"):
            assert row[name] > 0


def test_the_peak_of_loading_is_above_the_model_and_near_it(tiny, capsys):
    assert bench.main(["load", "--model", tiny, "--json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        assert row["model"] <= row["peak"] < row["model"] + 2**25


def test_anonymous_memory_is_what_a_process_writes():
    assert 2**26 < measure_peak(partial(fill, 2**26)).memory < 2**26 + 2**24


def fill(count):
    return bytes(1) * count, count


def side(values):
    if not values:
        raise ValueError("cannot start")
    return lambda: values


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (partial(side, [1.01, 2.0]), "something else"),
        (partial(side, []), "cannot start"),
        (partial(partial, os._exit, 1), "terminated"),
    ],
)
def test_a_side_that_differs_or_fails_or_dies_is_not_compared(peer, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        measure([partial(side, [1.0, 2.0]), peer], "cpu", threads=1, runs=1)


def test_ids_agree_exactly_floats_nearly_and_lengths_count():
    assert agree([1, 2], [1, 2], "cpu") and agree([1.0, 2.0], [1.00001, 2.0], "cpu")
    assert not agree([1, 2], [1, 3], "cpu") and not agree([1.0, 2.0], [1.0], "cpu")


def test_shared_and_separate_rows_ask_the_same(libra):
    shared, separate = (sides.training_batch(libra, "questions", shared) for shared in (True, False))
    assert shared.ids.shape == (1, 16 + 40 + 4 * 117) and separate.ids.shape == (4, 16 + 40 + 117)
    answers = [batch.labels[batch.labels != IGNORED] for batch in (shared, separate)]
    assert len(answers[0]) == 4 * 79 and torch.equal(*answers)
    assert shared.segments.unique().tolist() == [0, 1, 2, 3, 4] and not separate.segments.any()


# ------------------------------------------------------------------------------------------ estimates


def count_flops(run) -> int:
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def test_flops_of_encoder_and_connector_are_those_that_pytorch_counts(libra):
    estimate, pixels = costs.Costs(libra.encoder.config, libra.decoder.config), torch.zeros(2, 3, 56, 56)
    with torch.no_grad():
        features = libra.features(pixels)[None]
        assert count_flops(lambda: libra.features(pixels)) == estimate.encode()
        # the estimate leaves out the bias of keys and values, and the sum over layers
        assert count_flops(lambda: libra.connector(features)) == pytest.approx(estimate.connect(), rel=0.03)


@pytest.mark.parametrize(("work", "questions"), [("questions", 4), ("lora", 1)])
def test_flops_of_a_training_step_are_those_that_pytorch_counts(tiny, work, questions):
    libra = build(TrainConfig(model=tiny, device="cpu", train=("lora" if work == "lora" else "connector",)))
    estimate = costs.Costs(*(part.config for part in (libra.encoder, libra.decoder)))
    batch = sides.training_batch(libra, work, shared=True)
    rows, length = batch.ids.shape
    counted = count_flops(lambda: libra.loss(batch).backward()) / rows
    # PyTorch's plain attention also computes the pairs that the mask hides
    prefix, text = 16 + 40, 117
    visible = prefix**2 / 2 + questions * (text * prefix + text**2 / 2)
    hidden = 3 * estimate.attend(length**2 - visible)
    assert counted - hidden == pytest.approx(estimate.step(questions, work == "lora"), rel=0.05)


def test_sizes_are_those_of_the_published_models():
    seven, three = published("7b"), published("3b")
    assert seven.decoder == 6_738_149_376  # 6,738,415,616 with the norms
    assert three.decoder == 3_212_574_720  # 3,212,749,824 with the norms
    assert seven.lora == 319_815_680
    assert seven.encoder == 84_934_656 and seven.tac == 61_734_912


def test_a_plan_by_hand():
    options = SimpleNamespace(gpu="H100", gpus=2, rows=4, questions=4, records=100_000)
    parts = costs.plan(published("7b"), options).values()
    first, second, greedy, beams = ({term["term"]: term["value"] for term in terms} for terms in parts)
    assert first["frozen weights"] == 2 * (6_738_149_376 + 84_934_656) / 1e9
    assert first["what learns"] == 16 * 61_734_912 / 1e9
    # in each of 32 layers: 8 × 4096 for norms, 2 × 4 × 4096 for attention, 4 × 11008 for the MLP
    assert first["activations"] == 4 * (1369 + 40 + 4 * 117) * 32 * (32768 + 32768 + 44032) / 1e9
    assert second["activations"] == 4 * (1369 + 157) * 32 * (109568 + 2 * (3 * 4096 + 11008) + 14 * 128) / 1e9
    assert first["memory"] == pytest.approx(first["frozen weights"] + first["what learns"] + first["activations"])
    # 25,000 rows on two GPUs; a row takes about 2 × 2 × 6.5 G × 1,877
    assert first["time"] == pytest.approx(25_000 * first["work"] * 1e12 / (0.4 * 2 * 989e12) / 3600)
    assert first["work"] == pytest.approx(4 * 6.476e9 * 1877 / 1e12, rel=0.1)
    assert greedy["keys and values"] == 8 * (1431 + 120) * 524_288 / 1e9
    assert beams["keys and values"] == 8 * (1431 + 10 * 120) * 524_288 / 1e9
    assert greedy["read for a token"] == (2 * (6_476_005_376 + 131_072_000) + 8 * (1431 + 60) * 524_288) / 1e9


def test_a_plan_says_what_fits(capsys):
    assert bench.main(["plan", "--gpu", "4090", "--model", "7b"]) == 0
    memory = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  memory")]
    assert ["does not fit 24 GB" in line for line in memory] == [True, True, False, True]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--runs", "0"], "--runs"),
        (["--treads=2"], "--threads"),
        (["plan", "--model", "70b"], "70b"),
        (["plan", "--gpu", "H1000"], "H1000"),
        (["--model", "nowhere/model"], "nowhere/model"),
        (["attention", "--device", "cpu"], "GPU"),
    ],
)
def test_mistakes_are_one_line(arguments, culprit, capsys):
    with pytest.raises(SystemExit, match="2"):
        raise SystemExit(bench.main(arguments))
    error = capsys.readouterr().err
    assert culprit in error and error.count("\n") == 1
