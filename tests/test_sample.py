import copy
import itertools
import json
import random
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import FAMILIES, GOLDEN, ROOT, cases, load, read, seconds_of_children, study_of

import sample
from data import Study
from decoder import Cache, Decoder, decoder_config
from sample import Chat, Options, Prefix, _Stream, decode, generate, sample_tokens
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


def without_padding(ids):  # golden beam lists may carry trailing pad ids; 0 is <pad> in no sequence of ours
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
    """ids up to the first eos; what is behind it is padding"""
    return ids[: next((n + 1 for n, id in enumerate(ids) if id in eos), len(ids))]


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
    libra = copy.copy(load("libra-7b"))
    libra._modules = dict(libra._modules)
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=48, vocab_size=90)
    libra.decoder = Decoder(decoder_config(dict(model_type="libra", num_hidden_layers=2) | sizes, "test"))
    libra.decoder.load_state_dict({name.removeprefix("model."): value for name, value in peer.state_dict().items()})
    libra.vocabulary = 90
    return peer, libra.eval()


def text_prefix(libra, prompts):
    """A prefix of prompts without an image."""
    cache = Cache(libra.decoder.config, len(prompts), max(map(len, prompts)), "cpu", torch.float32)
    with torch.inference_mode():
        logits = [libra.prefill(cache, b, libra.splice(ids, None)) for b, ids in enumerate(prompts)]
    studies = [Study("none.png")] * len(prompts)
    return Prefix(studies, [Prompt("", ids, []) for ids in prompts], cache, torch.stack(logits), "</s>")


def test_beam_search_equals_transformers_over_random_settings():
    rng, endings = random.Random(1), set()
    for setting in range(30):
        peer, libra = random_llama(setting)
        prompts = [[rng.randrange(3, 90) for _ in range(rng.randrange(4, 20))] for _ in range(2)]
        options = Options(
            num_beams=(beams := rng.randrange(2, 7)),
            num_return_sequences=rng.randrange(1, beams + 1),
            length_penalty=rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0]),
            no_repeat_ngram=rng.choice([0, 1, 2, 3]),
            max_new_tokens=rng.randrange(3, 16),
        )
        libra.eos_token_ids = rng.sample(range(3, 90), rng.choice([1, 2, 5, 12]))
        outputs = decode(libra, text_prefix(libra, prompts), options)
        for ids, found in zip(prompts, outputs, strict=True):  # one at a time: a padded batch is not exact there
            expected = peer.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
                num_beams=options.num_beams, num_return_sequences=options.num_return_sequences,
                length_penalty=options.length_penalty, no_repeat_ngram_size=options.ngram,
                max_new_tokens=options.max_new_tokens, eos_token_id=libra.eos_token_ids, pad_token_id=0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            sequences = [until(libra.eos_token_ids, row[len(ids) :].tolist()) for row in expected.sequences]
            assert [o.token_ids for o in found] == sequences, options
            assert [o.score for o in found] == pytest.approx(expected.sequences_scores.tolist(), 1e-5, 1e-4)
            endings |= {len(o.token_ids) < options.max_new_tokens for o in found}
    assert endings == {True, False}  # the settings reach both ends: eos and the limit


def test_ngram_ban_equals_transformers_over_random_sequences():
    rng = random.Random(0)
    for n in (1, 2, 3, 5):
        ids = [[rng.randrange(4) for _ in range(40)] for _ in range(3)]
        scores = torch.zeros(3, 6)
        expected = transformers.NoRepeatNGramLogitsProcessor(n)(torch.tensor(ids), scores.clone())
        prefix = Prefix([], [Prompt("", row[:25], []) for row in ids], None, None, "")
        found = scores[:, None].clone()
        sample._ban_repeats(found, prefix, [[row[25:]] for row in ids], n)
        assert torch.equal(found[:, 0], expected)


def test_an_ngram_never_bans_through_the_image():
    prefix = Prefix([], [Prompt("", [5, 6, -200, 5, 6], [])], None, None, "")
    scores = torch.zeros(1, 1, 700)
    sample._ban_repeats(scores, prefix, [[[]]], 3)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (0.5, 8, 0.9)])
def test_draws_follow_the_warped_distribution_of_transformers(temperature, top_k, top_p):
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)) * 2
    warped = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    expected = transformers.TopPLogitsWarper(top_p)(None, warped).softmax(-1)
    draws = (torch.arange(20_000) / 20_000)[:, None].expand(-1, 2)  # an even grid in place of chance
    options = Options(temperature=temperature, top_k=top_k, top_p=top_p)
    ids = sample_tokens(logits.expand(20_000, -1, -1), draws, options)
    found = torch.stack([torch.bincount(ids[:, row], minlength=20) for row in range(2)]) / 20_000
    assert (found - expected).abs().max() < 2e-4
    assert not found[expected == 0].any()


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


