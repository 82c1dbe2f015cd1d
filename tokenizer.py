"""Text <-> ids, and conversations -> prompt ids with a mask of what is learnt.

The `tokenizers` library reads a `tokenizer.json`; an older SentencePiece `tokenizer.model` is converted for it
(plumbing/sentencepiece.py). Templates are data; `render` puts a conversation into one, for inference and
training alike.
"""

import codecs
import difflib
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from plumbing.fields import check_fields, check_value, shorten
from plumbing.files import check_readable, read_json_if_present
from plumbing.sentencepiece import BYTE, convert_sentencepiece

IMAGE = -200  # the image in a list of ids, however many positions it takes; IMAGE_TOKEN_INDEX in the published code
IMAGE_TEXT = "<image>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"  # around the image, if the config sets mm_use_im_start_end


@dataclass
class TokenizerFields:
    """The fields of tokenizer_config.json that count here; null is the same as absent."""

    bos_token: str | dict | None
    eos_token: str | dict | None
    unk_token: str | dict | None
    pad_token: str | dict | None
    additional_special_tokens: tuple[str | dict, ...] | None
    added_tokens_decoder: dict[str, dict]
    clean_up_tokenization_spaces: bool | None
    legacy: bool | None
    add_bos_token: bool | None


class Tokenizer:
    """Converts text to ids and back, exactly as the published code does with the same files.

    len(tokenizer) is the size of the vocabulary with added tokens; bos_token_id is None if there is no such token.
    """

    def __init__(self, folder: Path, sentencepiece_first: bool = False):
        """Reads `tokenizer.json` or `tokenizer.model`; if the folder holds both, sentencepiece_first decides.

        FileNotFoundError if there is neither; ValueError if a file is damaged or not supported.
        """
        folder = Path(folder)
        json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
        uses_model_file = model_file.exists() and (sentencepiece_first or not json_file.exists())
        config_file = folder / "tokenizer_config.json"
        config = read_json_if_present(config_file)
        config |= check_fields(config, TokenizerFields, config_file)
        self.cleans_up = config.get("clean_up_tokenization_spaces") is True

        # 1) the names of the special tokens; Llama's SentencePiece tokenizer has defaults
        defaults = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"} if uses_model_file else {}
        names = {}
        for kind in ("bos", "eos", "unk", "pad"):
            names[kind] = _text_of(config.get(f"{kind}_token"), config_file) or defaults.get(kind)
        more_names = [_text_of(token, config_file) for token in config.get("additional_special_tokens") or ()]

        # 2) the tokenizer itself, from one of the two files
        self.pieces = None  # only a SentencePiece model's are needed, in `decode`
        self.legacy = not uses_model_file or config.get("legacy") is not False
        if uses_model_file:
            self.backend, self.pieces = convert_sentencepiece(folder, config, names, self.legacy)
        elif json_file.exists():
            check_readable(json_file)
            try:
                self.backend = tokenizers.Tokenizer.from_file(str(json_file))
                # a part that names a missing one fails only here
                self.backend.encode("x")
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # the library raises no narrower class, and its panics are no Exception
                raise ValueError(f"{json_file} is not a tokenizer file ({error}): fetch it again") from None
        else:
            raise FileNotFoundError(f"{folder} holds neither tokenizer.json nor tokenizer.model: fetch one")
        # a tokenizer.json may ask for these; here only the caller cuts or pads
        self.backend.no_truncation()
        self.backend.no_padding()

        # 3) the ids of the special tokens
        special = filter(None, [*names.values(), *more_names])
        self.special_ids = set(map(self.backend.token_to_id, special))
        self.bos_token_id = self.backend.token_to_id(names["bos"] or "")

    def __len__(self):
        return self.backend.get_vocab_size(with_added_tokens=True)

    def add_special(self, names: list[str]):
        """Adds special tokens, as published loading does; tokens that exist keep their ids."""
        for name in names:
            self.backend.add_special_tokens([AddedToken(name, normalized=False)])
            self.special_ids.add(self.backend.token_to_id(name))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, with bos in front if the tokenizer adds one."""
        ids, _ = self.encode_with_offsets(text)
        return ids

    def encode_with_offsets(self, text: str):
        """Returns ids and, for each, the characters (from, to) that it stands for.

            No change  ->  <s>     ▁No     ▁change
                           (0, 0)  (0, 2)  (2, 9)
        """
        # half a character, such as a byte of a command line that is no UTF-8
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{shorten(text)} is not valid Unicode: write it in UTF-8")
        if self.legacy or not text:
            encoding = self.backend.encode(text)
            return encoding.ids, encoding.offsets

        # In legacy mode the backend puts a "▁" before every chunk between special tokens. Otherwise only the text as a
        # whole gets one, here; the offsets do not count it. If it stays a token of its own, it stands for the character
        # behind it, as in legacy mode; bos stands for nothing, (0, 0).
        encoding = self.backend.encode("▁" + text.replace("▁", " "))
        ids = encoding.ids
        offsets = []
        for start, end in encoding.offsets:
            offsets.append((max(start - 1, 0), max(end - 1, min(end, 1))))

        # `transformers` drops a "▁" that is alone before a special token
        first = 1 if ids[0] == self.bos_token_id else 0
        following = ids[first + 1 : first + 2]
        if encoding.tokens[first] == "▁" and self.special_ids.intersection(following):
            del ids[first], offsets[first]
        return ids, offsets

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids, without special tokens. A byte that is not UTF-8 (yet) becomes one U+FFFD."""
        if self.pieces is None:
            text = self.backend.decode(ids, skip_special_tokens=True)
        else:
            text = self._decode_pieces([id for id in ids if id not in self.special_ids])
        if self.cleans_up:
            # the list of `clean_up_tokenization` in `transformers`
            for before in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
                text = text.replace(before, before.strip())
        return text

    def _decode_pieces(self, ids):
        """Decodes each run of pieces as SentencePiece does; sets added tokens between spaces, as published."""
        texts = []
        for are_pieces, run in groupby(ids, key=lambda id: id < len(self.pieces)):
            if are_pieces:
                texts.append(self._decode_run(run))
            else:
                texts += map(self.backend.id_to_token, run)
        return " ".join(filter(None, texts))

    def _decode_run(self, ids):
        data = b""
        for number, id in enumerate(ids):
            piece = self.pieces[id]
            if piece.kind == BYTE:
                data += bytes.fromhex(piece.text[3:5])  # <0xE2>
                continue
            # the first "▁" is the one that encoding added
            text = piece.text.removeprefix("▁") if number == 0 else piece.text
            data += text.replace("▁", " ").encode()
        return data.decode("utf-8", "one_each")


