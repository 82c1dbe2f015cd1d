"""Oracles: `sentencepiece`, `transformers`, and golden prompts, labels and templates of the published code."""

import itertools
import json
import random
import re
import shutil

import pytest
import sentencepiece
from conftest import FAMILIES, GOLDEN, read
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import PreTrainedTokenizerFast

from tokenizer import IMAGE, TEMPLATES, Tokenizer, find_template, render, template_of

SEVEN, THREE = GOLDEN / "libra-7b" / "model", GOLDEN / "libra-3b" / "model"
ADDED = json.loads((SEVEN / "added_tokens.json").read_text())
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
NAMES = ADDED | SPECIAL
CORPUS = [
    "The heart is normal. The lungs are clear; no pneumothorax, no effusion.",
    "Interval worsening of pulmonary oedema (2.5 cm), left > right, since 2023-01-05.",
    "Œdème léger; Größe 12 mm; Ångström; naïve façade",
    "胸部X線写真に異常なし。肺野清晰，心影正常。",
    "Лёгкие чистые. القلب طبيعي. ปกติ 정상",
]
ODD = [
    *("▁", "▁▁", " ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\x00", "\x7f", "\U0010ffff", "\ufffd"),
    *("🫁", "👩\u200d⚕️", "é", "e\u0301", "ß", "肺", "न", "<0x0A>", "<image>", "-200", "…", "''"),
]


def random_texts(count, seed, pieces=()):
    """Words, odd characters, digits and pieces of a vocabulary, with and without spaces between them."""
    rng = random.Random(seed)
    words = sorted({word for line in CORPUS for word in line.split()})
    kinds = [
        lambda: rng.choice(words),
        lambda: rng.choice(ODD),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 9))),
        lambda: chr(rng.choice((rng.randrange(32, 127), rng.randrange(160, 0x800), rng.randrange(0x4E00, 0x9FFF)))),
        lambda: rng.choice(pieces or words),
    ]
    yield from ["", *CORPUS, *ODD]
    for _ in range(count):
        yield rng.choice(["", "", " "]).join(rng.choice(kinds)() for _ in range(rng.randrange(1, 14)))


def texts_with_added_tokens(count, seed):
    rng = random.Random(seed)
    names, words = list(NAMES), list(random_texts(300, seed))
    for _ in range(count):
        parts = [rng.choice(names if rng.random() < 0.4 else words) for _ in range(rng.randrange(1, 8))]
        yield rng.choice(["", " "]).join(parts)


def encode_chunks(text, encode):
    """The ids of a text that is cut at its added tokens, each chunk between them encoded alone."""
    pattern = "|".join(map(re.escape, sorted(NAMES, key=len, reverse=True)))
    parts = [part for part in re.split(f"({pattern})", text) if part]
    return [id for part in parts for id in ([NAMES[part]] if part in NAMES else encode(part))]


def train(folder, **changes):
    """Trains a small SentencePiece model with Llama's settings."""
    settings = dict(
        model_type="bpe", vocab_size=460, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
    )  # fmt: skip
    lines, prefix = iter(CORPUS * 20), str(folder / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=prefix, **settings | changes)
    return folder