def test_encoder_and_connector_run_once_whatever_the_number_of_beams(seven):
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


def test_should_stop_is_asked_at_every_token_and_what_there_is_comes_back(seven):
    for settings in (dict(), dict(num_beams=3, num_return_sequences=3)):
        asked = []
        stop_third = lambda asked=asked: asked.append(1) or len(asked) == 3
        outputs = generate(seven, ragged_studies()[0], should_stop=stop_third, max_new_tokens=20, **settings)
        assert len(asked) == 3 and len(outputs[0].token_ids) == 3


def test_no_studies_give_no_outputs(seven):
    assert generate(seven, []) == []


# ------------------------------------------------------------------------------------------ text as it is made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stop", ["</s>", "###", "\n"])
def test_streamed_text_is_the_final_text_and_nothing_is_taken_back(family, stop):
    libra, rng = load(family), random.Random(0)
    near = libra.tokenizer.encode(" # ## ### é 漢 . , n't 's \n")
    for _ in range(300):
        ids = [rng.choice(near) if rng.random() < 0.5 else rng.randrange(700) for _ in range(rng.randrange(1, 20))]
        shown = []
        stream = _Stream(libra, stop, shown.append)
        stops = sample.Stops(libra, stop)
        end = next((n for n in range(1, len(ids) + 1) if stops(ids[:n])), len(ids))
        for n in range(1, end + 1):
            stream(ids[:n])
        final = sample._finish(libra.tokenizer.decode(ids[:end]), stop)
        assert final.startswith("".join(shown))
        stream.close(final)
        assert "".join(shown) == final


def test_text_comes_in_pieces_long_before_the_end(seven):
    shown = []
    (output,) = generate(seven, ragged_studies()[0], on_text=shown.append, max_new_tokens=24)
    assert len(shown) > 5 and "".join(shown) == output.text


def test_a_stop_string_ends_generation_and_is_stripped(seven):
    """Greedy ids of a golden case; the stop string is made of what the model writes there."""
    case = read("libra-7b", "case0", "expected.json")
    prefix = sample.prefill(seven, [study_of(case)])
    ids = case["greedy"]["token_ids"]
    prefix.stop = seven.tokenizer.decode(ids[3:5]).strip()  # two tokens: seen in the decoded tail
    (output,) = decode(seven, prefix, Options(max_new_tokens=24))[0]
    assert output.token_ids == ids[: len(output.token_ids)] and len(output.token_ids) <= 5
    assert prefix.stop not in output.text and output.text


# ----------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("family", FAMILIES)
def test_later_turns_of_a_chat_equal_a_fresh_run_at_the_cost_of_new_ids_only(family):
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
        agreeing = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(cached, chat.ids, strict=False))))
        assert prefilled == len(chat.ids) - agreeing + (0 if cached else libra.image_positions - 1)
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


def test_a_person_sees_the_report_alone_on_stdout(capsys):
    case = read("libra-7b", "case0", "expected.json")
    assert run("--query", case["query"], "--max-new-tokens", "24", "--device", "cpu") == 0
    assert capsys.readouterr().out == case["greedy"]["text"] + "\n"


def test_a_chat_on_the_terminal_answers_every_line():
    arguments = ["--model", MODEL, "--images", *IMAGES, "--max-new-tokens", "5", "--chat", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "sample.py", *arguments],
        input="Is there an effusion?\nWhat has changed?\n\n", cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    chat = Chat(load("libra-7b"), Study(*IMAGES))
    answers = [chat.ask(question, max_new_tokens=5).text for question in ("Is there an effusion?", "What has changed?")]
    assert (done.returncode, done.stdout) == (0, "\n".join(answers) + "\n"), done.stderr


