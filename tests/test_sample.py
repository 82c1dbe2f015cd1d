"""Decoding: golden ids of the published code, `transformers`' beam search and samplers, and fresh runs as oracles."""

import copy
import itertools
import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import FAMILIES, GOLDEN, ROOT, cases, load, read, study_of

import sample
from data import Study
from decoder import Cache, Decoder
from plumbing.families import decoder_config
from sample import Chat, Options, Prefix, Stops, Stream, counterfactuals, decode, generate, sample_tokens
from tokenizer import Prompt

CASES = pytest.mark.parametrize("family, folder", cases(), ids=lambda value: getattr(value, "name", value))


def greedy_settings(case):
    return dict(max_new_tokens=case["max_new_tokens"], template=case["template"])


def beam_settings(case):
    beam = case["beam"]
    names = ("num_beams", "length_penalty", "no_repeat_ngram", "num_return_sequences")
    return dict(max_new_tokens=case["max_new_tokens"]) | {name: beam[name] for name in names}


def assert_outputs(outputs, expected):
    assert [o.token_ids for o in outputs] == [without_padding(e["token_ids"]) for e in expected]
    assert [o.score for o in outputs] == pytest.approx([e["score"] for e in expected], abs=1e-4)


def without_padding(ids):
    """Golden beam lists may end with pad ids; no sequence of ours contains 0."""
    while ids and ids[-1] == 0:
        ids = ids[:-1]
    return ids


# ------------------------------------------------------------------------------- against the published code


@CASES
def test_golden_greedy(family, folder):
    case = json.loads((folder / "expected.json").read_text())
    (output,) = generate(load(family), study_of(case), **greedy_settings(case))
    assert (output.token_ids, output.text, output.score) == (case["greedy"]["token_ids"], case["greedy"]["text"], None)


@CASES
def test_golden_beams(family, folder):
    case = json.loads((folder / "expected.json").read_text())
    outputs = generate(load(family), study_of(case), **beam_settings(case))
    assert_outputs(outputs, case["beam"]["outputs"])
    assert [o.text for o in outputs] == [e["text"] for e in case["beam"]["outputs"]]


@pytest.mark.parametrize("case", read("beams", "expected.json"), ids=lambda case: f"eos{case['eos_token_id']}")
def test_golden_beams_that_end_at_different_lengths(case):
    libra = copy.copy(load(case["family"]))
    libra.eos_token_ids = case["eos_token_id"]
    assert_outputs(generate(libra, study_of(case), **beam_settings(case)), case["beam"]["outputs"])
    greedy = generate(libra, study_of(case), max_new_tokens=case["max_new_tokens"])
    assert greedy[0].token_ids == case["greedy"]["token_ids"]


def test_golden_batch_gives_what_each_study_gives_alone():
    batch = read("batch", "expected.json")
    studies = [
        study_of({"current": current, "prior": prior, "query": query})
        for (current, prior), query in zip(batch["images"], batch["queries"], strict=True)
    ]
    length = max(map(len, batch["single"]))
    outputs = generate(load("libra-7b"), studies, max_new_tokens=length, no_repeat_ngram=3)
    assert [o[0].token_ids for o in outputs] == batch["single"]


def until(eos, ids):
    """ids up to the first eos; what comes behind it is padding."""
    for n, id in enumerate(ids):
        if id in eos:
            return ids[: n + 1]
    return ids


# ---------------------------------------------------------------------------------- against transformers


