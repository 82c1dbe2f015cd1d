"""Contrastive decoding: golden values of the published code, and both prompts recomputed for every token as oracle."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, GOLDEN, load, one_line, read
from transformers import NoRepeatNGramLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import contrast
import sample
from contrast import Contrast
from data import Study
from decoder import Cache
from model import Libra
from sample import Options, Prefix, generate, prompt_of, sample_tokens
from tokenizer import Prompt

GOLDENS = [case for case in read("ccd", "expected.json") if case["family"] in FAMILIES]
SCORES = {"Cardiomegaly": 0.83, "Pleural_Effusion": 0.5, "Edema": 0.07, "Lateral": 0.9}
OTHERS = {"Fracture": 0.2}
IMAGES = GOLDEN / "images"
STUDY = Study(IMAGES / "0.png", IMAGES / "1.png", "Describe the heart.")


# ------------------------------------------------------------------------------------------ the published values


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: f"{case['family']}, gamma {case['gamma']}")
def test_golden_reports(case):
    images = [IMAGES / name for name in case["images"]]
    settings = {name: case[name] for name in ("template", "alpha", "beta", "gamma")}
    study = Study(*images, case["query"])
    (output,) = generate(load(case["family"]), study, expert=case["scores"], max_new_tokens=24, **settings)
    assert (output.token_ids, output.text) == (case["token_ids"], case["text"])


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: f"{case['family']}, gamma {case['gamma']}")
def test_golden_prompts_and_token_scores(case):
    libra = load(case["family"])
    query = contrast.guided_query(case["query"], case["scores"])
    assert contrast.guide(case["scores"]) == case["guide"]
    assert prompt_of(libra, query, case["template"]).text == case["guided"]
    expected = {int(id): score for id, score in case["token_scores"].items()}
    assert contrast.token_scores(case["scores"], libra.tokenizer) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize("scores, sentence", [
    ({"Edema": 0.5, "Fracture": 0.49, "Frontal": 0.9},
     "Attention to the following clinical instructions: Edema. View type: Frontal."),
    ({"Lateral": 0.5, "B": 1, "Frontal": 0.5, "A_b": 0.6},
     "Attention to the following clinical instructions: B; A_b. View type: Lateral, Frontal."),
    ({"Edema": 0.7, "Frontal": 0.1}, "Attention to the following clinical instructions: Edema. "),
    ({"Edema": 0.1, "Frontal": 0.9}, " View type: Frontal."),
    ({"Edema": 0.1}, "No clinical guidance based on current findings."),
    ({}, "No clinical guidance based on current findings."),
])  # fmt: skip
def test_the_guide_names_what_is_likelier_than_not(scores, sentence):
    assert contrast.guide(scores) == sentence


@pytest.mark.parametrize("pieces, kept", [
    (["<s>", "▁L", "ung", "▁Op", "acity"], {"▁L": 0.8, "▁Op": 0.8 * 0.95**2}),
    (["L", "ung", "ĠOp", "acity"], {"L": 0.8, "ĠOp": 0.8 * 0.95**2}),
    (["▁", "L", "ung", "Ġ", "O"], {"▁": 0.8, "L": 0.8 * 0.95, "Ġ": 0.8 * 0.95**3, "O": 0.8 * 0.95**4}),
    (["L", "▁x", "L"], {"L": 0.8, "▁x": 0.8 * 0.95}),
])  # fmt: skip
def test_tokens_that_begin_a_word_are_scored_by_their_place(pieces, kept):
    backend = SimpleNamespace(id_to_token=lambda id: pieces[id])
    ids = [pieces.index(piece) for piece in pieces]
    bos = 0 if pieces[0] == "<s>" else None
    tokenizer = SimpleNamespace(encode=lambda text: ids[:], backend=backend, bos_token_id=bos)
    scores = contrast.token_scores({"Lung_Opacity": 0.8}, tokenizer)
    assert {pieces[id]: score for id, score in scores.items()} == pytest.approx(kept)


@pytest.mark.parametrize("p, gamma, bias", [
    (0.75, 10, math.log(3)), (0.25, 10, -math.log(3)), (0.5, 10, 0),
    (0.99, 10, math.log(10)), (0.01, 2, -math.log(2)),
    (0.75, 1, math.log(3)), (0.75, 0.1, math.log(3)),  # no limit
    (1.0, 1, 13.8155), (0.0, 1, -13.8155),  # ln(1e6)
])  # fmt: skip
def test_a_push_is_the_log_odds_within_the_limit(p, gamma, bias):
    assert contrast.log_odds(p, gamma) == pytest.approx(bias, abs=1e-5)


def test_with_beta_1_a_banned_token_stays_banned():
    soft, pushed = torch.tensor([-math.inf, -1.0, -2.0]), torch.tensor([5.0, -1.0, 0.0])
    assert Contrast([], beta=1.0).mix(pushed, soft).tolist() == [-math.inf, -1.0, 0.0]


def test_the_image_counts_as_id_0_in_the_ban():
    scores = torch.zeros(1, 1, 700)
    cache = Cache(load("libra-7b").decoder.config, 1, 5, "cpu", torch.float32, prompts=2)
    prefix = Prefix([], [Prompt("", [5, 6, -200, 5, 6], [])], cache, scores, "", Contrast([SCORES]))
    prefix.repeats(3).ban(scores)
    assert (scores[0, 0] == -math.inf).nonzero().tolist() == [[0]]


def test_samples_are_warped_on_soft_alone():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)) * 2
    soft, pushed = logits[0].log_softmax(-1), logits[0].log_softmax(-1) + logits[1]
    warped = TopKLogitsWarper(8)(None, TemperatureLogitsWarper(0.7)(None, soft[None]))
    warped = TopPLogitsWarper(0.9)(None, warped)[0]
    expected = (0.6 * warped + 0.4 * pushed).softmax(-1)

    draws = torch.arange(20_000) / 20_000  # an even grid instead of chance
    mix = lambda soft, ids: Contrast([], beta=0.4).mix(pushed.expand(20_000, -1), soft, ids)
    ids = sample_tokens(soft.expand(20_000, -1), draws, Options(temperature=0.7, top_k=8, top_p=0.9), mix)
    shares = torch.bincount(ids, minlength=20) / 20_000
    assert (shares - expected).abs().max() < 2e-4


# ------------------------------------------------------------------------------------------ every token anew


@torch.inference_mode()
def recomputed(libra: Libra, study: Study, scores, alpha, beta, gamma, tokens) -> list[int]:
    """Greedy ids, both prompts computed anew for every token, without a cache and without Contrast."""
    image_embeddings = libra.embed_images(libra.preprocess(study.images()))
    prompts = [prompt_of(libra, query).ids for query in (study.query, contrast.guided_query(study.query, scores))]
    stops = sample.Stops(libra, sample.stop_string(libra.template))
    ids = []
    while len(ids) < tokens and not stops(ids) and ids[-1:] not in [[id] for id in libra.eos_token_ids]:
        rows = []
        for prompt in prompts:
            embeddings = libra.splice(prompt + ids, image_embeddings)
            hidden = libra.decoder(embeddings[None], torch.arange(len(embeddings))[None])
            rows.append(libra.logits(hidden[0, -1]).log_softmax(-1))
        soft = (1 - alpha) * rows[0] + alpha * rows[1]
        pushed = soft.clone()
        for id, score in contrast.token_scores(scores, libra.tokenizer).items():
            pushed[id] += contrast.log_odds(score, gamma)
        seen = torch.tensor([[max(id, 0) for id in prompts[0] + ids]])
        soft = NoRepeatNGramLogitsProcessor(3)(seen, soft[None])[0]
        ids.append(int(((1 - beta) * soft + beta * pushed).argmax()))
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha, beta, gamma", [(0.5, 0.5, 10), (0.9, 0.2, 1)])
def test_the_cached_steps_equal_recomputed_ones(family, alpha, beta, gamma):
    libra = load(family)
    (output,) = generate(libra, STUDY, expert=SCORES, alpha=alpha, beta=beta, gamma=gamma, max_new_tokens=12)
    assert output.token_ids == recomputed(libra, STUDY, SCORES, alpha, beta, gamma, tokens=12)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_any_weight_it_is_greedy_with_the_ban(family):
    (guided,) = generate(load(family), STUDY, expert=SCORES, alpha=0, beta=0, max_new_tokens=16)
    (plain,) = generate(load(family), STUDY, no_repeat_ngram=3, max_new_tokens=16)
    assert guided.token_ids == plain.token_ids


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.9, num_return_sequences=3, top_p=0.9)])
def test_a_batch_gives_what_each_study_gives_alone(settings):
    libra = load("libra-3b")
    studies = [Study(STUDY.current, None, "What? " * 9, id="a"), Study(STUDY.current, STUDY.prior, "Why?", id="b")]
    batch = generate(libra, studies, expert=[SCORES, OTHERS], max_new_tokens=12, **settings)
    for study, scores, outputs in zip(studies, (SCORES, OTHERS), batch, strict=True):
        assert generate(libra, study, expert=scores, max_new_tokens=12, **settings) == outputs


def test_a_study_that_has_ended_leaves_with_both_its_prompts():
    libra = copy.copy(load("libra-3b"))
    studies = [Study(STUDY.current, STUDY.prior, f"{word}?") for word in ("What", "Why", "Where")]
    scores = [SCORES, OTHERS, {}]
    # the first study ends at its third token
    (first,) = generate(libra, studies[0], expert=SCORES, max_new_tokens=3)
    libra.eos_token_ids = [first.token_ids[-1]]
    alone = [generate(libra, study, expert=s, max_new_tokens=9) for study, s in zip(studies, scores, strict=True)]
    assert len({len(outputs[0].token_ids) for outputs in alone}) > 1
    assert generate(libra, studies, expert=scores, max_new_tokens=9) == alone


def test_the_image_is_encoded_once_and_the_common_prefix_computed_once(monkeypatch):
    libra, encoded, positions = load("libra-7b"), [], []
    embed_images, prefill = Libra.embed_images, Libra.prefill
    monkeypatch.setattr(Libra, "embed_images", lambda self, *given: encoded.append(1) or embed_images(self, *given))
    monkeypatch.setattr(Libra, "prefill", lambda *given: positions.append(len(given[-1])) or prefill(*given))
    generate(libra, STUDY, expert=SCORES, max_new_tokens=3)
    guided = prompt_of(libra, contrast.guided_query(STUDY.query, SCORES))
    plain = prompt_of(libra, STUDY.query)
    assert len(encoded) == 1 and positions[0] == len(plain.ids) - 1 + libra.image_positions
    # what is behind the question: the sentence, and the end of the prompt
    assert positions[1] <= len(guided.ids) - len(plain.ids) + 12


@pytest.mark.parametrize("switch, positions", [(None, 18), (20, 18), (21, 0), (22, 0), (24, 18)])
def test_a_guided_prompt_that_is_long_for_longrope_shares_nothing(switch, positions):
    # 3 ids before the image of 14 positions, 2 alike behind it; then the prompts have 21 and 24 positions
    config = SimpleNamespace(rope_switch=switch)
    libra = SimpleNamespace(decoder=SimpleNamespace(config=config), image_positions=14)
    plain, guided = [5, 6, 7, -200, 8, 9, 9, 9], [5, 6, 7, -200, 8, 1, 2, 3, 4, 5, 6]
    assert sample.shared_positions(libra, plain, 21, guided, 24) == positions


# ------------------------------------------------------------------------------------------ mistakes, command line


@pytest.mark.parametrize("settings, message", [
    (dict(expert={"Edema": 1.2}), "expert: Edema is 1.2, expected a number from 0 to 1"),
    (dict(expert={"Edema": "high"}), "Edema is 'high'"),
    (dict(expert={"Edema": math.nan}), "Edema is nan"),
    (dict(expert={"Edema": True}), "Edema is True"),
    (dict(expert={" ": 0.5}), "' ' is not a label"),
    (dict(expert={"<image>": 0.5}), "'<image>' is not a label"),
    (dict(expert=[SCORES]), "expected a list, each an object"),
    (dict(expert=SCORES, alpha=1.1), "alpha is 1.1, expected a number from 0 to 1"),
    (dict(expert=SCORES, beta=-1), "beta is -1"),
    (dict(expert=SCORES, gamma=0), "gamma is 0"),
    (dict(expert=SCORES, num_beams=2), "not beams"),
    (dict(alpha=0.3), "alpha given without expert"),
])  # fmt: skip
def test_a_mistake_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(load("libra-7b"), STUDY, **settings)


def test_each_study_of_a_batch_needs_its_scores():
    with pytest.raises(ValueError, match="scores for 1 studies, not for 2"):
        generate(load("libra-7b"), [STUDY, STUDY], expert=[SCORES])
    with pytest.raises(ValueError, match="expected a list"):
        generate(load("libra-7b"), [STUDY, STUDY], expert=SCORES)


def test_scores_may_be_scalars_of_torch():
    scores = {label: torch.tensor(score, dtype=torch.float64) for label, score in SCORES.items()}
    assert Contrast([scores]) == Contrast([SCORES])


def run(*arguments) -> int:
    """Exit status of sample.py."""
    files = ["--model", str(GOLDEN / "libra-7b" / "model"), "--images", str(STUDY.current), str(STUDY.prior)]
    try:
        return sample.main(sample.parse([*files, *map(str, arguments)]))
    except SystemExit as exit:
        return exit.code


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(SCORES))
    return path


def test_the_command_line_gives_the_same(file, capsys):
    assert run("--query", STUDY.query, "--max-new-tokens", 8, "--expert", file, "--alpha", 0.4, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    (output,) = generate(load("libra-7b"), STUDY, expert=SCORES, alpha=0.4, max_new_tokens=8)
    assert printed["outputs"] == [{"text": output.text, "token_ids": output.token_ids, "score": None}]
    assert printed["input_ids"] == prompt_of(load("libra-7b"), STUDY.query).ids
    assert printed.keys() == {"prompt", "input_ids", "outputs", "seconds"}


@pytest.mark.parametrize("content, message", [
    ("[1]", "holds a list, not a JSON object"),
    ('{"Edema": 83}', "scores.json: Edema is 83"),
    ('{"Edema": null}', "scores.json: Edema is None"),
    ("Edema 0.8", "not JSON"),
    ('{"Edema": 0.8}\n{"Edema": 0.7}', "not JSON"),
    (None, "is missing: give a JSON file"),
])  # fmt: skip
def test_a_wrong_file_is_refused_in_one_line_before_the_model_is_read(file, content, message, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load", None)
    file.unlink()
    if content:
        file.write_text(content)
    assert run("--expert", file) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("arguments", [("--num-beams", 2), ("--chat",), ("--beta", 2), ("--expert", "")])
def test_what_does_not_go_with_an_expert_is_refused(file, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load", None)
    assert run("--expert", file, *arguments) == 2
    assert one_line(capsys)
