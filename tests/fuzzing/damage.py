"""Ways to damage a file, for the fuzzer. Each draws one way, changes the file, and says in words what it did."""

import io
import json
import os
import random
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

DEEP = "[" * 100_000 + "]" * 100_000
# what a field of a JSON file becomes; in words -> as it is written in the file
VALUES = {
    "null": "null",
    "a text": '"x"',
    "an empty text": '""',
    "a list": "[1]",
    "an empty list": "[]",
    "an object": '{"a": 1}',
    "true": "true",
    "-1": "-1",
    "0": "0",
    "0.5": "0.5",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "100,000": "100000",
    "1e30": "1e30",
    "10**400": "1" + "0" * 400,
    "nested 100,000 deep": DEEP,
    "a path that climbs": '"../../x"',
    "a lone surrogate": '"\\ud800"',
    "a text with a null character": '"a\\u0000b"',
    "a long text": '"' + "x" * 100_000 + '"',
}
# what a line of a text file becomes
LINES = {
    "one letter": b"x",
    "one digit": b"5",
    "null": b"null",
    "a list": b"[]",
    "an empty object": b"{}",
    "a torn object": b'{"id": "a", "image',
    "no UTF-8": b'{"id": "\xff\xfe"}',
    "zeros": b"\0" * 100,
    "blanks": b"   ",
    "nested deeply": DEEP.encode(),
    "a quote": b'"',
    "many commas": b"," * 1000,
    "a long line": b"y" * 10**6,
}
# what a whole file becomes
CONTENTS = {
    "empty": b"",
    "a line break": b"\n",
    "binary": bytes(range(256)) * 20,
    "an HTML page": b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n",
    "null": b"null",
    "a number": b"7",
    "an empty list": b"[]",
    "an empty object": b"{}",
    "nested deeply": DEEP.encode(),
    "objects nested deeply": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
}
MARK = "@DAMAGE@"


class Damage(NamedTuple):
    """What was done. never_fits: a program that accepts the file must give what it gives for the undamaged one."""

    text: str
    never_fits: bool = False


def damage(draw: random.Random, path: Path) -> Damage:
    """Damages a file in a way that suits its kind, or as a whole."""
    if draw.random() < 0.12:
        return damage_whole(draw, path)
    ways = {
        ".json": [damage_json] * 6 + [damage_bytes],
        ".jsonl": [damage_lines],
        ".csv": [damage_lines],
        ".txt": [damage_lines, damage_bytes],
        ".safetensors": [damage_header, damage_header, damage_tensors, damage_tensors, damage_bytes],
        ".bin": [damage_bin, damage_bin, damage_bytes],
    }
    suffix = ".jsonl" if is_jsonl(path) else path.suffix
    if suffix == ".bin" and not zipfile.is_zipfile(path):
        suffix = ""  # not of torch.save
    return draw.choice(ways.get(suffix, [damage_bytes]))(draw, path)


def is_jsonl(path: Path) -> bool:
    """Whether a file has JSON lines, as parts of such a file have, too: .answers.jsonl.0."""
    return ".jsonl" in path.name and path.suffix != ".json"


def damage_whole(draw: random.Random, path: Path) -> Damage:
    """The file becomes something else."""
    ways = [*CONTENTS, "removed", "a folder", "a pipe", "a link to itself", "5 GB of zeros", "cut", "with a BOM"]
    way, data = draw.choice(ways), path.read_bytes()
    path.unlink()
    if way in CONTENTS:
        path.write_bytes(CONTENTS[way])
    elif way == "a folder":
        path.mkdir()
    elif way == "a pipe":
        os.mkfifo(path)
    elif way == "a link to itself":
        path.symlink_to(path.name)
    elif way == "5 GB of zeros":
        # it takes no place on the disk
        path.touch()
        os.truncate(path, 5 * 2**30)
    elif way == "cut":
        path.write_bytes(data[: draw.randrange(len(data) + 1)])
    elif way == "with a BOM":
        path.write_bytes(b"\xef\xbb\xbf" + data)
    return Damage(f"{path.name} is {way}", never_fits=way not in ("removed", "an empty object"))


def damage_json(draw: random.Random, path: Path) -> Damage:
    """A field somewhere in a JSON file."""
    value, place, fits = _damage_value(draw, json.loads(path.read_bytes()))
    path.write_text(value)
    return Damage(f"{path.name}: {place}", never_fits=not fits)