# Python's handler "replace" writes one U+FFFD for several wrong bytes; SentencePiece writes one for each.
codecs.register_error("one_each", lambda error: ("\ufffd" * (error.end - error.start), error.end))


def _text_of(token, where):
    """A config writes a token as its text or as an object with the text in "content"."""
    if not isinstance(token, dict):
        return token
    return check_value(token.get("content"), str, "the content of a special token", where)


# ---------------------------------------------------------------------------------- conversation templates

@dataclass(frozen=True)
class Template:
    """The strings around questions and answers. In two turns, the second of which still waits for its answer:

        SYSTEM USER: Is it clear? ASSISTANT: Yes.</s>USER: Any effusion? ASSISTANT:
        [start      ]            [answer    ]    [end][next]            [open     ]
    """

    start: str  # before the first question; holds the system prompt
    open: str  # after a question that the model is to answer
    answer: str  # between a question and its answer
    end: str  # closes an answer, and is learnt with it
    next: str  # before every later question
    after: str = ""  # after `end`, and not learnt
    stop: str = ""  # generation ends at this string; "" means `end` without its white space
    drops_question: bool = False  # an answered question shrinks to its image

    def with_system(self, prompt, **changes):
        return replace(self, start=self.start.format(prompt), **changes)


# The styles of the model families; "{}" is the place of the system prompt.
_VICUNA = Template("{} USER: ", open=" ASSISTANT:", answer=" ASSISTANT: ", end="</s>", next="USER: ")
_LLAMA_2 = Template("[INST] {}", open=" [/INST]", answer=" [/INST] ", end=" </s>", next="<s>[INST] ", stop="<s>")
_MISTRAL = replace(_LLAMA_2, next="[INST] ", stop="</s>")
_LLAMA_3 = Template(
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{}"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    open="<|eot_id|>\n<|start_header_id|>ASSISTANT<|end_header_id|>",
    answer="<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>", next="\n<|start_header_id|>user<|end_header_id|>\n\n")  # fmt: skip