def random_llama(seed):
    """The same random Llama as a `transformers` model and as a Libra's decoder; sharp, so that beams end early."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.35, bos_token_id=1, eos_token_id=None, pad_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    peer = transformers.LlamaForCausalLM(config).eval()
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=48, vocab_size=90)
    decoder = Decoder(decoder_config(dict(model_type="libra", num_hidden_layers=2) | sizes, "test"))
    decoder.load_state_dict({name.removeprefix("model."): value for name, value in peer.state_dict().items()})
    libra = load("libra-7b").with_decoder(decoder)
    libra.eos_token_ids = []
    return peer, libra.eval()


def text_prefix(libra, prompts):
    """A prefix of prompts without an image."""
    cache = Cache(libra.decoder.config, len(prompts), max(map(len, prompts)), "cpu", torch.float32)
    with torch.inference_mode():
        logits = [libra.prefill(cache, b, libra.splice(ids, None)) for b, ids in enumerate(prompts)]
    studies = [Study("none.png", id=str(ids)) for ids in prompts]
    return Prefix(studies, [Prompt("", ids, []) for ids in prompts], cache, torch.stack(logits), "</s>")


def test_beam_search_equals_transformers_over_random_settings():
    rng, ended_early = random.Random(1), set()
    for setting in range(30):
        peer, libra = random_llama(setting)
        prompts = [[rng.randrange(3, 90) for _ in range(rng.randrange(4, 20))] for _ in range(2)]
        beams = rng.randrange(2, 7)
        options = Options(
            num_beams=beams,
            num_return_sequences=rng.randrange(1, beams + 1),
            length_penalty=rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0]),
            no_repeat_ngram=rng.choice([0, 1, 2, 3]),
            max_new_tokens=rng.randrange(3, 16),
        )
        libra.eos_token_ids = rng.sample(range(3, 90), rng.choice([1, 2, 5, 12]))
        outputs = decode(libra, text_prefix(libra, prompts), options)
        for ids, ours in zip(prompts, outputs, strict=True):  # one at a time: a padded batch is not exact there
            expected = peer.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
                num_beams=options.num_beams, num_return_sequences=options.num_return_sequences,
                length_penalty=options.length_penalty, no_repeat_ngram_size=options.ngram,
                max_new_tokens=options.max_new_tokens, eos_token_id=libra.eos_token_ids, pad_token_id=0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            sequences = [until(libra.eos_token_ids, row[len(ids) :].tolist()) for row in expected.sequences]
            assert [o.token_ids for o in ours] == sequences, options
            assert [o.score for o in ours] == pytest.approx(expected.sequences_scores.tolist(), 1e-5, 1e-4)
            ended_early |= {len(o.token_ids) < options.max_new_tokens for o in ours}
    assert ended_early == {True, False}  # the settings reach both ends: eos and the limit


@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(temperature=1.0)])
def test_no_studies_give_no_reports(options):
    assert generate(load("libra-7b"), [], **options) == []


@pytest.mark.parametrize("options", [
    {}, dict(no_repeat_ngram=2), dict(temperature=1.0, num_return_sequences=3), dict(num_beams=3),
])  # fmt: skip
def test_studies_that_have_ended_leave_the_batch(options, monkeypatch):
    """Each study alone is the oracle. The prefix is continued twice: the second time its rows have another order."""
    rng, options = random.Random(3), Options(max_new_tokens=20, **options)
    _, libra = random_llama(3)
    libra.eos_token_ids = rng.sample(range(3, 90), 12)
    prompts = [[rng.randrange(3, 90) for _ in range(length)] for length in (4, 19, 7, 12, 5)]
    alone = [decode(libra, text_prefix(libra, [ids]), options)[0] for ids in prompts]

    rows, step = [], libra.decode_step
    monkeypatch.setattr(libra, "decode_step", lambda cache, tokens: rows.append(len(tokens)) or step(cache, tokens))
    prefix = text_prefix(libra, prompts)
    for _ in range(2):
        together = decode(libra, prefix, options)
        for ours, expected in zip(together, alone, strict=True):
            assert [output.token_ids for output in ours] == [output.token_ids for output in expected]
    assert rows[0] == 5 and min(rows) < 5
    if options.num_beams == 1:
        # a study takes as many steps as its longest sequence has tokens, less the first
        lengths = [max(len(output.token_ids) for output in outputs) for outputs in alone]
        assert sum(rows) == 2 * sum(length - 1 for length in lengths)


def test_ngram_ban_equals_transformers_over_random_sequences():
    rng = random.Random(0)
    for n in (1, 2, 3, 5):
        ids = [[rng.randrange(4) for _ in range(40)] for _ in range(3)]
        scores = torch.zeros(3, 6)
        expected = transformers.NoRepeatNGramLogitsProcessor(n)(torch.tensor(ids), scores.clone())
        ours = scores[:, None].clone()
        repeats = sample.Repeats([row[:25] for row in ids], n, "cpu")
        for place in range(25, 40):
            repeats.append([0, 1, 2], [[row[place]] for row in ids])
        repeats.ban(ours)
        assert torch.equal(ours[:, 0], expected)


def test_the_ngram_ban_follows_beams_and_the_studies_that_are_left():
    """Prompts of different lengths; each beam alone is the oracle."""
    repeats = sample.Repeats([[1, 2, 1], [4, 3, 5, 6, 3], [2, 2]], 2, "cpu")
    repeats.append([0, 1, 2], [[2, 0], [5, 5], [2, 1]])
    # study 1 has left; the last one took its row. Beams: both continue the first, or change places
    repeats.append([0, 2], [[1, 3], [2, 2]], [[0, 0], [1, 0]])
    rows = [[[1, 2, 1, 2, 1], [1, 2, 1, 2, 3]], [[2, 2, 1, 2], [2, 2, 2, 2]]]
    scores = torch.zeros(2, 2, 7)
    repeats.ban(scores)
    for b, k in itertools.product(range(2), range(2)):
        alone = transformers.NoRepeatNGramLogitsProcessor(2)(torch.tensor([rows[b][k]]), torch.zeros(1, 7))
        assert torch.equal(scores[b, k], alone[0])


def test_an_ngram_never_bans_through_the_image():
    scores = torch.zeros(1, 1, 700)
    sample.Repeats([[5, 6, -200, 5, 6]], 3, "cpu").ban(scores)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (0.5, 8, 0.9)])
def test_samples_follow_the_warped_distribution_of_transformers(temperature, top_k, top_p):
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)) * 2
    warped = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    expected = transformers.TopPLogitsWarper(top_p)(None, warped).softmax(-1)
    draws = (torch.arange(20_000) / 20_000)[:, None].expand(-1, 2)  # an even grid instead of chance
    options = Options(temperature=temperature, top_k=top_k, top_p=top_p)
    ids = sample_tokens(logits.expand(20_000, -1, -1), draws, options)
    shares = torch.stack([torch.bincount(ids[:, row], minlength=20) for row in range(2)]) / 20_000
    assert (shares - expected).abs().max() < 2e-4
    assert not shares[expected == 0].any()


# -------------------------------------------------------------------------------- one prefix, many continuations


def ragged_studies():
    image = lambda number: GOLDEN / "images" / f"{number}.png"
    return [
        Study(image(0), image(1), "Is there a pneumothorax?", id="a"),
        Study(image(2), None, "Provide a detailed description of the findings in the radiology image.", id="b"),
        Study(image(3), image(4), "What has changed? " * 12, id="c"),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        dict(num_beams=3, num_return_sequences=3, length_penalty=0.5),
        dict(temperature=0.9, num_return_sequences=2, seed=4),
        dict(temperature=1.1, top_k=0, top_p=0.8, no_repeat_ngram=2),
    ],
)
def test_a_study_gives_in_a_batch_what_it_gives_alone(family, settings):
    libra, studies = load(family), ragged_studies()
    together = generate(libra, studies, max_new_tokens=12, **settings)
    for study, outputs in zip(studies, together, strict=True):
        alone = generate(libra, study, max_new_tokens=12, **settings)
        assert [(o.token_ids, o.text) for o in outputs] == [(o.token_ids, o.text) for o in alone]


def test_samples_repeat_with_their_seed_and_differ_without(seven):
    settings = dict(temperature=1.0, num_return_sequences=3, max_new_tokens=8)
    write = lambda seed: [o.token_ids for o in generate(seven, ragged_studies()[0], seed=seed, **settings)]
    assert write(1) == write(1) != write(2)
    assert len({tuple(ids) for ids in write(1)}) == 3


def test_encoder_and_connector_run_once_for_all_beams(seven):
    calls, lengths = [], []
    hooks = [
        seven.encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0]))),
        seven.connector.register_forward_hook(lambda *_: calls.append("connector")),
        seven.decoder.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1])),
    ]
    generate(seven, ragged_studies()[0], num_beams=6, max_new_tokens=4)
    for hook in hooks:
        hook.remove()
    assert calls == [2, "connector"]
    assert lengths[1:] == [6] * 3 and lengths[0] > 16  # one prefill, then one position per beam


def test_should_stop_is_asked_at_every_token_and_ends_generation(seven):
    for settings in (dict(), dict(num_beams=3, num_return_sequences=3)):
        answers = [False, False, True]
        stop_at_third = lambda answers=answers: answers.pop(0)
        outputs = generate(seven, ragged_studies()[0], should_stop=stop_at_third, max_new_tokens=20, **settings)
        assert len(outputs[0].token_ids) == 3 and not answers


def test_no_studies_give_no_outputs(seven):
    assert generate(seven, []) == []


# ------------------------------------------------------------------------------------------ text as it is made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stop", ["</s>", "###", "\n"])
def test_streamed_text_is_the_final_text_and_nothing_is_taken_back(family, stop):
    """Random ids, with many that are near a stop string, a clean-up or an incomplete character."""
    libra, rng = load(family), random.Random(0)
    near = libra.tokenizer.encode(" # ## ### é 漢 . , n't 's \n")
    for _ in range(300):
        ids = [rng.choice(near) if rng.random() < 0.5 else rng.randrange(700) for _ in range(rng.randrange(1, 20))]
        shown = []
        stream, stops = Stream(libra, stop, shown.append), Stops(libra, stop)
        for n in range(1, len(ids) + 1):
            stream(ids[:n])
            if stops(ids[:n]):
                break
        final = libra.tokenizer.decode(ids[:n]).strip().removesuffix(stop).strip()
        assert final.startswith("".join(shown))
        stream.show(final)
        assert "".join(shown) == final


def test_text_comes_in_pieces_long_before_the_end(seven):
    shown = []
    (output,) = generate(seven, ragged_studies()[0], on_text=shown.append, max_new_tokens=24)
    assert len(shown) > 5 and "".join(shown) == output.text


def test_a_stop_string_ends_generation_and_is_removed(seven):
    """Greedy ids of a golden case; the stop string is made of what the model writes there."""
    case = read("libra-7b", "case0", "expected.json")
    prefix = sample.prefill(seven, [study_of(case)])
    ids = case["greedy"]["token_ids"]
    prefix.stop = seven.tokenizer.decode(ids[3:5]).strip()  # two tokens, found in the decoded tail
    (output,) = decode(seven, prefix, Options(max_new_tokens=24))[0]
    assert output.token_ids == ids[: len(output.token_ids)] and len(output.token_ids) <= 5
    assert prefix.stop not in output.text and output.text


def test_counterfactuals_take_the_prior_away_and_exchange_the_images():
    study = Study("now", "then", "Has it grown?", id="1")
    without, exchanged = Study("now", None, "Has it grown?", id="1"), Study("then", "now", "Has it grown?", id="1")
    named = {"as given": study, "without the prior": without, "images exchanged": exchanged}
    assert counterfactuals(study) == named
    assert counterfactuals(without) == {"as given": without}


# ----------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("family", FAMILIES)
def test_later_turns_of_a_chat_equal_a_fresh_run_and_compute_only_new_ids(family):
    libra = load(family)
    chat = Chat(libra, ragged_studies()[0])
    computed, cached = [], []
    hook = libra.decoder.register_forward_hook(lambda module, inputs, output: computed.append(inputs[0].shape[1]))
    for question in ("Is there an effusion?", "What has changed?", "Is the heart enlarged?"):
        fresh = Chat(libra, ragged_studies()[0])
        fresh.turns = list(chat.turns)
        computed.clear()
        output = chat.ask(question, max_new_tokens=10)
        prefilled = computed[0]
        assert output == fresh.ask(question, max_new_tokens=10)
        image = 0 if cached else libra.image_positions - 1
        same = 0
        while same < len(cached) and cached[same] == chat.ids[same]:
            same += 1
        assert prefilled == len(chat.ids) - same + image
        cached = chat.ids
    hook.remove()


def test_a_question_that_fails_leaves_a_chat_as_it_was(seven):
    chat, twin = (Chat(seven, ragged_studies()[0]) for _ in range(2))
    first = dict(question="Is there an effusion?", max_new_tokens=6)
    assert chat.ask(**first) == twin.ask(**first)
    with pytest.raises(ValueError, match="tokens more than the model's 2048"):
        chat.ask("effusion " * 3000)
    with pytest.raises(ValueError, match="temperature"):
        chat.ask("And now?", temperature=-1)
    second = dict(question="What has changed?", max_new_tokens=6)
    assert chat.ask(**second) == twin.ask(**second)


# ---------------------------------------------------------------------------------------------- command line


MODEL = str(GOLDEN / "libra-7b" / "model")
IMAGES = [str(GOLDEN / "images" / "0.png"), str(GOLDEN / "images" / "1.png")]


def run(*arguments, model=MODEL, images=IMAGES):
    """Exit status of sample.py with these arguments, run in this process."""
    try:
        return sample.main(sample.parse(["--model", str(model), "--images", *map(str, images), *arguments]))
    except SystemExit as exit:
        return exit.code


@CASES
def test_json_is_one_object_with_the_golden_ids(family, folder, capsys):
    case = json.loads((folder / "expected.json").read_text())
    study = study_of(case)
    images = [image for image in (study.current, study.prior) if image]
    common = ("--query", case["query"], "--max-new-tokens", str(case["max_new_tokens"]), "--json", "--device", "cpu")
    beams = ("--num-beams", "3", "--length-penalty", "2", "--num-return-sequences", "2")
    for extra, expected in (((), [case["greedy"]]), (beams, case["beam"]["outputs"])):
        assert run(*common, *extra, model=GOLDEN / family / "model", images=images) == 0
        result = json.loads(capsys.readouterr().out)
        assert result.keys() == {"prompt", "input_ids", "outputs", "seconds"}
        assert (result["prompt"], result["input_ids"]) == (case["prompt"], case["input_ids"])
        assert [o["token_ids"] for o in result["outputs"]] == [without_padding(e["token_ids"]) for e in expected]
        assert [o["text"] for o in result["outputs"]] == [e["text"] for e in expected]
        assert all(o.keys() == {"text", "token_ids", "score"} for o in result["outputs"])


def test_stdout_has_only_the_report(capsys):
    case = read("libra-7b", "case0", "expected.json")
    assert run("--query", case["query"], "--max-new-tokens", "24", "--device", "cpu") == 0
    assert capsys.readouterr().out == case["greedy"]["text"] + "\n"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_gives_the_golden_report(capsys):
    case = read("libra-7b", "case0", "expected.json")
    assert run("--query", case["query"], "--max-new-tokens", "24", "--device", "cpu", "--compile") == 0
    assert capsys.readouterr().out == case["greedy"]["text"] + "\n"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_gives_the_same_report_in_8_bits(capsys):
    flags = ["--max-new-tokens", "12", "--device", "cpu", "--dtype", "int8"]
    assert run(*flags) == run(*flags, "--compile") == 0
    plain, compiled = capsys.readouterr().out.splitlines()
    assert plain == compiled


def test_where_nothing_compiles_one_line_says_so(monkeypatch, capsys):
    def compile(*_, **__):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", compile)
    assert run("--compile", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert "(no compiler): leave out --compile" in error and error.count("\n") == 1


def test_a_chat_on_the_terminal_answers_every_line():
    arguments = ["--model", MODEL, "--images", *IMAGES, "--max-new-tokens", "5", "--chat", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "sample.py", *arguments],
        input="Is there an effusion?\nWhat has changed?\n\n", cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    chat = Chat(load("libra-7b"), Study(*IMAGES))
    answers = [chat.ask(question, max_new_tokens=5).text for question in ("Is there an effusion?", "What has changed?")]
    assert (done.returncode, done.stdout) == (0, "\n".join(answers) + "\n"), done.stderr


def test_help_names_the_defaults(capsys):
    assert run("--help") == 0
    printed = capsys.readouterr().out
    assert "default: 512" in printed and "default: auto" in printed


def mistakes(tmp_path):
    """(arguments, model, images, the culprit that the one line must name)"""
    files = {"text.png": b"no image", "empty.png": b"", "cut.png": (GOLDEN / "images" / "0.png").read_bytes()[:2000]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    def model(name, **changes):
        """A copy of the golden checkpoint with other fields in its config.json."""
        folder = tmp_path / name
        folder.mkdir()
        for file in (GOLDEN / "libra-7b" / "model").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        config["mm_vision_tower"] = str(GOLDEN / "libra-7b" / "encoder-dinov2")
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    no_json = model("no_json")
    (no_json / "config.json").write_text("{")
    cut = model("cut")
    shard = cut / "model-00002-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    return [
        # images
        ((), MODEL, ["nowhere.png"], "nowhere.png"),
        ((), MODEL, [tmp_path / "empty.png"], "empty.png"),
        ((), MODEL, [tmp_path / "text.png"], "text.png"),
        ((), MODEL, [tmp_path / "cut.png"], "cut.png"),
        ((), MODEL, [*IMAGES, IMAGES[0]], "--images"),
        # the model
        ((), tmp_path / "nowhere", IMAGES, "nowhere"),
        ((), no_json, IMAGES, "config.json"),
        ((), model("kind", model_type="bert"), IMAGES, "model_type 'bert'"),
        ((), model("act", hidden_act="relu"), IMAGES, "hidden_act is 'relu'"),
        ((), model("wide", intermediate_size=161), IMAGES, "9 wrongly shaped"),
        ((), model("deep", num_hidden_layers=4), IMAGES, "9 missing"),
        ((), cut, IMAGES, "model-00002-of-00005.safetensors"),
        # the question
        (("--template", "libra_v2"), MODEL, IMAGES, "'libra_v1'"),
        (("--query", "effusion " * 3000), MODEL, IMAGES, "2048"),
        (("--query", "<image>"), MODEL, IMAGES, "<image>"),
        (("--query", "caf\udce9"), MODEL, IMAGES, "is not valid Unicode"),
        # options: out of range, of a wrong type, that exclude each other, unknown
        (("--num-beams", "400"), MODEL, IMAGES, "num_beams 400"),
        (("--top-p", "nan"), MODEL, IMAGES, "top_p is nan"),
        (("--top-p", "1e-300"), MODEL, IMAGES, "top_p is 1e-300"),
        (("--temperature", "1e-300"), MODEL, IMAGES, "temperature 1e-300"),
        (("--length-penalty", "1e308"), MODEL, IMAGES, "length_penalty is 1e+308"),
        (("--num-beams", "100000"), MODEL, IMAGES, "num_beams is 100000"),
        (("--temperature", "1", "--num-return-sequences", "100000"), MODEL, IMAGES, "num_return_sequences is 100000"),
        (("--max-new-tokens", "-1"), MODEL, IMAGES, "max_new_tokens is -1"),
        (("--temperature", "warm"), MODEL, IMAGES, "'warm'"),
        (("--temperature", "1", "--num-beams", "2"), MODEL, IMAGES, "num_beams"),
        (("--num-beams", "2", "--num-return-sequences", "3"), MODEL, IMAGES, "num_return_sequences 3"),
        (("--num-return-sequences", "2"), MODEL, IMAGES, "num_return_sequences"),
        (("--num-beam", "2"), MODEL, IMAGES, "--num-beams"),
        (("--chat", "--json"), MODEL, IMAGES, "--chat"),
        (("--device", "tpu"), MODEL, IMAGES, "'tpu'"),
        (("--device", "cpu:x"), MODEL, IMAGES, "'cpu:x'"),
        (("--query", "--"), MODEL, IMAGES, "argument --;"),
        (("--model", "~nosuchuser/x"), "", IMAGES, "~nosuchuser"),
    ]


def test_a_mistake_is_one_line_and_status_2(tmp_path, capsys):
    for arguments, model, images, culprit in mistakes(tmp_path):
        assert run(*arguments, model=model, images=images) == 2, culprit
        printed = capsys.readouterr()
        assert culprit in printed.err and printed.err.count("\n") == 1 and not printed.out, (culprit, printed.err)


def test_a_report_that_may_outgrow_the_positions_warns_in_one_line(capsys):
    assert run("--max-new-tokens", "3", "--query", "a " * 970, "--device", "cpu") == 0
    assert capsys.readouterr().err == ""
    assert run("--max-new-tokens", "3000", "--no-repeat-ngram", "1", "--device", "cpu") in (0, 2)
    assert "would run past the model's 2048 positions" in capsys.readouterr().err