def test_help_answers_in_under_a_second():
    begin = seconds_of_children()
    done = subprocess.run([sys.executable, "sample.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and seconds_of_children() - begin < 1
    assert "default: 512" in done.stdout and "default: auto" in done.stdout


def mistakes(tmp_path):
    """(arguments, model, images, words that the one line must hold)"""
    broken = tmp_path / "broken"
    broken.mkdir()
    files = {"text.png": b"no image", "empty.png": b"", "cut.png": (GOLDEN / "images" / "0.png").read_bytes()[:2000]}
    for name, content in files.items():
        (broken / name).write_bytes(content)

    def model(name, **changes):
        folder = tmp_path / name
        folder.mkdir()
        for file in (GOLDEN / "libra-7b" / "model").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        config["mm_vision_tower"] = str(GOLDEN / "libra-7b" / "encoder-dinov2")
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    no_config = model("no_config")
    (no_config / "config.json").unlink()
    no_json = model("no_json")
    (no_json / "config.json").write_text("{")
    cut = model("cut")
    shard = cut / "model-00002-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    lost = model("lost")
    (lost / "model-00003-of-00005.safetensors").unlink()
    return [
        ((), MODEL, ["nowhere.png"], "no image nowhere.png"),
        ((), MODEL, [broken / "empty.png"], "empty.png is empty"),
        ((), MODEL, [broken / "text.png"], "text.png is not an image"),
        ((), MODEL, [broken / "cut.png"], "cut.png is a damaged or truncated image"),
        ((), MODEL, [broken], "is a directory"),
        ((), MODEL, [*IMAGES, IMAGES[0]], "one or two images"),
        ((), tmp_path / "nowhere", IMAGES, "no model folder"),
        ((), no_config, IMAGES, "config.json is missing"),
        ((), no_json, IMAGES, "config.json is not JSON"),
        ((), model("kind", model_type="bert"), IMAGES, "model_type 'bert'"),
        ((), model("act", hidden_act="relu"), IMAGES, "hidden_act 'relu' is not one of silu"),
        ((), model("wide", intermediate_size=161), IMAGES, "9 wrongly shaped tensors"),
        ((), model("deep", num_hidden_layers=4), IMAGES, "9 missing tensors"),
        ((), model("shallow", num_hidden_layers=2), IMAGES, "9 unexpected tensors"),
        ((), cut, IMAGES, "model-00002-of-00005.safetensors is truncated"),
        ((), lost, IMAGES, "lacks model-00003-of-00005.safetensors"),
        (("--template", "libra_v2"), MODEL, IMAGES, "did you mean 'libra_v1'"),
        (("--query", "effusion " * 3000), MODEL, IMAGES, "tokens more than the model's 2048"),
        (("--query", "<image>"), MODEL, IMAGES, "<image> stands 2 times"),
        (("--num-beams", "0"), MODEL, IMAGES, "num_beams 0"),
        (("--num-beams", "400"), MODEL, IMAGES, "num_beams 400 is too many"),
        (("--top-p", "1.5"), MODEL, IMAGES, "top_p 1.5"),
        (("--top-p", "nan"), MODEL, IMAGES, "top_p nan"),
        (("--temperature", "-1"), MODEL, IMAGES, "temperature -1.0"),
        (("--temperature", "warm"), MODEL, IMAGES, "invalid float value: 'warm'"),
        (("--temperature", "1", "--num-beams", "2"), MODEL, IMAGES, "exclude each other"),
        (("--max-new-tokens", "0"), MODEL, IMAGES, "max_new_tokens 0"),
        (("--no-repeat-ngram", "-1"), MODEL, IMAGES, "no_repeat_ngram -1"),
        (("--num-beams", "2", "--num-return-sequences", "3"), MODEL, IMAGES, "more than num_beams 2"),
        (("--num-return-sequences", "2"), MODEL, IMAGES, "greedy gives one"),
        (("--num-beam", "2"), MODEL, IMAGES, "did you mean --num-beams?"),
        (("--chat", "--json"), MODEL, IMAGES, "exclude each other"),
        (("--device", "tpu"), MODEL, IMAGES, "device 'tpu' is not available"),
        (("--dtype", "int8"), MODEL, IMAGES, "invalid choice: 'int8'"),
    ]


def test_a_mistake_is_one_line_and_status_2(tmp_path, capsys):
    for arguments, model, images, words in mistakes(tmp_path):
        assert run(*arguments, model=model, images=images) == 2, words
        printed = capsys.readouterr()
        assert words in printed.err and printed.err.count("\n") == 1 and not printed.out, (words, printed.err)


def test_a_mistake_ends_the_process_without_a_traceback():
    command = [sys.executable, "sample.py", "--images", "nowhere.png", "--model", MODEL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "sample.py: no image nowhere.png: check the path\n"


def test_a_generation_that_may_outgrow_the_positions_warns_in_one_line(capsys):
    assert run("--max-new-tokens", "3", "--query", "a " * 970, "--device", "cpu") == 0
    assert capsys.readouterr().err == ""
    assert run("--max-new-tokens", "3000", "--no-repeat-ngram", "1", "--device", "cpu") in (0, 2)
    assert "would run past the model's 2048 positions" in capsys.readouterr().err