def _damage_value(draw: random.Random, json_value) -> tuple[str, str, bool]:
    """Returns a damaged JSON text, where it is damaged, and whether the new value could be meant."""
    # 1) descend to a field
    whole = [json_value]
    holder, key, name = whole, 0, "the whole"
    while isinstance(holder[key], dict | list) and holder[key] and (holder is whole or draw.random() < 0.7):
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        name += f".{key}"

    # 2) change it
    way, old = draw.choice([*VALUES, "left out", "misspelt"]), holder[key]
    if way in VALUES or holder is whole:
        holder[key] = MARK
    else:
        del holder[key]
        if way == "misspelt" and isinstance(holder, dict):
            holder[f"{key}x"] = old
    text = json.dumps(whole[0]).replace(json.dumps(MARK), VALUES.get(way, ""))
    return text, f"{name.removeprefix('the whole.')} is {way}", way not in VALUES or _fits(old, way)


def _fits(old, way: str) -> bool:
    """Whether a value could be meant in place of the old one, as far as its type goes."""
    if old is None or way == "null":
        return True
    if way in ("NaN", "Infinity", "10**400", "nested 100,000 deep"):
        return False
    new = json.loads(VALUES[way])
    is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    return type(new) is type(old) or (is_number(new) and is_number(old))


def damage_lines(draw: random.Random, path: Path) -> Damage:
    """A line, or a field of a line, of JSONL, CSV or plain text."""
    lines = path.read_bytes().splitlines() or [b""]
    number = draw.randrange(len(lines))
    ways = ["field"] * 6 + ["replaced", "inserted", "twice", "missing", "torn", "split", "no line break", "bytes"]
    way = draw.choice(ways)
    # another byte may make another text, and a last line is whole without its break
    fits = way in ("field", "bytes", "no line break")
    if way == "field" and is_jsonl(path) and lines[number].strip():
        text, place, fits = _damage_value(draw, json.loads(lines[number]))
        lines[number] = text.encode(errors="surrogatepass")
        way = place
    elif way == "field":
        cells = lines[number].split(b",")
        cell = draw.randrange(len(cells))
        content = draw.choice([*LINES, "-1", "1e30", "99999999"])
        cells[cell] = LINES.get(content, content.encode())
        lines[number], way = b",".join(cells), f"cell {cell + 1} is {content}"
    elif way in ("replaced", "inserted"):
        content = draw.choice(list(LINES))
        lines[number : number + (way == "replaced")] = [LINES[content]]
        way = f"{way} by {content}"
    elif way == "twice":
        lines.insert(number, lines[number])
    elif way == "missing":
        del lines[number]
    elif way == "torn":
        del lines[number + 1 :]
        lines[number] = lines[number][: draw.randrange(len(lines[number]) + 1)]
    elif way == "split":
        middle = draw.randrange(len(lines[number]) + 1)
        lines[number : number + 1] = [lines[number][:middle], lines[number][middle:]]
    elif way == "bytes":
        lines[number] = _flip(draw, lines[number])
    end = b"" if way == "no line break" else b"\n"
    path.write_bytes(b"\n".join(lines) + end)
    return Damage(f"{path.name} line {number + 1}: {way}", never_fits=not fits)


def damage_bytes(draw: random.Random, path: Path) -> Damage:
    """Some bytes are flipped, left out, repeated or cut off."""
    data = path.read_bytes()
    place = draw.randrange(len(data) + 1)
    if draw.random() < 0.5:
        # headers are at the front
        place = draw.randrange(min(len(data), 200) + 1)
    length = draw.choice([1, 4, 16, 1000])
    way = draw.choice(["flipped", "flipped", "left out", "repeated", "cut off", "ones", "zeros"])
    head, middle, tail = data[:place], data[place : place + length], data[place + length :]
    middle = {
        "flipped": _flip(draw, middle),
        "left out": b"",
        "repeated": middle * 3,
        "cut off": b"",
        "ones": b"\xff" * len(middle),
        "zeros": b"\0" * len(middle),
    }[way]
    path.write_bytes(head + middle + (b"" if way == "cut off" else tail))
    return Damage(f"{path.name}: {length} bytes from {place} {way}")


