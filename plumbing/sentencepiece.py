"""A SentencePiece `tokenizer.model` -> a BPE of the `tokenizers` library that gives the same ids."""

import math
import re
import struct
from collections import namedtuple
from dataclasses import dataclass
from io import BytesIO

import tokenizers
from tokenizers import AddedToken, models, normalizers, processors

from plumbing.fields import check_fields, check_value
from plumbing.files import check_readable, read_json_if_present

# These kinds and the numbers of fields are those of sentencepiece_model.proto in github.com/google/sentencepiece.
KINDS = NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
Piece = namedtuple("Piece", ["text", "score", "kind"])


@dataclass
class TokenFields:
    """What added_tokens_decoder, or a special token of tokenizer_config.json, says about a token."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


def convert_sentencepiece(folder, config, names, legacy):
    """Converts tokenizer.model. Returns (a `tokenizers` BPE that gives the same ids, the pieces by id)."""
    file, config_file = folder / "tokenizer.model", folder / "tokenizer_config.json"
    check_readable(file)
    pieces, byte_fallback = _parse_sentencepiece(file)
    vocab = {piece.text: id for id, piece in enumerate(pieces)}
    if names["unk"] not in vocab:
        raise ValueError(f"{config_file}: unk_token {names['unk']!r} is no piece of {file.name}")

    # 1) SentencePiece merges whichever two neighbours form the piece with the best score. BPE wants the pairs listed:
    # every split of a piece into two pieces, best score first.
    splits = []
    for piece in pieces:
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if piece.kind == NORMAL and left in vocab and right in vocab:
                splits.append((-piece.score, vocab[left], vocab[right]))
    splits.sort()
    merges = [(pieces[left].text, pieces[right].text) for _, left, right in splits]
    options = dict(unk_token=names["unk"], fuse_unk=True, byte_fallback=byte_fallback)
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, **options))

    # 2) "▁" stands for a space. In legacy mode every chunk between special tokens gets one in front.
    prefix = [normalizers.Prepend("▁")] if legacy else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])

    # 3) added tokens: of the config, else of the older added_tokens.json, else the special pieces
    added = {}
    for id, token in config.get("added_tokens_decoder", {}).items():
        if not id.isdecimal() or "content" not in token:
            raise ValueError(f"{config_file}: added_tokens_decoder has {id!r} without an id or a content")
        added[int(id)] = check_fields(token, TokenFields, config_file)
    older_file = folder / "added_tokens.json"
    older = check_value(read_json_if_present(older_file), dict[str, int], "the whole", older_file)
    for text, id in older.items():
        added.setdefault(id, {"content": text})
    for text in vocab.keys() & names.values():
        added.setdefault(vocab[text], {"content": text})

    # in the order of their ids: a token that is no piece gets the next free id
    for id in sorted(added):
        text = added[id]["content"]
        flags = {name: added[id].get(name, False) for name in ("single_word", "lstrip", "rstrip")}
        backend.add_tokens([AddedToken(text, normalized=False, **flags)])
        if backend.token_to_id(text) != id:
            raise ValueError(f"{folder}: the added token {text!r} cannot have id {id}: fetch it again")

    # 4) bos in front of every text
    if config.get("add_bos_token", True):
        bos = names["bos"]
        special = [(bos, backend.token_to_id(bos))]
        if special[0][1] is None:
            raise ValueError(f"{config_file}: bos_token {bos!r} is no token")
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=special)
    return backend, pieces


def _parse_sentencepiece(file):
    """Reads a SentencePiece BPE model. Returns its pieces, and whether unknown characters become bytes."""
    pieces, trainer, normalizer = [], {}, {}
    try:
        for number, value in _protobuf_fields(file.read_bytes()):
            if number == 1:
                # a piece: field 1 is its text, 2 its score, 3 its kind
                fields = dict(_protobuf_fields(value))
                (score,) = struct.unpack("<f", fields[2])
                text = fields[1].decode("utf-8")
                pieces.append(Piece(text, score, kind=fields.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_protobuf_fields(value))
            elif number == 3:
                normalizer = dict(_protobuf_fields(value))
    except (KeyError, ValueError, TypeError, AttributeError, struct.error) as error:  # fields are missing or differ
        raise ValueError(f"{file} is truncated or not a SentencePiece model ({error!r}): fetch it again") from None

    # a model that needs more than the conversion can do would give wrong ids
    texts = {piece.text for piece in pieces}
    is_byte = lambda piece: bool(re.fullmatch("<0x[0-9A-F]{2}>", piece.text))
    needs = {
        "a model type other than BPE": trainer.get(3) != 2,
        "a normalisation table": normalizer.get(2),
        "no dummy prefix": not normalizer.get(3, True),
        "removal of extra whitespace": normalizer.get(4, True),
        "user-defined pieces": any(piece.kind not in KINDS for piece in pieces),
        "no pieces": not pieces,
        "a piece twice": len(texts) < len(pieces),
        "scores that are no numbers": not all(math.isfinite(piece.score) for piece in pieces),
        "bytes under other names": not all(is_byte(piece) for piece in pieces if piece.kind == BYTE),
    }
    unsupported = " and ".join(need for need, is_needed in needs.items() if is_needed)
    if unsupported:
        raise ValueError(f"{file} has {unsupported}, which is not supported: give a tokenizer.json instead")
    return pieces, bool(trainer.get(35))


def _protobuf_fields(data):
    """Yields (field number, int or bytes) of a protobuf message; see protobuf.dev/programming-guides/encoding.

    A field is a key, 8 * number + type, and a value: type 0 is a varint, 1 eight bytes, 5 four bytes, and 2 a varint
    length with as many bytes (text or a message). A varint holds 7 bits a byte, lowest first; bit 8 says "more".
    """
    stream = BytesIO(data)
    while stream.tell() < len(data):
        number, wire_type = divmod(_read_varint(stream), 8)
        if wire_type == 0:
            yield number, _read_varint(stream)
            continue
        size = _read_varint(stream) if wire_type == 2 else {1: 8, 5: 4}[wire_type]
        if size > len(data) - stream.tell():
            raise ValueError("the file ends within a field")
        yield number, stream.read(size)


def _read_varint(stream):
    value, shift, byte = 0, 0, 128
    while byte >= 128:
        # 64 bits take ten bytes
        if shift > 63:
            raise ValueError("a number is too long")
        (byte,) = stream.read(1)  # ValueError at the end of the data
        value |= (byte & 127) << shift
        shift += 7
    return value