def sentencepiece_of(folder):
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def copy_of(source, folder, **changes):
    """Copies a model's tokenizer files and changes keys of tokenizer_config.json."""
    for name in ("tokenizer.model", "tokenizer.json", "added_tokens.json"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    config = json.loads((source / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["golden", "trained", "trained without bytes"])
def pair(request, tmp_path_factory):
    """(our tokenizer, SentencePiece's, its pieces that are text) of one tokenizer.model."""
    changes = dict(byte_fallback=False, vocab_size=300) if request.param == "trained without bytes" else {}
    folder = SEVEN if request.param == "golden" else train(tmp_path_factory.mktemp("trained"), **changes)
    theirs = sentencepiece_of(folder)
    is_text = lambda id: not (theirs.is_control(id) or theirs.is_byte(id) or theirs.is_unknown(id))
    return Tokenizer(folder), theirs, [theirs.id_to_piece(id) for id in range(theirs.vocab_size()) if is_text(id)]


def test_encode_equals_sentencepiece(pair):
    ours, theirs, pieces = pair
    for text in random_texts(3000, 0, pieces):
        assert ours.encode(text) == [1, *theirs.encode(text)], repr(text)


def test_decode_equals_sentencepiece_on_broken_bytes_too(pair):
    ours, theirs, _ = pair
    rng, everything, bytes_ = random.Random(1), range(3, theirs.vocab_size()), range(3, 259)
    for _ in range(3000):
        ids = [rng.choice(bytes_ if rng.random() < 0.5 else everything) for _ in range(rng.randrange(12))]
        assert ours.decode(ids) == theirs.decode(ids), ids


def test_offsets_cover_the_text_and_name_each_piece(pair):
    ours, theirs, pieces = pair
    for text in random_texts(500, 3, pieces):
        ids, offsets = ours.encode_with_offsets(text)
        assert (ids, ids[0], offsets[0]) == (ours.encode(text), 1, (0, 0))
        assert {i for span in offsets for i in range(*span)} == set(range(len(text)))
        for id, (start, end) in list(zip(ids, offsets, strict=True))[2:]:  # the first piece has the added "▁"
            piece = theirs.id_to_piece(id)
            assert piece not in pieces or text[start:end].replace(" ", "▁") == piece


def test_every_chunk_between_added_tokens_gets_its_own_prefix():
    ours, theirs = Tokenizer(SEVEN), sentencepiece_of(SEVEN)
    for text in texts_with_added_tokens(1000, 4):
        assert ours.encode(text) == [1, *encode_chunks(text, theirs.encode)], repr(text)


def test_decode_drops_special_tokens_and_sets_added_ones_between_spaces():
    ours, theirs, rng = Tokenizer(SEVEN), sentencepiece_of(SEVEN), random.Random(5)
    names = {id: name for name, id in ADDED.items()}
    for _ in range(500):
        ids = rng.choices(range(700), k=10)
        texts = []
        for name, group in itertools.groupby((id for id in ids if id > 2), key=names.get):
            run = list(group)
            texts += [name] * len(run) if name else [theirs.decode(run)]
        assert ours.decode(ids) == " ".join(text for text in texts if text), ids


def test_without_the_legacy_mode_the_text_as_a_whole_gets_one_prefix(tmp_path):
    """As the slow LlamaTokenizer of `transformers` 4: a lone "▁" before a special token goes."""
    ours = Tokenizer(copy_of(SEVEN, tmp_path, legacy=False))
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_of(SEVEN).serialized_model_proto())
    proto.normalizer_spec.add_dummy_prefix = False
    bare = SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts_of_ids = {id: name for name, id in NAMES.items()}
    for text in itertools.chain(random_texts(1000, 6), texts_with_added_tokens(1000, 7)):
        expected = encode_chunks("▁" + text.replace("▁", " "), bare.encode) if text else []
        if len(expected) > 1 and bare.id_to_piece(expected[0]) == "▁" and expected[1] in SPECIAL.values():
            del expected[0]
        ids, offsets = ours.encode_with_offsets(text)
        assert ids == [1, *expected], repr(text)
        assert {i for span in offsets for i in range(*span)} == set(range(len(text))), repr(text)
        for id, (start, end) in list(zip(ids, offsets, strict=True))[1:]:
            assert text[start:end] == texts_of_ids.get(id, text[start:end])


def test_the_files_beside_the_model_are_followed(tmp_path):
    theirs, text = sentencepiece_of(SEVEN), CORPUS[0]
    older = Tokenizer(copy_of(SEVEN, tmp_path, added_tokens_decoder={}))
    assert [older.encode(name)[1:] for name in ADDED] == [[id] for id in ADDED.values()]
    assert len(older) == len(Tokenizer(SEVEN)) == 700
    assert Tokenizer(copy_of(SEVEN, tmp_path, add_bos_token=False)).encode(text) == theirs.encode(text)
    added = json.loads((SEVEN / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    added["693"] |= dict(lstrip=True, rstrip=True)
    stripping = Tokenizer(copy_of(SEVEN, tmp_path, added_tokens_decoder=added))
    assert stripping.encode("no  [CLS] \n effusion") == [1, *theirs.encode("no"), 693, *theirs.encode("effusion")]


def test_tokenizer_json_encodes_and_decodes_as_transformers():
    ours, rng = Tokenizer(THREE), random.Random(10)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(THREE / "tokenizer.json"), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>", clean_up_tokenization_spaces=True,
    )  # fmt: skip
    assert ours.bos_token_id == theirs.bos_token_id == 693
    for text in random_texts(500, 11):
        assert ours.encode(text) == theirs(text)["input_ids"]
        ids = rng.choices(range(len(ours)), k=12)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_sentencepiece_first_decides_between_two_files(tmp_path):
    copy_of(SEVEN, tmp_path)
    shutil.copy(THREE / "tokenizer.json", tmp_path)
    assert Tokenizer(tmp_path, sentencepiece_first=True).encode(CORPUS[0]) == Tokenizer(SEVEN).encode(CORPUS[0])
    assert Tokenizer(tmp_path).encode(CORPUS[0]) == Tokenizer(THREE).encode(CORPUS[0])


NOT_SENTENCEPIECE = [b"no model\n", b"\x0a\x02\x08\x01", b"\x08\x01" * 9, b"\x0a\x07\x0a\x01a\x12\x02ab", bytes(99)]
BROKEN = [("tokenizer.model", data) for data in NOT_SENTENCEPIECE]
BROKEN += [(name, data) for name in ("tokenizer.json", "tokenizer_config.json") for data in (b"{", b"", b"weights")]
BROKEN += [("added_tokens.json", b'{"[NEW]": 5}'), ("added_tokens.json", b"[]")]  # id 5 is taken
BROKEN += [("added_tokens.json", b'{"[NEW]": "700"}'), ("added_tokens.json", b'{"[NEW]": null}')]
BROKEN += [("tokenizer.model", b"\x0a" + b"\xff" * 10**6)]  # a length that never ends


@pytest.mark.parametrize(("file", "data"), BROKEN)
def test_a_broken_file_is_refused(tmp_path, file, data):
    copy_of(THREE if file == "tokenizer.json" else SEVEN, tmp_path, added_tokens_decoder={})
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (dict(bos_token=3), "bos_token"), (dict(bos_token={"text": "<s>"}), "special token"),
        (dict(unk_token="<no>"), "unk_token"), (dict(bos_token="<no>"), "bos_token"),
        (dict(additional_special_tokens={"a": 1}), "additional_special_tokens"), (dict(legacy="no"), "legacy"),
        (dict(additional_special_tokens=[1]), "additional_special_tokens"), (dict(add_bos_token=1), "add_bos_token"),
        (dict(added_tokens_decoder=[]), "added_tokens_decoder"), (dict(added_tokens_decoder={"x": {}}), "'x'"),
        (dict(added_tokens_decoder={"700": {"content": 5}}), "content"),
        (dict(added_tokens_decoder={"700": {"content": "<a>", "lstrip": "yes"}}), "lstrip"),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_refused_by_name(tmp_path, changes, field):
    with pytest.raises(ValueError, match=f"tokenizer_config.json.*{field}"):
        Tokenizer(copy_of(SEVEN, tmp_path, **changes))


def test_a_tokenizer_json_whose_parts_do_not_fit_is_refused(tmp_path):
    copy_of(THREE, tmp_path)
    content = json.loads((THREE / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
    content["post_processor"] = dict(type="TemplateProcessing", single=single, pair=[], special_tokens={})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_a_missing_tokenizer_model_and_one_that_is_cut_anywhere_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        Tokenizer(tmp_path)
    data = (SEVEN / "tokenizer.model").read_bytes()
    for size in [*range(0, len(data), 173), *range(len(data) - 20, len(data))]:
        (tmp_path / "tokenizer.model").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"tokenizer\.model"):
            Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [dict(model_type="unigram", vocab_size=360), dict(normalization_rule_name="nmt_nfkc"), dict(add_dummy_prefix=False),
     dict(remove_extra_whitespaces=True), dict(user_defined_symbols="<obs>")],
    ids=str,
)  # fmt: skip
def test_a_sentencepiece_model_that_would_give_other_ids_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=r"tokenizer\.model .*not supported"):
        Tokenizer(train(tmp_path, **changes))


@pytest.mark.parametrize("name", read("text", "templates.json")["templates"])
def test_a_template_renders_the_golden_text(name):
    golden, tokenizer = read("text", "templates.json"), Tokenizer(SEVEN)
    assert golden["templates"][name]["open"] is not None
    for kind, text in golden["templates"][name].items():
        assert text in (None, render(golden["turns"][kind], find_template(name), tokenizer).text)


CASE_FILES = sorted(GOLDEN.glob("*/case*/expected.json"))


@pytest.mark.parametrize("file", CASE_FILES, ids=lambda file: "-".join(file.parts[-3:-1]))
def test_golden_prompts(file):
    case, folder = json.loads(file.read_text()), file.parents[1] / "model"
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer(folder, sentencepiece_first=config["model_type"] == "libra")
    assert template_of(config, tokenizer) == case["template"]
    prompt = render([(f"<image>\n{case['query']}", None)], find_template(case["template"]), tokenizer)
    assert (prompt.text, prompt.ids) == (case["prompt"], case["input_ids"])
    assert prompt.mask == [False] * len(prompt.ids)


def turns_of(number):
    """The turns of a golden training record, its image moved to the front of the question."""
    values = [turn["value"] for turn in read("training", "records.json")[number]["conversations"]]
    front = lambda text: f"<image>\n{text.replace('<image>', '').strip()}" if "<image>" in text else text
    return list(zip(map(front, values[::2]), values[1::2], strict=True))


# the published code labels no record of two turns (number 1) in the style of Llama 3
LABELLED = [*(("libra-7b", "libra_v1", number) for number in (0, 1, 2)),
            *(("libra-3b", "libra_llama_3", number) for number in (0, 2))]  # fmt: skip


@pytest.mark.parametrize(("family", "template", "number"), LABELLED)
def test_golden_labels(family, template, number):
    golden = load_file(GOLDEN / "training" / f"{family}-align.safetensors")
    real = golden["attention_mask"][number].bool()
    prompt = render(turns_of(number), find_template(template), Tokenizer(GOLDEN / family / "model"))
    assert prompt.ids == golden["input_ids"][number][real].tolist()
    learnt = [id if label else -100 for id, label in zip(prompt.ids, prompt.mask, strict=True)]
    assert learnt == golden["labels"][number][real].tolist()


@pytest.mark.parametrize("folder, template, end", [(SEVEN, "libra_v1", "</s>"), (THREE, "libra_llama_3", "<|eot_id|>")])
def test_both_answers_of_two_turns_are_learnt_with_what_closes_them(folder, template, end):
    tokenizer, turns = Tokenizer(folder), turns_of(1)
    prompt = render(turns, find_template(template), tokenizer)
    runs = learnt_runs(prompt)
    assert [tokenizer.decode(run[:-1]) for run in runs] == [answer for _, answer in turns]
    assert [tokenizer.backend.id_to_token(run[-1]) for run in runs] == [end, end]


def learnt_runs(prompt):
    """The learnt ids of each answer."""
    runs = itertools.groupby(zip(prompt.ids, prompt.mask, strict=True), key=lambda pair: pair[1])
    return [[id for id, _ in run] for is_learnt, run in runs if is_learnt]


NUMBERS = [("<image>\nHow large?", "3.5 cm"), ("What is there?", "2 views"), ("List them.", "1. Left PICC")]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template", ["libra_v1", "llama_2", "llava_med_v1.5_mistral_7b"])
def test_a_space_that_is_a_token_of_its_own_is_learnt(tmp_path, template, legacy):
    """SentencePiece cuts "3.5 cm" into "▁", "3", …; the open prompt ends before the "▁"."""
    ours, theirs = Tokenizer(copy_of(SEVEN, tmp_path, legacy=legacy)), sentencepiece_of(SEVEN)
    template = find_template(template)
    runs = learnt_runs(render(NUMBERS, template, ours))
    assert [theirs.id_to_piece(run[0]) for run in runs] == ["▁"] * 3
    assert runs == [[*theirs.encode(answer + template.end.removesuffix("</s>")), 2] for _, answer in NUMBERS]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learnt_continues_the_open_prompt(family):
    """A model meets the open prompt when it writes. (Qwen's, Llama 3's and the plain one differ, as published.)"""
    config = read(family, "model", "config.json")
    tokenizer = Tokenizer(GOLDEN / family / "model", sentencepiece_first=config["model_type"] == "libra")
    for template in TEMPLATES.values():
        if template.answer.rstrip(" ") == template.open:
            for question, answer in [*NUMBERS, ("Clear?", "No."), ("Which?", "🫁")]:
                closed = render([(question, answer)], template, tokenizer)
                assert closed.ids[: closed.mask.index(True)] == render([(question, None)], template, tokenizer).ids


@pytest.mark.parametrize("legacy", [True, False])
def test_an_image_before_a_digit_does_not_take_its_space(tmp_path, legacy):
    """The published code learns all that follows the image (preprocess_plain)."""
    tokenizer = Tokenizer(copy_of(SEVEN, tmp_path, legacy=legacy))
    prompt = render(NUMBERS[:1], find_template("plain"), tokenizer)
    assert prompt.ids == [1, IMAGE, *sentencepiece_of(SEVEN).encode("3.5 cm\n")]
    assert prompt.mask == [False] * 2 + [True] * (len(prompt.ids) - 2)


def test_the_plain_template_learns_answer_and_line_break_without_the_question():
    turns = [("<image>\nDescribe the lungs.", "The lungs are clear.")]
    prompt = render(turns, find_template("plain"), Tokenizer(SEVEN))
    learnt = sentencepiece_of(SEVEN).encode("The lungs are clear.\n")
    assert prompt.ids == [1, IMAGE, *learnt]
    assert prompt.mask == [False, False] + [True] * len(learnt)


def test_a_conversation_without_an_image_is_one_chunk():
    prompt = render([("Is it clear?", None)], find_template("libra_v1"), Tokenizer(SEVEN))
    assert prompt.ids == [1, *sentencepiece_of(SEVEN).encode(prompt.text)]


def test_the_chunk_behind_the_image_keeps_its_first_id_if_there_is_no_bos(tmp_path):
    tokenizer, encode = Tokenizer(copy_of(SEVEN, tmp_path, add_bos_token=False)), sentencepiece_of(SEVEN).encode
    prompt = render([("<image>\nWhat?", None)], find_template("libra_v1"), tokenizer)
    before, behind = map(encode, prompt.text.split("<image>"))
    assert prompt.ids == [*before, IMAGE, *behind]


def test_two_images_are_refused():
    with pytest.raises(ValueError, match="<image>"):
        render([("<image>\nA?", "B"), ("<image>\nC?", None)], find_template("libra_v1"), Tokenizer(SEVEN))


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(ValueError, match=r"'libra_lama_3'.*'libra_llama_3'"):
        find_template("libra_lama_3")


@pytest.mark.parametrize(
    ("folder", "config", "name"),
    [
        (SEVEN, dict(model_type="libra", mm_projector_type="TAC"), "libra_v1"),
        (SEVEN, dict(model_type="libra", mm_projector_type="mlp2x_gelu"), "libra_v0"),
        (THREE, dict(model_type="libra", mm_projector_type="TAC"), "libra_llama_3"),
        (SEVEN, dict(model_type="libra_mistral"), "llava_med_v1.5_mistral_7b"),
        (SEVEN, dict(model_type="libra_qwen2", mm_projector_type="TAC"), "qwen"),
        (SEVEN, dict(model_type="libra_qwen3"), "qwen"),
        (SEVEN, dict(model_type="libra_phi3"), "conv_phi3"),
        (SEVEN, dict(model_type="libra_gemma"), "conv_gemma"),
        (SEVEN, dict(model_type="libra_mistral", mm_vision_tower_config="x.json"), "v1"),
        (SEVEN, dict(use_maira_feature_norm=True, mm_vision_tower_config="x.json"), "maira_2"),
        (THREE, dict(use_maira_feature_norm=True, mm_conversation_template="plain"), "plain"),
    ],
)
def test_the_template_of_a_checkpoint(folder, config, name):
    assert template_of(config, Tokenizer(folder)) == name