_CHATML = Template(
    "<|im_start|>system\n{}<|im_end|><|im_start|>user\n", end="<|im_end|>", next="<|im_start|>user\n",
    open="<|im_end|><|im_start|>assistant\n", answer="<|im_end|><|im_start|>assistant\n")  # fmt: skip
_QWEN = Template(
    "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n", end="<|im_end|>", next="\n<|im_start|>user\n",
    open="<|im_end|>\n<|im_start|>assistant", answer="<|im_end|>\n<|im_start|>assistant\n")  # fmt: skip
_PHI_3 = Template(
    "<|system|>\n{}<|end|>\n<|user|>\n", end="<|end|>", next="\n<|user|>\n",
    open="<|end|>\n<|assistant|>\n", answer="<|end|>\n<|assistant|>\n")  # fmt: skip
_PHI_4 = Template(
    "<|system|>\n{}<|endoftext|>\n<|user|>\n", end="<|endoftext|>", next="\n<|user|>\n",
    open="<|endoftext|>\n<|assistant|>\n", answer="<|endoftext|>\n<|assistant|>\n")  # fmt: skip
_GEMMA = Template(
    "<end_of_turn>\n<start_of_turn>user\n", end="<end_of_turn>", next="<start_of_turn>user\n",
    open="<end_of_turn>\n<start_of_turn>model\n", answer="<end_of_turn>\n<start_of_turn>model\n",
    after="\n", stop="<end_of_turn>\n")  # fmt: skip

# The system prompts.
_TEMPORAL = """\
The assistant specialized in comparing Chest X-ray images, identifying differences, and noting temporal changes."""
_CHAT = "A chat between a curious {0} and an artificial intelligence assistant. "
_POLITE = _CHAT + "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
_HELPFUL = "You are a helpful AI assistant."
_VISUAL = """able to understand the visual content that the user provides, and assist the user with a variety of tasks \
using natural language."""
_VISION = f"You are a helpful language and vision assistant. You are {_VISUAL}"
_MMTAG = f"""{_CHAT.format("user")}The assistant is {_VISUAL}\
The visual content will be provided with the following format: <Image>visual content</Image>."""
_PRETRAIN = """Chest X-ray interpretation task. The input consists of a current chest radiograph, optionally paired \
with a prior image or clinically similar reference. The model should identify radiologically significant \
abnormalities, detect and describe temporal changes or differences, and answer clinically relevant visual questions. \
Depending on the task, the output may be a structured Findings or Impression section focusing on critical \
observations, or a concise answer to a specific query. All outputs must follow radiological reporting standards and \
employ professional clinical terminology."""
_FINETUNE = """Generate the 'Findings' section of a radiology report for a chest X-ray examination. Describe all \
clinically significant normal and abnormal findings using concise, structured, and professional medical language. If \
a prior image is available, incorporate relevant temporal comparisons, noting any improvements, worsening, or \
stability. Avoid referencing prior studies unless they are explicitly provided or clinically necessary to explain the \
current condition."""
_HONEST = """You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being \
safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. \
Please ensure that your responses are socially unbiased and positive in nature. If a question does not make any \
sense, or is not factually coherent, explain why instead of answering something not correct. If you don't know the \
answer to a question, please don't share false information."""
_LLAVA_MED = """You are LLaVA-Med, a large language and vision assistant trained by a group of researchers at \
Microsoft, based on the general domain LLaVA architecture.
You are able to understand the visual content that the user provides, and assist the user with a variety of medical \
and clinical research tasks using natural language.
Follow the instructions carefully and explain your answers in detail"""
_SYS = "<<SYS>>\n{}\n<</SYS>>\n\n"
_SUCCINCT = """when necessary. However, if a question is simple and can be answered with a single word (e.g., yes or \
no), please provide only a succinct response without additional explanation."""
_GREETING = "Hi! [/INST] Hi there!  How can I help you today?\n </s>[INST] "
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_MAIRA = """You are an expert radiology assistant tasked with interpreting a chest X-ray study. Given the current \
frontal image only."""

