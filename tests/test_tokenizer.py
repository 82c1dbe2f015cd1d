import itertools
import json
import random
import re
import shutil

import pytest
import sentencepiece
from conftest import GOLDEN, read
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import PreTrainedTokenizerFast

from tokenizer import IMAGE, TEMPLATES, Tokenizer, find_template, render, template_of

SEVEN, THREE = (GOLDEN / family / "model" for family in ("libra-7b", "libra-3b"))
ADDED = json.loads((SEVEN / "added_tokens.json").read_text())
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
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
    """Words, odd characters, digits and pieces of a vocabulary, with and without spaces between."""
    rng = random.Random(seed)
    words = sorted({word for line in CORPUS for word in line.split()})
    kinds = [
        lambda: rng.choice(words),
        lambda: rng.choice(ODD),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 9))),
        lambda: chr(rng.choice((rng.randrange(32, 127), rng.randrange(160, 0x800), rng.randrange(0x4E00, 0x9FFF)))),
        lambda: rng.choice(pieces or words),
    ]
    texts = ["", *CORPUS, *ODD]
    while len(texts) < count:
        joint = rng.choice(["", "", " "])
        texts.append(joint.join(rng.choice(kinds)() for _ in range(rng.randrange(1, 14))))
    return texts


def train(folder, **options):
    """A small SentencePiece model, with Llama's settings unless told otherwise, in folder/tokenizer.model."""
    settings = dict(
        model_type="bpe", vocab_size=460, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, split_digits=True,
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_prefix=str(folder / "tokenizer"), minloglevel=2, **settings | options
    )
    return folder


def sentencepiece_of(folder):
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def pieces_of(theirs):
    """The pieces that are text: no control pieces, no bytes."""
    ids = [id for id in range(theirs.vocab_size()) if not (theirs.is_control(id) or theirs.is_byte(id))]
    return [theirs.id_to_piece(id) for id in ids if not theirs.is_unknown(id)]