def _flip(draw: random.Random, data: bytes) -> bytes:
    return bytes(byte ^ (1 << draw.randrange(8)) for byte in data)


# ------------------------------------------------------------------------------------------ weights


def damage_header(draw: random.Random, path: Path) -> Damage:
    """The JSON header of a .safetensors file: a field, or some bytes."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, fits = data[8 : 8 + size], False
    way = draw.choice(["field", "field", "bytes", "length"])
    if way == "field":
        text, way, fits = _damage_value(draw, json.loads(header))
        header = text.encode()
        size = len(header)
    elif way == "bytes":
        place = draw.randrange(len(header))
        header = header[:place] + _flip(draw, header[place : place + 1]) + header[place + 1 :]
        way = f"byte {place} flipped"
    else:
        size = draw.choice([0, 1, size - 1, 2**40, 2**63, 2**64 - 1])
        way = f"length {size}"
    path.write_bytes(struct.pack("<Q", size) + header + data[8 + struct.unpack("<Q", data[:8])[0] :])
    return Damage(f"{path.name} header: {way}", never_fits=not fits)


DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint8, torch.bool,
          torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64)  # fmt: skip


def damage_tensors(draw: random.Random, path: Path) -> Damage:
    """Valid files of other tensors."""
    tensors = load_file(path)
    text, fits = _damage_tensors(draw, tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return Damage(f"{path.name}: {text}", never_fits=not fits)


def _damage_tensors(draw: random.Random, tensors: dict) -> tuple[str, bool]:
    """Changes one tensor, or all. Returns what was done, and whether it could be meant."""
    if not tensors:
        tensors["model.one_more.weight"] = torch.zeros(2)
        return "one more", False
    name = draw.choice(list(tensors))
    way = draw.choice(["NaN", "infinite", "type", "all types", "longer", "flat", "turned", "empty", "scalar", "missing",
                       "misspelt", "all missing", "one more"])  # fmt: skip
    old = tensors[name].clone()
    floating = old.is_floating_point()
    if way in ("NaN", "infinite") and floating and old.numel():
        old.view(-1)[draw.randrange(old.numel())] = float("nan" if way == "NaN" else "inf")
    elif way == "type":
        kind = draw.choice(DTYPES)
        old, way = old.to(kind), f"type {kind}"
        floating = kind.is_floating_point
    elif way == "all types":
        kind = draw.choice(DTYPES)
        tensors |= {name: tensor.to(kind) for name, tensor in tensors.items()}
        return f"all tensors have the type {kind}", kind.is_floating_point
    elif way == "longer":
        old = torch.cat([old.view(-1), torch.zeros(1, dtype=old.dtype)])
    elif way == "flat":
        old = old.reshape(-1)
    elif way == "turned":
        old = old.flip(0).T if old.dim() == 2 else old
    elif way == "empty":
        old = old.reshape(-1)[:0]
    elif way == "scalar":
        old = torch.tensor(1.0)
    elif way == "all missing":
        tensors.clear()
        return "no tensor", False
    if way in ("missing", "misspelt"):
        del tensors[name]
    if way == "misspelt":
        name += "x"
    if way == "one more":
        tensors["model.one_more.weight"] = torch.zeros(2)
    elif way != "missing":
        tensors[name] = old
    # a square matrix that is turned is a matrix like any other
    return f"{name} is {way}", way == "turned" or (way.startswith("type") and floating)


def damage_bin(draw: random.Random, path: Path) -> Damage:
    """A file of torch.save."""
    tensors, fits = torch.load(path, weights_only=True), False
    way = draw.choice(["tensors", "tensors", "tensors", "compressed", "old format", "a list", "a number in it", "code"])
    if way == "tensors":
        way, fits = _damage_tensors(draw, tensors)
        # an adapter without a connector has such a file
        fits = fits or (not tensors and path.name == "non_lora_trainables.bin")
    if way == "a list":
        tensors = list(tensors.values())
    elif way == "a number in it":
        tensors["x"] = 3
    elif way == "code":
        tensors["x"] = Path("x")  # pickle would import pathlib
    torch.save(tensors, path, _use_new_zipfile_serialization=way != "old format")
    if way == "compressed":
        compress(path)
    return Damage(f"{path.name}: {way}", never_fits=not fits)


def compress(path: Path):
    """The same zip file, deflated."""
    data = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    path.write_bytes(data.getvalue())