# The published templates; their strings equal those of conv_templates in the published libra/conversation.py.
TEMPLATES = {
    # the image and the answer alone, to train a connector
    "plain": Template("", open="\n", answer="", end="\n", next="", stop="\n", drops_question=True),
    # Vicuna
    "default": _VICUNA.with_system(_TEMPORAL),
    "v1": _VICUNA.with_system(_POLITE.format("user")),
    "vicuna_v1": _VICUNA.with_system(_POLITE.format("user")),
    "libra_v0": _VICUNA.with_system(_POLITE.format("human"), stop="###"),
    "libra_v1": _VICUNA.with_system(_TEMPORAL),
    "libra_v1.5_pretrain": _VICUNA.with_system(_PRETRAIN),
    "libra_v1.5_finetune": _VICUNA.with_system(_FINETUNE),
    "libra_v1_mmtag": _VICUNA.with_system(_MMTAG),
    "libra_v0_mmtag": Template(f"{_MMTAG}###Human: ", "###Assistant:", "###Assistant: ", end="###", next="Human: "),
    "maira_2": _VICUNA.with_system(_MAIRA),
    # Llama 2 and 3, Mistral
    "llama_2": _LLAMA_2.with_system(_SYS.format(_HONEST)),
    "libra_llama_2": _LLAMA_2.with_system(_SYS.format(_VISION)),
    "llama_3": _LLAMA_3.with_system(_HONEST),
    "libra_llama_3": _LLAMA_3.with_system(_VISION + _TEMPORAL),
    "mistral_instruct": _MISTRAL.with_system(""),
    "mistral_direct": _CHATML.with_system("Answer the questions."),
    "llava_med_v1.5_mistral_7b": _MISTRAL.with_system(""),
    "llava_med_v1.5_mistral_7b_v0": _MISTRAL.with_system(_SYS.format(f"{_LLAVA_MED}.\n") + _GREETING),
    "llava_med_v1.5_mistral_7b_v1": _MISTRAL.with_system(_SYS.format(f"{_LLAVA_MED} {_SUCCINCT}\n")),
    # MPT, Qwen, Phi, Gemma
    "mpt": _CHATML.with_system(_MPT),
    "qwen": _QWEN.with_system(_HELPFUL),
    "conv_phi3": _PHI_3.with_system(_HELPFUL),
    "libra_v1.5_phi4_pretrain": _PHI_4.with_system(_PRETRAIN),
    "libra_v1.5_phi4_finetune": _PHI_4.with_system(_FINETUNE),
    "conv_gemma": _GEMMA,
}