def configured(folder, source=SEVEN, **changes):
    """A copy of a model folder's tokenizer files, some keys of tokenizer_config.json changed."""
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    config = json.loads((source / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["golden", "trained", "trained without bytes"])
def pair(request, tmp_path_factory):
    """(ours, SentencePiece) of one tokenizer.model."""
    folder = SEVEN
    if request.param != "golden":
        folder = tmp_path_factory.mktemp("trained")
        train(folder, **({} if request.param == "trained" else dict(byte_fallback=False, vocab_size=300)))
    return Tokenizer(folder), sentencepiece_of(folder)


# ------------------------------------------------------------------------------------------ SentencePiece


def test_encode_equals_sentencepiece(pair):
    ours, theirs = pair
    for text in random_texts(3000, 0, pieces_of(theirs)):
        assert ours.encode(text) == [1, *theirs.encode(text)], repr(text)


def test_decode_equals_sentencepiece(pair):
    ours, theirs = pair
    rng = random.Random(1)
    ids = range(3, theirs.vocab_size())
    bytes_ = range(3, 259)  # mostly broken UTF-8, in runs
    for _ in range(3000):
        run = [rng.choice(bytes_ if rng.random() < 0.5 else ids) for _ in range(rng.randrange(12))]
        assert ours.decode(run) == theirs.decode(run), run


def test_decode_gives_back_what_was_encoded(pair):
    ours, theirs = pair
    for text in random_texts(300, 2, pieces_of(theirs)) if theirs.is_byte(3) else CORPUS[:1]:
        assert ours.decode(ours.encode(text)) == text.replace("▁", " "), repr(text)


def test_offsets_cover_the_text_and_name_each_piece(pair):
    ours, theirs = pair
    for text in random_texts(500, 3, pieces_of(theirs)):
        ids, spans = ours.encode_with_offsets(text)
        assert ids == ours.encode(text)
        assert (ids[0], spans[0]) == (1, (0, 0))
        assert {i for start, end in spans for i in range(start, end)} == set(range(len(text)))
        for id, (start, end) in list(zip(ids, spans, strict=True))[2:]:  # the first piece bears the added "▁"
            if not (theirs.is_byte(id) or theirs.is_unknown(id)):
                assert text[start:end].replace(" ", "▁") == theirs.id_to_piece(id)


# ------------------------------------------------------------------------------------------ added tokens


def with_added_tokens(count, seed):
    """Texts with added and special tokens among the words."""
    rng = random.Random(seed)
    names, words = [*ADDED, *SPECIAL], random_texts(300, seed)
    for _ in range(count):
        parts = [rng.choice(names if rng.random() < 0.4 else words) for _ in range(rng.randrange(1, 8))]
        yield rng.choice(["", " "]).join(parts)


def split(text):
    """The added and special tokens of a text and the texts between them, without empty ones."""
    pattern = "|".join(map(re.escape, sorted([*ADDED, *SPECIAL], key=len, reverse=True)))
    return [part for part in re.split(f"({pattern})", text) if part]


def test_every_chunk_between_added_tokens_gets_its_own_prefix():
    ours, theirs, names = Tokenizer(SEVEN), sentencepiece_of(SEVEN), ADDED | SPECIAL
    for text in with_added_tokens(1000, 4):
        expected = [[names[part]] if part in names else theirs.encode(part) for part in split(text)]
        assert ours.encode(text) == [1, *itertools.chain(*expected)], repr(text)


def test_decode_drops_special_tokens_and_sets_added_ones_between_spaces():
    ours, theirs, rng = Tokenizer(SEVEN), sentencepiece_of(SEVEN), random.Random(5)
    names = {id: name for name, id in ADDED.items()}
    for _ in range(500):
        ids = rng.choices(range(700), k=10)
        runs = itertools.groupby((id for id in ids if id > 2), key=lambda id: names.get(id))
        texts = [[name] * len(list(run)) if name else [theirs.decode(list(run))] for name, run in runs]
        assert ours.decode(ids) == " ".join(text for text in itertools.chain(*texts) if text), ids


def test_added_tokens_of_the_older_file_are_read(tmp_path):
    ours = Tokenizer(configured(tmp_path, added_tokens_decoder={}))
    assert [ours.encode(name)[1:] for name in ADDED] == [[id] for id in ADDED.values()]
    assert len(ours) == len(Tokenizer(SEVEN)) == 700


def test_an_added_token_that_strips_takes_the_white_space_beside_it(tmp_path):
    config = json.loads((SEVEN / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    config["693"] |= dict(lstrip=True, rstrip=True)
    ours, theirs = Tokenizer(configured(tmp_path, added_tokens_decoder=config)), sentencepiece_of(SEVEN)
    assert ours.encode("no  [CLS] \n effusion") == [1, *theirs.encode("no"), 693, *theirs.encode("effusion")]


def test_bos_is_added_only_where_the_config_says_so(tmp_path):
    ours = Tokenizer(configured(tmp_path, add_bos_token=False))
    assert ours.encode(CORPUS[0]) == sentencepiece_of(SEVEN).encode(CORPUS[0])


# -------------------------------------------------------------------------------------------- not legacy


def not_legacy(theirs):
    """encode as in the slow LlamaTokenizer of `transformers` 4 with legacy=False.

    One "▁" leads the whole text, none the chunks behind added tokens; a lone "▁" before a special token goes.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(theirs.serialized_model_proto())
    proto.normalizer_spec.add_dummy_prefix = False
    bare, names = SentencePieceProcessor(model_proto=proto.SerializeToString()), ADDED | SPECIAL

    def encode(text):
        parts = split("▁" + text.replace("▁", " ")) if text else []
        chunks = [[names[part]] if part in names else bare.encode(part) for part in parts]
        ids = list(itertools.chain(*chunks))
        if len(ids) > 1 and bare.id_to_piece(ids[0]) == "▁" and ids[1] in SPECIAL.values():
            del ids[0]
        return [1, *ids]

    return encode


def test_the_behaviour_that_is_not_legacy_adds_one_prefix_to_the_text(tmp_path):
    ours, encode = Tokenizer(configured(tmp_path, legacy=False)), not_legacy(sentencepiece_of(SEVEN))
    assert ours.encode("") == [1]
    assert ours.encode("</s>clear") == [1, 2, *encode("</s>clear")[2:]]
    for text in itertools.chain(random_texts(1000, 6), with_added_tokens(1000, 7)):
        assert ours.encode(text) == encode(text), repr(text)


def test_offsets_cover_the_text_also_where_not_legacy(tmp_path):
    ours, names = Tokenizer(configured(tmp_path, legacy=False)), {id: name for name, id in (ADDED | SPECIAL).items()}
    for text in itertools.chain(random_texts(300, 8), with_added_tokens(300, 9)):
        ids, spans = ours.encode_with_offsets(text)
        assert len(ids) == len(spans)
        assert {i for start, end in spans for i in range(start, end)} == set(range(len(text))), repr(text)
        for id, (start, end) in list(zip(ids, spans, strict=True))[1:]:
            assert id not in names or text[start:end] == names[id]


# ---------------------------------------------------------------------------------------- tokenizer.json


def test_tokenizer_json_encodes_and_decodes_as_transformers():
    ours = Tokenizer(THREE)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(THREE / "tokenizer.json"), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>", clean_up_tokenization_spaces=True,
    )  # fmt: skip
    rng = random.Random(10)
    assert ours.bos_token_id == theirs.bos_token_id == 693
    for text in random_texts(500, 11):
        assert ours.encode(text) == theirs(text)["input_ids"]
        ids = rng.choices(range(len(ours)), k=12)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_flag_says_which_of_two_tokenizer_files_counts(tmp_path):
    configured(tmp_path)
    shutil.copy(THREE / "tokenizer.json", tmp_path)
    text = "No effusion."
    assert Tokenizer(tmp_path, sentencepiece_first=True).encode(text) == Tokenizer(SEVEN).encode(text)
    assert Tokenizer(tmp_path).encode(text) == Tokenizer(THREE).encode(text)


# ------------------------------------------------------------------------------------------ broken files


def refused(folder, file):
    with pytest.raises(ValueError, match=re.escape(str(folder / file))) as caught:
        Tokenizer(folder)
    return "\n" not in str(caught.value)


def test_a_cut_tokenizer_model_is_refused_wherever_it_is_cut(tmp_path):
    data = (SEVEN / "tokenizer.model").read_bytes()
    for size in [*range(0, len(data), 173), *range(len(data) - 20, len(data))]:
        (tmp_path / "tokenizer.model").write_bytes(data[:size])
        assert refused(tmp_path, "tokenizer.model"), size


@pytest.mark.parametrize(
    "data", [b"no protobuf at all\n", b"\x0a\x02\x08\x01", b"\x08\x01" * 9, b"\x0a\x07\x0a\x01a\x12\x02ab", bytes(99)]
)
def test_a_tokenizer_model_of_something_else_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert refused(tmp_path, "tokenizer.model")


UNSUPPORTED = {
    "model type": dict(model_type="unigram", vocab_size=360),
    "normalisation": dict(normalization_rule_name="nmt_nfkc"),
    "dummy prefix": dict(add_dummy_prefix=False),
    "whitespace": dict(remove_extra_whitespaces=True),
    "user-defined": dict(user_defined_symbols="<obs>"),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_a_sentencepiece_model_that_would_give_other_ids_is_refused(tmp_path, reason):
    train(tmp_path, **UNSUPPORTED[reason])
    with pytest.raises(ValueError, match=f"tokenizer.model has .*{reason}.*not supported: give a tokenizer.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "", "weights"])
def test_a_tokenizer_file_that_is_no_json_is_refused(tmp_path, name, text):
    configured(tmp_path, THREE)
    (tmp_path / name).write_text(text)
    assert refused(tmp_path, name)


def test_a_folder_without_tokenizer_files_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        Tokenizer(tmp_path)


def test_an_added_token_whose_id_is_taken_is_refused(tmp_path):
    configured(tmp_path, added_tokens_decoder={})
    (tmp_path / "added_tokens.json").write_text('{"[NEW]": 5}')
    with pytest.raises(ValueError, match=r"\[NEW\].* id 5"):
        Tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_renders_the_published_text(name):
    golden, tokenizer = read("text", "templates.json"), Tokenizer(SEVEN)
    published = {kind: text for kind, text in golden["templates"][name].items() if text is not None}
    assert "open" in published
    for kind, text in published.items():
        assert render(golden["turns"][kind], find_template(name), tokenizer).text == text


def test_there_is_every_published_template():
    assert set(TEMPLATES) == set(read("text", "templates.json")["templates"])


def golden_cases():
    return sorted(GOLDEN.glob("*/case*/expected.json"))


@pytest.mark.parametrize("file", golden_cases(), ids=lambda file: f"{file.parts[-3]} {file.parts[-2]}")
def test_golden_prompts(file):
    case, folder = json.loads(file.read_text()), file.parents[1] / "model"
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer(folder, sentencepiece_first=config["model_type"] == "libra")
    assert template_of(config, tokenizer) == case["template"]
    prompt = render([(f"<image>\n{case['query']}", None)], find_template(case["template"]), tokenizer)
    assert (prompt.text, prompt.ids) == (case["prompt"], case["input_ids"])
    assert prompt.labels == [False] * len(prompt.ids)


def record_turns(record):
    """[(question, answer), …] of a training record, the image moved to the front of its turn."""
    values = [turn["value"] for turn in record["conversations"]]
    front = lambda text: f"<image>\n{text.replace('<image>', '').strip()}" if "<image>" in text else text
    return [(front(question), answer) for question, answer in zip(values[::2], values[1::2], strict=True)]


LABELLED = [  # (family, template, number of the record); the published code labels no two turns of Llama 3
    (family, template, number)
    for family, template, numbers in (("libra-7b", "libra_v1", (0, 1, 2)), ("libra-3b", "libra_llama_3", (0, 2)))
    for number in numbers
    if (GOLDEN / "training" / f"{family}-align.safetensors").exists()
]


@pytest.mark.parametrize(("family", "template", "number"), LABELLED)
def test_golden_labels(family, template, number):
    golden = load_file(GOLDEN / "training" / f"{family}-align.safetensors")
    ids, labels, mask = (golden[name][number].tolist() for name in ("input_ids", "labels", "attention_mask"))
    turns = record_turns(read("training", "records.json")[number])
    prompt = render(turns, find_template(template), Tokenizer(GOLDEN / family / "model"))
    assert prompt.ids == ids[: sum(mask)]
    learnt = [id if label else -100 for id, label in zip(prompt.ids, prompt.labels, strict=True)]
    assert learnt == labels[: sum(mask)]


def learnt_runs(prompt):
    pairs = itertools.groupby(zip(prompt.ids, prompt.labels, strict=True), key=lambda pair: pair[1])
    return [[id for id, _ in run] for label, run in pairs if label]


@pytest.mark.parametrize(
    ("folder", "template", "end"), [(SEVEN, "libra_v1", "</s>"), (THREE, "libra_llama_3", "<|eot_id|>")]
)
def test_both_answers_of_two_turns_are_learnt_with_what_closes_them_and_nothing_else(folder, template, end):
    tokenizer, turns = Tokenizer(folder), record_turns(read("training", "records.json")[1])
    runs = learnt_runs(render(turns, find_template(template), tokenizer))
    assert [tokenizer.decode(run[:-1]) for run in runs] == [answer for _, answer in turns]
    assert [tokenizer.backend.id_to_token(run[-1]) for run in runs] == [end, end]


def test_the_plain_template_learns_answer_and_line_break_without_the_question():
    turns = [("<image>\nDescribe the lungs.", "The lungs are clear.")]
    prompt = render(turns, find_template("plain"), Tokenizer(SEVEN))
    learnt = sentencepiece_of(SEVEN).encode("The lungs are clear.\n")
    assert prompt.ids == [1, IMAGE, *learnt]
    assert prompt.labels == [False, False] + [True] * len(learnt)


def test_a_conversation_without_an_image_is_one_chunk():
    prompt = render([("Is it clear?", None)], find_template("libra_v1"), Tokenizer(SEVEN))
    assert prompt.ids == [1, *sentencepiece_of(SEVEN).encode(prompt.text)]


def test_chunks_behind_the_image_keep_their_first_id_where_the_tokenizer_adds_no_bos(tmp_path):
    tokenizer, theirs = Tokenizer(configured(tmp_path, add_bos_token=False)), sentencepiece_of(SEVEN)
    prompt = render([("<image>\nWhat?", None)], find_template("libra_v1"), tokenizer)
    before, after = map(theirs.encode, prompt.text.split("<image>"))
    assert prompt.ids == [*before, IMAGE, *after]


@pytest.mark.parametrize("turns", [[("<image> and <image>", None)], [("<image>\nA?", "B"), ("<image>\nC?", None)]])
def test_two_images_are_refused(turns):
    with pytest.raises(ValueError, match="<image> stands 2 times"):
        render(turns, find_template("libra_v1"), Tokenizer(SEVEN))


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(ValueError, match=r"'libra_v2'; did you mean 'libra_v[01]'"):
        find_template("libra_v2")
    with pytest.raises(ValueError, match="did you mean 'libra_llama_3'"):
        find_template("libra_lama_3")


@pytest.mark.parametrize(
    ("folder", "config", "name"),
    [
        (SEVEN, dict(model_type="libra", mm_projector_type="TAC"), "libra_v1"),
        (SEVEN, dict(model_type="libra", mm_projector_type="mlp2x_gelu"), "libra_v0"),
        (SEVEN, dict(model_type="libra"), "libra_v0"),
        (THREE, dict(model_type="libra", mm_projector_type="TAC"), "libra_llama_3"),
        (SEVEN, dict(model_type="libra_mistral"), "llava_med_v1.5_mistral_7b"),
        (SEVEN, dict(model_type="libra_qwen2", mm_projector_type="TAC"), "qwen"),
        (SEVEN, dict(model_type="libra_qwen3"), "qwen"),
        (SEVEN, dict(model_type="libra_phi3"), "conv_phi3"),
        (SEVEN, dict(model_type="libra_gemma"), "conv_gemma"),
        (SEVEN, dict(model_type="libra", mm_vision_tower_config="x.json"), "v1"),
        (SEVEN, dict(model_type="libra_mistral", mm_vision_tower_config="x.json"), "v1"),
        (SEVEN, dict(use_maira_feature_norm=True, mm_vision_tower_config="x.json"), "maira_2"),
        (SEVEN, dict(use_maira_feature_norm=False, mm_projector_type="TAC"), "libra_v1"),
        (THREE, dict(use_maira_feature_norm=True, mm_conversation_template="plain"), "plain"),
    ],
)
def test_the_template_of_a_checkpoint(folder, config, name):
    assert template_of(config, Tokenizer(folder)) == name
