"""What a user asks about (`Study`), record files -> batches (`TrainingSet`), and the plan of steps (`StepLoader`).

    record file --Records--> dict --Record.parse--> Record --encode, share_prefix--> Row --collate--> Batch
"""

import itertools
import json
import math
import mmap
import os
import signal
import sys
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, DataLoader

from plumbing.cli import warn
from plumbing.distributed import World
from plumbing.fields import Range, check_value, shorten
from plumbing.files import check_readable
from plumbing.image import load_image
from plumbing.pixels import PixelConfig, frame, normalise
from tokenizer import IMAGE, IMAGE_TEXT, Template, Tokenizer, render

FINDINGS_PROMPT = "Provide a detailed description of the findings in the radiology image."  # as published
ignore = lambda *arguments: None  # a callback for whoever does not need one


def tell(message: str):
    """Prints one line on stderr, by the first of torchrun's processes alone."""
    if os.environ.get("RANK", "0") == "0":
        warn(Path(sys.argv[0]).name, message)


@dataclass(frozen=True)
class Study:
    """What a user gives: a current image, the patient's prior image or None, and a question about them."""

    # an image is a path, an http(s) address, a PIL image, or the bytes of an image file
    current: str | Path | Image.Image | bytes
    prior: str | Path | Image.Image | bytes | None = None
    query: str = FINDINGS_PROMPT
    # sampling draws by it, not by what else is in the batch; None: by the study's place in the list
    id: str | None = None

    def images(self, dicom_display: str = "standard"):
        """Opens the PIL images, in mode RGB: [current, prior], or [current] if there is no prior."""
        return [load_image(image, dicom_display) for image in (self.current, self.prior) if image is not None]


RECORD_BYTES = 2**24  # the longest record: a conversation about two images has a few thousand