def find_template(name: str) -> Template:
    """Returns a template by its name. ValueError, with the nearest name, if there is none."""
    if name not in TEMPLATES:
        (nearest,) = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0)
        raise ValueError(f"no template {name!r}; did you mean {nearest!r}? There are: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def template_of(config: dict, tokenizer: Tokenizer) -> str:
    """Returns the name of a checkpoint's template: what its config.json records, else the first rule that applies."""
    recorded = config.get("mm_conversation_template")
    model_type = config.get("model_type", "")
    rules = (
        ("maira_2", config.get("use_maira_feature_norm")),
        ("v1", config.get("mm_vision_tower_config")),
        ("llava_med_v1.5_mistral_7b", model_type == "libra_mistral"),
        ("qwen", model_type.startswith("libra_qwen")),
        ("conv_phi3", model_type == "libra_phi3"),
        ("conv_gemma", model_type == "libra_gemma"),
        # in the Llama family only Llama 3 has this token
        ("libra_llama_3", tokenizer.backend.token_to_id("<|start_header_id|>") is not None),
        ("libra_v1", config.get("mm_projector_type") == "TAC"),
    )
    return recorded or next((name for name, applies in rules if applies), "libra_v0")


# ------------------------------------------------------------------------------------------------- prompts

@dataclass(frozen=True)
class Prompt:
    """A rendered conversation. mask[i] tells whether ids[i] is learnt: part of an answer, or of what closes it."""

    text: str
    ids: list[int]
    mask: list[bool]


def render(
    turns: list[tuple[str, str | None]],
    template: Template,
    tokenizer: Tokenizer,
    image_text: str = IMAGE_TEXT,
) -> Prompt:
    """Turns a conversation, [(question, answer), ...], into text, ids and a mask of what is learnt.

    image_text: what a prompt has for the "<image>" of a question, `Libra.image_text`.

        text    SYSTEM USER: <image>\\nIs it clear? ASSISTANT: Yes.</s>
        tokens  ...  :  IMAGE  ...  ▁clear  ?  ▁A  SS  IST  ANT  :  ▁Yes  .  </s>
        mask         0    0           0     0   0   0   0    0   0   1    1   1

    A token is learnt if one of its characters is part of an answer, of the space before it, or of the `end` that
    closes it. An answer None, in the last turn only, leaves the prompt open. ValueError if "<image>", which stands for
    both images, occurs twice.
    """
    # 1) join the turns; remember which characters are learnt, by their positions in the text
    text, learnt = "", set()
    for number, (question, answer) in enumerate(turns):
        text += template.start if number == 0 else template.next
        # an image without a question has no marks, as published (preprocess_plain in libra/train/train.py)
        if template.drops_question and answer is not None:
            question = IMAGE_TEXT if IMAGE_TEXT in question else ""
        else:
            question = question.replace(IMAGE_TEXT, image_text)
        if answer is None:
            text += question + template.open
            break
        # An open prompt ends before the space of "ASSISTANT: ". So the model has to write that space where it is a
        # token of its own, as before a digit: "▁", "3", … Elsewhere it is part of the answer's first token.
        text += question + template.answer
        begin = len(text) - len(template.answer) + len(template.answer.rstrip(" "))
        text += answer + template.end
        learnt.update(range(begin, len(text)))
        text += template.after

    # 2) tokenize what is before and after the image, each alone: tokenizer_image_token in libra/mm_utils.py
    chunks = text.split(IMAGE_TEXT)
    if len(chunks) > 2:
        raise ValueError(f"{IMAGE_TEXT} occurs {len(chunks) - 1} times in a conversation, which can show one image")
    ids, mask, start = [], [], 0
    for number, chunk in enumerate(chunks):
        chunk_ids, offsets = tokenizer.encode_with_offsets(chunk)
        if number > 0:
            ids.append(IMAGE)
            mask.append(False)
            # only the first chunk keeps the bos that the tokenizer adds (Llama 3's then has two, one of the template)
            if ids[0] == tokenizer.bos_token_id:
                del chunk_ids[0], offsets[0]

        # 3) a token is learnt if one of its characters is
        ids += chunk_ids
        for first, end in offsets:
            characters = range(start + first, start + end)
            mask.append(not learnt.isdisjoint(characters))
        start += len(chunk) + len(IMAGE_TEXT)
    return Prompt(text, ids, mask)
