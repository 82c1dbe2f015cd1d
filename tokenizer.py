"""Text <-> ids, and conversations -> prompt ids with a mask of what is learnt.

Two kinds of tokenizer files: `tokenizer.json`, which the `tokenizers` library reads, and the older SentencePiece
`tokenizer.model`, which is rebuilt here as a `tokenizers` BPE. Conversation templates are data; `render` is the one
function that turns a conversation into text, ids and labels, for inference and training alike.
"""

import codecs
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from struct import error as StructError
from struct import unpack

import tokenizers
from tokenizers import AddedToken, models, normalizers, processors

IMAGE = -200  # stands for all positions of the image in a list of ids, as in the published code
IMAGE_TEXT = "<image>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"  # around the image, where mm_use_im_start_end is set


class Tokenizer:
    """Ids and text as the published code's tokenizer of the same folder gives them.

    bos_token_id: int or None. len(tokenizer): the vocabulary with added tokens.
    """

    def __init__(self, folder: Path, sentencepiece_first: bool = False):
        """folder holds `tokenizer.json` or `tokenizer.model`; where both lie, the flag says which counts."""
        folder = Path(folder)
        config = _read(folder / "tokenizer_config.json")
        names = [config.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")]
        names = [name["content"] if isinstance(name, dict) else name for name in names]
        self.cleans_up = config.get("clean_up_tokenization_spaces") is True
        self.pieces = None  # only SentencePiece needs them, in decoding
        self.legacy = True
        json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
        if model_file.exists() and (sentencepiece_first or not json_file.exists()):
            self.legacy = config.get("legacy") is not False
            # the defaults of Llama's tokenizer where the file is silent; it has no padding token by default
            names = [name or default for name, default in zip(names, ("<s>", "</s>", "<unk>", None), strict=True)]
            self.backend, self.pieces = _sentencepiece(folder, config, names, self.legacy)
        elif json_file.exists():
            try:
                self.backend = tokenizers.Tokenizer.from_file(str(json_file))
            except Exception as error:  # the library raises nothing more special
                raise ValueError(f"{json_file} is not a tokenizer file ({error}): fetch it again") from None
        else:
            raise FileNotFoundError(f"{folder} holds neither tokenizer.json nor tokenizer.model: fetch one")
        self.backend.no_truncation()
        self.backend.no_padding()
        self.bos_token_id = self.backend.token_to_id(names[0]) if names[0] else None
        extra = [name["content"] if isinstance(name, dict) else name
                 for name in config.get("additional_special_tokens") or []]  # fmt: skip
        self.special = {self.backend.token_to_id(name) for name in (*names, *extra) if name}
        if self.pieces is None:
            added = self.backend.get_added_tokens_decoder()
            self.special |= {id for id, token in added.items() if token.special}

    def __len__(self):
        return self.backend.get_vocab_size(with_added_tokens=True)

    def add_special(self, names: list[str]):
        """Add special tokens where they are not there yet, as published loading does."""
        self.backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
        self.special |= {self.backend.token_to_id(name) for name in names}

    def encode(self, text: str) -> list[int]:
        """Ids, led by bos where the tokenizer adds one."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, for each, the characters of the text that it stands for; (0, 0) for bos."""
        if self.legacy:
            encoding = self.backend.encode(text)
            return encoding.ids, encoding.offsets
        if not text:
            return self.backend.encode(text).ids, [(0, 0)] * len(self.backend.encode(text).ids)
        encoding = self.backend.encode("▁" + text.replace("▁", " "))
        offsets = [(max(start - 1, 0), max(end - 1, 0)) for start, end in encoding.offsets]
        first = 1 if encoding.ids[0] == self.bos_token_id else 0
        ids = encoding.ids
        if len(ids) > first + 1 and encoding.tokens[first] == "▁" and ids[first + 1] in self.special:
            del ids[first], offsets[first]
        return ids, offsets

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens. Bytes that are no UTF-8 (yet) become one U+FFFD each."""
        if self.pieces is None:
            text = self.backend.decode(ids, skip_special_tokens=True)
        else:
            text = self._decode_pieces([id for id in ids if id not in self.special])
        if self.cleans_up:
            for before in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
                text = text.replace(before, before.strip())
        return text

    def _decode_pieces(self, ids: list[int]) -> str:
        """Added tokens stand between spaces, as published; the rest as SentencePiece decodes it."""
        parts: list[list[int] | str] = [[]]
        for id in ids:
            if id < len(self.pieces):
                parts[-1].append(id)
            else:
                parts += [self.backend.id_to_token(id) or "", []]
        texts = [part if isinstance(part, str) else self._decode_run(part) for part in parts]
        return " ".join(text for text in texts if text)

    def _decode_run(self, ids: list[int]) -> str:
        text, bytes_ = "", b""
        for number, id in enumerate(ids):
            piece, kind = self.pieces[id]
            if kind == BYTE:
                bytes_ += bytes([int(piece[3:5], 16)])  # <0xE2>
                continue
            text += bytes_.decode("utf-8", "one_each")
            bytes_ = b""
            text += (piece.removeprefix("▁") if number == 0 else piece).replace("▁", " ")
        return text + bytes_.decode("utf-8", "one_each")


codecs.register_error("one_each", lambda error: ("\ufffd" * (error.end - error.start), error.end))


def _read(path: Path) -> dict:
    """A JSON object, {} where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from None


# ----------------------------------------------------------------------------------------- SentencePiece

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # kinds of pieces in sentencepiece_model.proto


def _sentencepiece(folder, config, names, legacy):
    """tokenizer.model -> (`tokenizers` BPE that gives the same ids, [(piece, kind)])."""
    file = folder / "tokenizer.model"
    pieces, byte_fallback = _parse_sentencepiece(file)
    vocab = {piece: id for id, (piece, _, _) in enumerate(pieces)}
    # SentencePiece joins the two neighbours that make the piece of the best score, whichever they are; BPE
    # wants the pairs listed: every split of a piece whose halves are pieces, best score first.
    merges = sorted(
        (-score, vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score, kind in pieces
        if kind == NORMAL
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    )
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in merges],
            unk_token=names[2],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    # Every chunk between special tokens gets its own "▁" in the legacy behaviour; else `encode` adds one.
    steps = [normalizers.Prepend("▁")] if legacy else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    added = {int(id): token for id, token in config.get("added_tokens_decoder", {}).items()}
    added |= {id: {"content": name} for name, id in _read(folder / "added_tokens.json").items() if id not in added}
    added |= {vocab[name]: {"content": name} for name in names if name in vocab and vocab[name] not in added}
    flags = lambda token: {flag: token.get(flag, False) for flag in ("single_word", "lstrip", "rstrip")}
    backend.add_tokens(
        [AddedToken(token["content"], normalized=False, **flags(token)) for _, token in sorted(added.items())]
    )
    for id, token in added.items():
        if backend.token_to_id(token["content"]) != id:
            raise ValueError(f"{folder}: the added token {token['content']!r} cannot have id {id}: fetch it again")
    if config.get("add_bos_token", True):
        bos = names[0]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return backend, [(piece, kind) for piece, _, kind in pieces]


def _parse_sentencepiece(file: Path):
    """The pieces [(text, score, kind)] of a SentencePiece BPE model, and whether it falls back to bytes."""
    pieces, trainer, normalizer = [], {}, {}
    try:
        for number, value in _protobuf(file.read_bytes()):
            if number == 1:
                piece = dict(_protobuf(value))
                pieces.append((piece[1].decode("utf-8"), unpack("<f", piece[2])[0], piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_protobuf(value))
            elif number == 3:
                normalizer = dict(_protobuf(value))
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, StructError) as error:  # fields of wrong kinds
        raise ValueError(f"{file} is truncated or not a SentencePiece model ({error!r}): fetch it again") from None
    unsupported = {
        "a model type other than BPE": trainer.get(3, 1) != 2,
        "a normalisation table": bool(normalizer.get(2)),
        "no dummy prefix": not normalizer.get(3, 1),
        "removal of extra whitespace": bool(normalizer.get(4, 1)),
        "user-defined pieces": any(kind not in (NORMAL, UNKNOWN, CONTROL, BYTE) for _, _, kind in pieces),
        "no pieces": not pieces,
    }
    if found := [name for name, is_found in unsupported.items() if is_found]:
        raise ValueError(f"{file} has {' and '.join(found)}, which is not supported: give a tokenizer.json instead")
    return pieces, bool(trainer.get(35, 0))


def _protobuf(data: bytes):
    """(field number, value) of a protobuf message: an int for varints, bytes for all else."""
    position = 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if position + size > len(data):
            raise IndexError("the file ends within a field")
        yield key >> 3, data[position : position + size]
        position += size


# -------------------------------------------------------------------------------------------- templates


@dataclass(frozen=True)
class Template:
    """start question open | start question answer ANSWER end after next question …"""

    start: str  # before the first question, the system prompt included
    open: str  # behind a question that is to be answered
    answer: str  # between a question and its given answer
    end: str  # closes an answer and is learnt with it
    next: str  # before each later question
    after: str = ""  # behind every closed answer
    stop: str = ""  # generation ends at this string; "" stands for `end` without its white space
    drops_question: bool = False  # a closed question shrinks to the image


def _vicuna(system, **changes):
    return Template(f"{system} USER: ", " ASSISTANT:", " ASSISTANT: ", "</s>", "USER: ", **changes)


def _chatml(system, between="", line="\n"):
    header = f"<|im_end|>{between}<|im_start|>assistant"
    user = f"{between}<|im_start|>user\n"
    return Template(f"<|im_start|>system\n{system}<|im_end|>{user}", header + line, header + "\n", "<|im_end|>", user)


def _llama_2(system, stop="<s>", following="<s>[INST] "):
    return Template(f"[INST] {system}", " [/INST]", " [/INST] ", " </s>", following, stop=stop)


def _llama_3(system):
    user, header = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>\n<|start_header_id|>{}<|end_header_id|>"
    start = f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>{user}"
    return Template(start, header.format("ASSISTANT"), header.format("assistant") + "\n\n", "<|eot_id|>", "\n" + user)


def _phi(system, end):
    assistant, user = f"{end}\n<|assistant|>\n", "\n<|user|>\n"
    return Template(f"<|system|>\n{system}{end}{user}", assistant, assistant, end, user)


_TEMPORAL = (
    "The assistant specialized in comparing Chest X-ray images, identifying differences, and noting temporal changes."
)
_USER = "A chat between a curious user and an artificial intelligence assistant. "
_POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_VISUAL = (
    "able to understand the visual content that the user provides, and assist the user with a variety of "
    "tasks using natural language."
)
_MMTAG = (
    f"{_USER}The assistant is {_VISUAL}"
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_PRETRAIN = (
    "Chest X-ray interpretation task. The input consists of a current chest radiograph, optionally paired with a "
    "prior image or clinically similar reference. The model should identify radiologically significant abnormalities, "
    "detect and describe temporal changes or differences, and answer clinically relevant visual questions. Depending "
    "on the task, the output may be a structured Findings or Impression section focusing on critical observations, or "
    "a concise answer to a specific query. All outputs must follow radiological reporting standards and employ "
    "professional clinical terminology."
)
_FINETUNE = (
    "Generate the 'Findings' section of a radiology report for a chest X-ray examination. Describe all clinically "
    "significant normal and abnormal findings using concise, structured, and professional medical language. If a prior "
    "image is available, incorporate relevant temporal comparisons, noting any improvements, worsening, or stability. "
    "Avoid referencing prior studies unless they are explicitly provided or clinically necessary to explain the "
    "current condition."
)
_HONEST = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature. If a question does not make any "
    "sense, or is not factually coherent, explain why instead of answering something not correct. If you don't know "
    "the answer to a question, please don't share false information."
)
_HELPFUL = f"You are a helpful language and vision assistant. You are {_VISUAL}"
_LLAVA_MED = (
    "You are LLaVA-Med, a large language and vision assistant trained by a group of researchers at Microsoft, based on "
    "the general domain LLaVA architecture.\nYou are able to understand the visual content that the user provides, and "
    "assist the user with a variety of medical and clinical research tasks using natural language.\nFollow the "
    "instructions carefully and explain your answers in detail"
)
_SYS = "<<SYS>>\n{}\n<</SYS>>\n\n"
_SUCCINCT = (
    "when necessary. However, if a question is simple and can be answered with a single word (e.g., yes or no), please "
    "provide only a succinct response without additional explanation."
)

TEMPLATES = {
    "default": _vicuna(_TEMPORAL),
    "v1": _vicuna(_USER + _POLITE.format("user")),
    "vicuna_v1": _vicuna(_USER + _POLITE.format("user")),
    "plain": Template("", "\n", "", "\n", "", stop="\n", drops_question=True),
    "libra_v0": _vicuna(_USER.replace("user", "human") + _POLITE.format("human"), stop="###"),
    "libra_v1": _vicuna(_TEMPORAL),
    "libra_v1.5_pretrain": _vicuna(_PRETRAIN),
    "libra_v1.5_finetune": _vicuna(_FINETUNE),
    "libra_v1.5_phi4_pretrain": _phi(_PRETRAIN, "<|endoftext|>"),
    "libra_v1.5_phi4_finetune": _phi(_FINETUNE, "<|endoftext|>"),
    "libra_v0_mmtag": Template(f"{_MMTAG}###Human: ", "###Assistant:", "###Assistant: ", "###", "Human: "),
    "libra_v1_mmtag": _vicuna(_MMTAG),
    "llama_2": _llama_2(_SYS.format(_HONEST)),
    "libra_llama_2": _llama_2(_SYS.format(_HELPFUL)),
    "llama_3": _llama_3(_HONEST),
    "libra_llama_3": _llama_3(_HELPFUL + _TEMPORAL),
    "qwen": _chatml("You are a helpful AI assistant.", between="\n", line=""),
    "mpt": _chatml(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    "conv_gemma": Template(
        "<end_of_turn>\n<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>", "<start_of_turn>user\n",
        after="\n", stop="<end_of_turn>\n",
    ),
    "conv_phi3": _phi("You are a helpful AI assistant.", "<|end|>"),
    "mistral_instruct": _llama_2("", "</s>", "[INST] "),
    "mistral_direct": _chatml("Answer the questions."),
    "llava_med_v1.5_mistral_7b": _llama_2("", "</s>", "[INST] "),
    "llava_med_v1.5_mistral_7b_v0": _llama_2(
        _SYS.format(f"{_LLAVA_MED}.\n") + "Hi! [/INST] Hi there!  How can I help you today?\n </s>[INST] ",
        "</s>", "[INST] ",
    ),
    "llava_med_v1.5_mistral_7b_v1": _llama_2(_SYS.format(f"{_LLAVA_MED} {_SUCCINCT}\n"), "</s>", "[INST] "),
    "maira_2": _vicuna(
        "You are an expert radiology assistant tasked with interpreting a chest X-ray study. "
        "Given the current frontal image only."
    ),
}  # fmt: skip


def find_template(name: str) -> Template:
    if name not in TEMPLATES:
        nearest = difflib.get_close_matches(name, TEMPLATES, 1, 0)[0]
        raise ValueError(
            f"no conversation template {name!r}; did you mean {nearest!r}? There are: {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def template_of(config: dict, tokenizer: Tokenizer) -> str:
    """The name of a checkpoint's conversation template: what it records, else its family's."""
    model_type = config.get("model_type", "")
    recorded = config.get("mm_conversation_template")
    rules = (
        (recorded, recorded),
        ("maira_2", config.get("use_maira_feature_norm")),
        ("v1", config.get("mm_vision_tower_config")),
        ("llava_med_v1.5_mistral_7b", model_type == "libra_mistral"),
        ("qwen", model_type.startswith("libra_qwen")),
        ("conv_phi3", model_type == "libra_phi3"),
        ("conv_gemma", model_type == "libra_gemma"),
        ("libra_llama_3", tokenizer.backend.token_to_id("<|start_header_id|>") is not None),
        ("libra_v1", config.get("mm_projector_type") == "TAC"),
        ("libra_v0", True),
    )
    return next(name for name, applies in rules if applies)


@dataclass(frozen=True)
class Prompt:
    """A conversation, rendered. labels[i]: whether ids[i] belongs to an answer or closes it."""

    text: str
    ids: list[int]
    labels: list[bool]


def render(turns: list[tuple[str, str | None]], template: Template, tokenizer: Tokenizer) -> Prompt:
    """A conversation [(question, answer), …] -> text, ids (the image as one IMAGE) and labels.

    An answer None, in the last turn only, leaves the prompt open for generation. "<image>" stands for the image,
    at most once. Labels cover each answer and its closing separator, not the header before nor the line break
    behind. The text is cut at the image and each part tokenized alone, as published: part 0 is kept unchanged
    (Llama 3 keeps two bos: the template's and the tokenizer's), later parts lose their bos.
    """
    text, answers = "", []  # answers: [(first character, behind the last)]
    for number, (question, answer) in enumerate(turns):
        if template.drops_question and answer is not None:
            question = IMAGE_TEXT if IMAGE_TEXT in question else ""
        text += (template.next if number else template.start) + question
        if answer is None:
            text += template.open
            break
        text += template.answer
        answers.append((len(text), len(text) + len(answer + template.end)))
        text += answer + template.end + template.after
    chunks = text.split(IMAGE_TEXT)
    if len(chunks) > 2:
        raise ValueError(f"{IMAGE_TEXT} stands {len(chunks) - 1} times in a conversation: it has a place for one image")
    ids, labels, offset = [], [], 0
    for number, chunk in enumerate(chunks):
        chunk_ids, spans = tokenizer.encode_with_offsets(chunk)
        if number:
            ids.append(IMAGE)
            labels.append(False)
            if ids[0] == tokenizer.bos_token_id:
                chunk_ids, spans = chunk_ids[1:], spans[1:]
        ids += chunk_ids
        for start, end in spans:
            labels.append(any(first < offset + end and offset + start < last for first, last in answers))
        offset += len(chunk) + len(IMAGE_TEXT)
    return Prompt(text, ids, labels)