class Records:
    """The raw records of a file: a JSON list of objects, or JSONL (one object per line)."""

    def __init__(self, path):
        """Raises ValueError if the file is empty or a broken JSON list. A broken line is found when it is read."""
        self.path = Path(path)
        self.starts = array("q")
        self.numbers = array("q")
        check_readable(self.path)
        with open(self.path, "rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            if not head:
                raise ValueError(f"{self.path} is empty: give a JSON list of records, or one JSON object per line")
            file.seek(0)
            if head.startswith(b"["):
                # a list has to be parsed whole; its records stay in memory, as JSONL
                self.unit = "record"
                records = self._parse(file.read(), self.path)
                try:
                    self.lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
                except RecursionError:
                    raise ValueError(f"{self.path} is nested too deeply") from None
            else:
                # JSONL stays on disk, so that millions of records cost a worker process little memory
                self.unit = "line"
                self.lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # note where each record starts, and the number of its line; empty lines are no records
        start = number = 0
        while start < len(self.lines):
            number += 1
            end = self._line_end(start)
            if self.lines[start : min(end, start + 3)].strip(b"\r\n"):
                self.starts.append(start)
                self.numbers.append(number)
            start = end
        self.starts.append(start)

    def _line_end(self, start: int) -> int:
        for place in range(start, len(self.lines), RECORD_BYTES):
            end = self.lines.find(b"\n", place, place + RECORD_BYTES)
            if end >= 0:
                return end + 1
            # pages of a mapped file count as memory until they are given back, and this line may have gigabytes
            if isinstance(self.lines, mmap.mmap):
                self.lines.madvise(mmap.MADV_DONTNEED)
        return len(self.lines)

    # a worker process opens the file itself instead of receiving its content
    def __reduce__(self):
        return Records, (self.path,)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        """Parses one record, a dict. Raises ValueError with its place if it is not a JSON object."""
        start, end, place = self.starts[index], self.starts[index + 1], self.place(index)
        if end - start > RECORD_BYTES:
            raise ValueError(f"{place} is too long for a record: {end - start:,} bytes")
        line = self.lines[start:end].rstrip(b"\r\n")
        record = self._parse(line, place)
        if not isinstance(record, dict):
            raise ValueError(f"{place} is not a JSON object")
        # JSON can escape half of a character beyond U+FFFF, such as "\ud83e", which no tokenizer and no file can hold
        if rb"\ud" in line.lower():
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except (UnicodeEncodeError, RecursionError):
                raise ValueError(f"{place} holds half a character (a lone surrogate)") from None
        return record

    def place(self, index: int) -> str:
        return f"{self.path} {self.unit} {self.numbers[index]}"

    def _parse(self, text, place):
        try:
            return json.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is not JSON: {error}") from None


# In the messages below, what is before the first ": " is the reason by which `check` counts the records it leaves out.
REFERENCES = ("reference", "findings", "impression", "reference_report")  # the first with a value is the reference


def value_of(raw: dict, name: str, hint):
    """A field of a raw record, None if it is absent. Raises ValueError unless it has this type."""
    return check_value(raw.get(name), hint, name, f"{name} has the wrong type")


def image_names(raw: dict) -> list[str]:
    """The image names of a raw record: [current, prior], [current], or [] for text alone. Raises ValueError."""
    names = value_of(raw, "image", str | Annotated[list[str], Range(0, 2)] | None) or []
    if isinstance(names, str):
        names = [names]
    if not all(names):
        raise ValueError("image holds an empty name")
    # two equal names become one: without a prior, the model uses the current image twice anyway
    return list(dict.fromkeys(names))


def turns_of(raw: dict) -> list[tuple[str, str | None]]:
    """The turns of a raw record, [(question, answer), …]; the last answer may be None. Raises ValueError."""
    messages = value_of(raw, "conversations", list[dict])
    # what gpt says before the first question is left out, as published (libra/train/train.py, preprocess_libra)
    if messages and messages[0].get("from") == "gpt":
        messages = messages[1:]
    speakers = [message.get("from") for message in messages]
    in_turn = [("human", "gpt")[number % 2] for number in range(len(messages))]
    if not messages or speakers != in_turn:
        raise ValueError(f"human and gpt do not speak in turn: {shorten(speakers)}")
    texts = [value_of(message, "value", str) for message in messages]
    return list(itertools.zip_longest(texts[::2], texts[1::2]))


class Record(NamedTuple):
    """A training record: a conversation, about images or not."""

    id: str | int | None  # only for messages; many published records have none
    images: list[str]  # as `image_names`; [] if no question shows them
    turns: list[tuple[str, str]]  # (question, answer); with images, one question starts with "<image>"

    @classmethod
    def parse(cls, raw: dict) -> "Record":
        """Raises ValueError that says what is wrong with the record.

        A record that the published code (libra/train/train.py) takes in a clear way is taken in the same way. It
        teaches nothing where an answer is empty or the last one is missing.
        """
        images, turns = image_names(raw), turns_of(raw)
        questions = [question for question, _ in turns]
        answers = [answer for _, answer in turns]
        # 1) every answer is text to learn
        if answers[-1] is None:
            raise ValueError("the last question has no answer")
        if not all(answer.strip() for answer in answers):
            raise ValueError("an answer is empty")
        if any(IMAGE_TEXT in answer for answer in answers):
            raise ValueError(f"an answer contains {IMAGE_TEXT}")
        # 2) one question shows the images; if none does, the conversation is text alone, as published
        showing = [number for number, question in enumerate(questions) if IMAGE_TEXT in question]
        if len(showing) > 1:
            raise ValueError(f"several questions contain {IMAGE_TEXT}")
        if showing and not images:
            raise ValueError(f"a question contains {IMAGE_TEXT}, but image names none")
        if not showing:
            images = []
        # 3) "<image>" moves to the front of its question, once, as published (preprocess_multimodal)
        for number in showing:
            text = questions[number].replace(IMAGE_TEXT, "").strip()
            questions[number] = f"{IMAGE_TEXT}\n{text}".strip()
        id = raw.get("id") if isinstance(raw.get("id"), str | int) else None
        return cls(id, images, list(zip(questions, answers, strict=True)))

    @property
    def starts_with_image(self):
        return self.turns[0][0].startswith(IMAGE_TEXT)


class Question(NamedTuple):
    """A line of a question file, or a training record read as one: its first question, and the answer as reference."""

    id: str | int
    images: list[str]
    text: str
    reference: str | None  # the report to compare an answer with

    @classmethod
    def parse(cls, raw: dict) -> "Question":
        """Raises ValueError that says what is wrong with the line."""
        images = image_names(raw)
        if not images:
            raise ValueError("there is no image")
        if "conversations" in raw:
            text, reference = turns_of(raw)[0]
        else:
            text = value_of(raw, "text", str)
            field = next((field for field in REFERENCES if raw.get(field) is not None), REFERENCES[0])
            reference = value_of(raw, field, str | None)
        # a prompt has "<image>" in front of the text; LLaVA-Med's question files have it in the text
        if IMAGE_TEXT in text:
            text = text.replace(IMAGE_TEXT, "").strip()
        return cls(question_id(raw), images, text, reference)


def question_id(raw: dict) -> str | int:
    """What answers are matched by: question_id, or the id of a training record. Raises ValueError."""
    for name in ("question_id", "id"):
        if raw.get(name) is not None:
            return value_of(raw, name, str | int)
    raise ValueError("has no question_id")


def check(
    records: Records,
    kind: type,
    find: Callable = ignore,
    progress: Callable = ignore,
    visit: Callable = ignore,
    strict: bool = False,
    tell: Callable = tell,
) -> SimpleNamespace:
    """Parses every record of a file once, as kind `Record` or `Question`, and looks for its images.

    Odd records are left out, and tell(message) says how many and why. The file alone decides, so that every process
    leaves out the same. visit(record) is called for each of the others, progress(done, total) for each record.
    find(name) must raise if an image is missing.

    Raises one ValueError, which lists 20 problems at most, if images are missing or if all records are odd; if strict,
    also if one is.
    """
    ids, images, numbers, reasons = set(), set(), array("q"), Counter()
    odd, lost, alone, unshown = [], [], 0, 0
    for index in range(len(records)):
        progress(index + 1, len(records))
        place = f"{records.unit} {records.numbers[index]}"
        # 1) leave out what cannot be used
        try:
            raw = records[index]
            record = kind.parse(raw)
            # answers are matched to questions by id
            if kind is Question and str(record.id) in ids:
                raise ValueError("its id was there already: answers are matched by ids")
        except ValueError as error:
            problem = str(error).removeprefix(f"{records.place(index)} ")
            reasons[problem.partition(": ")[0]] += 1
            odd.append(f"{place}: {problem}")
            continue
        # of records, duplicates are only counted, and none has to have an id
        ids.add(index if record.id is None else str(record.id))
        # 2) records share images, and looking at a disk is slow
        try:
            for name in record.images:
                if name not in images:
                    images.add(name)
                    find(name)
        except (ValueError, OSError) as error:
            lost.append(f"{place}: {error}")
            continue
        # 3) count what is kept
        numbers.append(index)
        alone += not record.images
        unshown += not record.images and bool(image_names(raw))
        visit(record)

    problems = lost
    if strict or not numbers:
        problems = lost + odd
    if problems:
        raise ValueError(f"{records.path} has problems, {len(problems)} in all: {'; '.join(problems[:20])}")
    if odd:
        counts = ", ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common())
        head = f"{records.path}: {len(odd):,} of {len(records):,} records are left out"
        tell(f"{head}, {counts}; the first: {'; '.join(odd[:5])}")
    if unshown:
        tell(f"{records.path}: {unshown:,} records name images, but no question has {IMAGE_TEXT}: they are text alone")
    # numbers: the records that are kept; duplicates: those of them with an earlier one's id; images: distinct ones;
    # alone: records without an image
    return SimpleNamespace(
        numbers=numbers, odd=len(odd), duplicates=len(numbers) - len(ids), images=len(images), alone=alone
    )


# ------------------------------------------------------------------------------------------ where images are

FRAMES, INDEX = "frames.bin", "index.jsonl"  # the files of an `ImageCache`


class ImageFolder:
    """Images by their names in a folder. config may be None if nobody asks for a frame."""

    def __init__(self, folder, config: PixelConfig | None):
        if not os.path.isdir(folder):
            raise NotADirectoryError(f"no image folder {folder}: check the path")
        self.root = os.path.realpath(folder)
        self.config = config

    def find(self, name: str) -> str:
        """The path of an image. Raises ValueError if it is outside the folder, FileNotFoundError if it is missing."""
        # resolve "..", links and absolute names
        path = Path(os.path.realpath(Path(self.root, name)))
        if not path.is_relative_to(self.root):
            raise ValueError(f"image {name} leads out of the image folder {self.root}: refused")
        if not path.is_file():
            raise FileNotFoundError(f"no image {name} in {self.root}: check the image folder")
        return str(path)

    def frame(self, name: str) -> np.ndarray:
        """The image as the encoder sees it, but not normalised: padded, resized and cropped, uint8 [S, S, 3]."""
        return frame(load_image(self.find(name), self.config.dicom_display), self.config)


class ImageCache:
    """The same frames, made once by `prepare.py cache`."""

    def __init__(self, folder, config: PixelConfig):
        """Raises ValueError if the cache is incomplete or was made with other settings than config's."""
        # frames.bin holds one frame after another, uint8 [S, S] of a grey image and [S, S, 3] of a colour image;
        # index.jsonl holds the settings of the cache, then a line for each frame: its image, channels and CRC-32
        self.folder = Path(folder)
        self.config = config
        index = self.folder / INDEX
        frames = self.folder / FRAMES
        if not index.exists():
            raise FileNotFoundError(f"{self.folder} holds no finished image cache: make one with prepare.py cache")
        check_readable(index)
        check_readable(frames)
        # where each frame is in frames.bin: {image name: (start, end, CRC-32)}
        self.places = {}
        end = 0
        for entry in parse_index(index.read_bytes(), config, index):
            start, end = end, end + entry["channels"] * config.crop**2
            self.places[entry["image"]] = start, end, entry["crc32"]
        if not frames.exists() or frames.stat().st_size < end:
            raise ValueError(f"{frames} is shorter than {INDEX} says: copy it again, or delete both and make them anew")
        # an empty file cannot be mapped, and nobody can ask for a frame of it
        if self.places:
            self.frames = np.memmap(frames, np.uint8, "r")

    # a worker process maps the file itself instead of receiving its content
    def __reduce__(self):
        return ImageCache, (self.folder, self.config)

    def find(self, name: str) -> tuple:
        """Where an image's frame starts and ends, and its CRC-32. Raises FileNotFoundError."""
        if name not in self.places:
            raise FileNotFoundError(f"no image {name} in the cache {self.folder}: run prepare.py cache again")
        return self.places[name]

    def frame(self, name: str):
        start, end, checksum = self.find(name)
        data = self.frames[start:end]
        if zlib.crc32(data) != checksum:
            raise ValueError(f"{self.folder / FRAMES} is damaged at {name}: delete the cache and make it again")
        image = data.reshape(self.config.crop, self.config.crop, -1)  # [S, S, 1 or 3]
        return image.repeat(3 // image.shape[2], axis=2)  # [S, S, 3]


def cache_settings(config: PixelConfig) -> dict:
    """The settings that frames depend on."""
    settings = {"format": 1, "size": config.size, "crop": config.crop, "pad": config.pad}
    # these are written only where they matter
    if config.pad == "mean":
        settings["mean"] = list(config.mean)
    if config.dicom_display != "standard":
        settings["dicom_display"] = config.dicom_display
    for name in ("squash", "rounds"):
        if getattr(config, name):
            settings[name] = True
    return settings


def check_entry(entry):
    """ValueError if a line of a cache's index does not name an image, 1 or 3 channels, and a checksum."""
    fits = isinstance(entry, dict) and isinstance(entry.get("image"), str)
    if not (fits and entry.get("channels") in (1, 3) and type(entry.get("crc32")) is int):
        raise ValueError(f"{shorten(entry)} describes no frame")


def parse_index(data: bytes, config: PixelConfig, path: Path) -> list[dict]:
    """The entries of a cache's index, [{"image", "channels", "crc32"}, …]. Raises ValueError that names `path`."""
    try:
        settings, *entries = map(json.loads, data.splitlines())
        for entry in entries:
            check_entry(entry)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete the cache and make it again") from None
    if settings != cache_settings(config):
        raise ValueError(f"{path} was made with {settings}, not {cache_settings(config)}: use another cache")
    return entries


# ------------------------------------------------------------------------------------------ from a record to a batch

IGNORED = -100  # the label of a position that is not learnt


class Row(NamedTuple):
    """A row of a batch: one record, or several records with the same images after one prefix."""

    ids: list[int]  # the image is one IMAGE; [] if max_length leaves nothing to learn
    # labels[i] is ids[i] if that id is learnt, else IGNORED; the loss compares it with the prediction at i - 1
    labels: list[int]
    segments: list[int]  # as in attention.py: 0 for a shared prefix, then 1, 2, … for the records after it
    pixels: torch.Tensor | None = None  # [2, 3, S, S] (current, prior), or [1, 3, S, S]; None for text alone


def encode(
    record: Record,
    template: Template,
    tokenizer: Tokenizer,
    max_length: int,
    image_text: str = IMAGE_TEXT,
) -> Row:
    """Tokenizes a record: a row of its own, still without pixels. image_text: as for `render`."""
    prompt = render(record.turns, template, tokenizer, image_text)
    labels = [id if learnt else IGNORED for id, learnt in zip(prompt.ids, prompt.mask, strict=True)]
    length = len(labels)
    # the image counts as one id, as published (libra/train/train.py, DataCollatorForSupervisedDataset)
    if length > max_length:
        # end with the last learnt id that fits: in an answer, never in a question
        length = max_length
        while length > 0 and labels[length - 1] == IGNORED:
            length -= 1
    return Row(prompt.ids[:length], labels[:length], segments=[0] * length)


def share_prefix(rows: list[Row]) -> Row:
    """Puts rows that start with the same images in one: the prefix once, then the rest of each row as a segment.

        record 1    A chat. IMAGE  Edema? No.
        record 2    A chat. IMAGE  Nodule? A small one.
        ids         A chat. IMAGE  Edema? No.  Nodule? A small one.
        segments    0  0      0      1     1      2    2   2    2
    """
    # a row alone stays as it is, even an empty one
    rows = [row for row in rows if row.ids] or rows[:1]
    if len(rows) == 1:
        return rows[0]
    prefix = rows[0].ids.index(IMAGE) + 1
    ids = rows[0].ids[:prefix]
    labels = rows[0].labels[:prefix]
    segments = [0] * prefix
    for segment, row in enumerate(rows, 1):
        ids += row.ids[prefix:]
        labels += row.labels[prefix:]
        segments += [segment] * (len(row.ids) - prefix)
    return Row(ids, labels, segments)


class Batch(NamedTuple):
    """B rows, padded on the right to T positions. A study's images take `image_positions` of them."""

    ids: torch.Tensor  # [B, T]; IMAGE at every position of an image, 0 in padding
    labels: torch.Tensor  # [B, T]; IGNORED in padding
    segments: torch.Tensor  # [B, T]; -1 in padding
    positions: torch.Tensor  # [B, T]; see `positions_of`
    pixels: list[torch.Tensor | None]  # of each row
    numbers: Sequence = ()  # the records of each row, as `TrainingSet.batch` was given them


def collate(rows: Sequence[Row], image_positions: int) -> Batch:
    """Pads rows to a batch. Rows without ids are left out."""
    rows = [row for row in rows if row.ids]
    # if no row is left, the model can still run the batch: padding has a loss of 0 and gradients of 0
    if not rows:
        rows = [Row(ids=[0, 0], labels=[IGNORED] * 2, segments=[-1, -1])]
    # 1) the one IMAGE of a row becomes as many positions as the image has in the model
    ids, labels, segments, positions = [], [], [], []
    for row in rows:
        row_ids = torch.tensor(row.ids)
        repeats = torch.where(row_ids == IMAGE, image_positions, 1)
        ids.append(row_ids.repeat_interleave(repeats))
        labels.append(torch.tensor(row.labels).repeat_interleave(repeats))
        segments.append(torch.tensor(row.segments).repeat_interleave(repeats))
        positions.append(positions_of(segments[-1]))
    # 2) pad on the right: padding has no label, and no position sees segment -1
    pad = lambda tensors, value: pad_sequence(tensors, batch_first=True, padding_value=value)  # -> [B, T]
    padded = pad(ids, 0), pad(labels, IGNORED), pad(segments, -1), pad(positions, 0)
    return Batch(*padded, [row.pixels for row in rows])


def positions_of(segments: torch.Tensor) -> torch.Tensor:
    """Number positions so that every record follows the prefix, not its neighbour.

        segments     0 0 0 1 1 1 2 2
        positions    0 1 2 3 4 5 3 4
    """
    prefix = int((segments == 0).sum())
    positions = torch.arange(len(segments))
    for segment in range(1, int(segments.max()) + 1):
        own = segments == segment
        positions[own] = prefix + torch.arange(int(own.sum()))
    return positions


# ------------------------------------------------------------------------------------------ the plan of steps

@dataclass
class TrainingSet:
    """The records of several files, numbered consecutively, and the rows and batches that are made of them."""

    files: Sequence[str]
    images: ImageFolder | ImageCache
    tokenizer: Tokenizer
    template: Template
    image_positions: int
    max_length: int
    image_text: str = IMAGE_TEXT  # what a prompt has for an image, `Libra.image_text`
    strict: bool = False  # an odd record is an error; else it is left out
    progress: InitVar[Callable] = ignore

    def __post_init__(self, progress):
        """Raises ValueError if an image is missing or no record is left."""
        self.raw = ConcatDataset([Records(path) for path in self.files])
        self.numbers = array("q")  # record i of this set is self.raw[self.numbers[i]]
        self.duplicates = self.alone = 0
        # the plan needs the length of each record, and the first record that starts with the same images
        self.lengths = array("q")
        self.prefixes = array("q")
        first_records = {}
        self.checksum = 0  # of all records: a resumed run must learn from the same

        def visit(record):
            self.checksum = zlib.crc32(repr(record).encode(), self.checksum)
            number = len(self.lengths)
            self.lengths.append(sum(map(len, itertools.chain(*record.turns))))
            if record.starts_with_image:
                number = first_records.setdefault(tuple(record.images), number)
            self.prefixes.append(number)

        first = 0
        for file in self.raw.datasets:
            checked = check(file, Record, self.images.find, progress, visit=visit, strict=self.strict)
            self.numbers.extend(first + number for number in checked.numbers)
            self.duplicates += checked.duplicates
            self.alone += checked.alone
            first += len(file)

    def __len__(self):
        return len(self.numbers)

    def record(self, number: int) -> Record:
        return Record.parse(self.raw[self.numbers[number]])

    def place(self, number: int) -> str:
        """Where a user finds a record, such as "records.jsonl line 7"."""
        number = self.numbers[number]
        for file in self.raw.datasets:
            if number < len(file):
                return file.place(number)
            number -= len(file)

    def row(self, numbers: Sequence[int]) -> Row:
        """The row of these records, such as [0, 2, 3], which start with the same images. Raises ValueError."""
        rows = []
        for record in map(self.record, numbers):
            rows.append(encode(record, self.template, self.tokenizer, self.max_length, self.image_text))
        row = share_prefix(rows)
        # open the images, once for all these records, unless max_length cut them off
        if IMAGE in row.ids:
            try:
                frames = [self.images.frame(name) for name in record.images]
            except (ValueError, OSError) as error:
                raise ValueError(f"{self.place(numbers[0])}: {error}") from None
            pixels = [normalise(frame, self.images.config) for frame in frames]
            row = row._replace(pixels=torch.stack(pixels))  # [1 or 2, 3, S, S]
        return row

    def batch(self, numbers: Sequence) -> Batch:
        """The batch of rows of records, such as [[4], [0, 2, 3]]. Raises ValueError that names a record."""
        rows = [self.row(row) for row in numbers]
        return collate(rows, self.image_positions)._replace(numbers=numbers)

    def __getitem__(self, numbers: Sequence) -> Batch | Exception:
        # for a DataLoader, which would add the traceback of its worker process to the message of a raised error
        try:
            return self.batch(numbers)
        except (ValueError, OSError) as error:
            return error


def shared_rows(prefixes: Sequence[int], max_shared: int) -> list:
    """Group records with the same prefix into rows of at most `max_shared` records.

        record      0 1 2 3 4 5 6      max_shared = 3
        prefixes    0 1 0 0 4 1 0      the first record that starts with the same images
        rows        [0, 2, 3] [6] [1, 5] [4]
    """
    groups = {}
    for number, prefix in enumerate(prefixes):
        groups.setdefault(prefix, []).append(number)
    rows = []
    for numbers in groups.values():
        rows += [numbers[start : start + max_shared] for start in range(0, len(numbers), max_shared)]
    return rows


@dataclass
class StepLoader:
    """Decides which records each step takes, and loads them. The plan depends on these fields and the step alone."""

    training_set: TrainingSet
    world: World
    batch_size: int  # records in a step, over all ranks
    micro_batch: int  # rows in a forward pass of one rank
    max_shared: int  # records that share one prefix
    epochs: float
    max_steps: int  # 0: no limit
    seed: int
    workers: int = 0
    even: bool = False  # all ranks run the same number of forward passes, which FSDP requires

    def __post_init__(self):
        records = len(self.training_set)
        if max(self.batch_size, self.world.size) > records:
            sizes = f"batches of {self.batch_size} and {self.world.size} processes"
            raise ValueError(f"{records} records are too few for {sizes}")
        # a template without questions learns the id right after the image, and that id differs between records
        if self.training_set.template.drops_question:
            self.max_shared = 1
        self.rows = shared_rows(self.training_set.prefixes, self.max_shared)
        self.row_of = [0] * records
        for row, numbers in enumerate(self.rows):
            for number in numbers:
                self.row_of[number] = row
        self.steps_per_epoch = math.ceil(records / self.batch_size)
        self.num_steps = math.ceil(self.epochs * self.steps_per_epoch)
        if self.max_steps:
            self.num_steps = min(self.num_steps, self.max_steps)
        self.seconds_waited = 0.0  # by this process, for batches

    def micro_batches(self, numbers: Sequence[int]) -> list:
        """This rank's share of a step of these records: the rows of each forward pass.

            numbers                4 0 2 3 6 1      (0, 2 and 3 share a row; two ranks, micro_batch = 2)
            rows, shortest first   [4] [6] [1] [0, 2, 3]
            ranks 0 and 1          [[[4], [1]]] and [[[6], [0, 2, 3]]]
        """
        # 1) the records of a row are neighbours; the first and the last row of a step may be cut
        rows = [list(row) for _, row in itertools.groupby(numbers, self.row_of.__getitem__)]
        # 2) rows of similar length go together: of reports mixed with short answers 9 % is padding, otherwise 30 %
        lengths = self.training_set.lengths
        rows.sort(key=lambda row: sum(lengths[number] for number in row))
        # 3) ranks take turns, so rank 0 has the most rows; if the ranks must be even, all run as many passes as it does
        mine = rows[self.world.rank :: self.world.size]
        most = rows[:: self.world.size] if self.even else mine
        size = self.micro_batch
        return [mine[start : start + size] for start in range(0, len(most), size)]

    def plan(self, first: int) -> Iterator:
        """Yields the `micro_batches` of each step, from step `first` on."""
        for step in range(first, self.num_steps):
            epoch, index = divmod(step, self.steps_per_epoch)
            # each epoch shuffles the rows; the records of a row stay together
            if step == first or index == 0:
                # RandomState promises the same numbers in every version of numpy; the newer generators do not
                order = []
                for row in np.random.RandomState([self.seed, epoch]).permutation(len(self.rows)):
                    order += self.rows[row]
            start = index * self.batch_size
            yield self.micro_batches(order[start : start + self.batch_size])

    def batches(self, first: int) -> Iterator:
        """Yields (step, its batches), from step `first` on. Raises the ValueError or OSError of a record."""
        # the DataLoader works ahead of the steps: the plan is made once, and both read it at their own pace
        plan, ahead = itertools.tee(self.plan(first))
        # batch_size=None: what the training set returns is a batch already
        settings = dict(batch_size=None, num_workers=self.workers, worker_init_fn=ignore_signals)
        loader = iter(DataLoader(self.training_set, sampler=itertools.chain.from_iterable(ahead), **settings))
        for step, passes in enumerate(plan, first):
            begin = time.monotonic()
            batches = [next(loader) for _ in passes]
            self.seconds_waited += time.monotonic() - begin
            for batch in batches:
                if isinstance(batch, Exception):
                    raise batch
            # a batch with nothing to learn is run only if the other ranks wait for this forward pass
            if not self.even:
                batches = [batch for batch in batches if (batch.labels != IGNORED).any()]
            yield step, batches


def ignore_signals(worker):
    """Ctrl-C and SIGTERM reach every process. Only the training process acts on them; its workers end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
