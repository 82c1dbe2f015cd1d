"""A study on disk -> images and text; record files -> batches to train on.

    record file --Records--> dict --parse--> Record --Dataset--> Row, a row of a batch --collate--> Batch

Images come from their files (`ImageFolder`) or, the same to the bit, from frames made once (`ImageCache`).
"""

import functools
import json
import math
import os
import re
import signal
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from plumbing.distributed import World
from plumbing.image import load_image
from plumbing.pixels import PixelConfig, frame, normalise
from tokenizer import IMAGE, IMAGE_TEXT, Template, Tokenizer, render

FINDINGS_PROMPT = "Provide a detailed description of the findings in the radiology image."  # as published


@dataclass(frozen=True)
class Study:
    """A current image, the patient's prior image or None, and a question about them.

    Images are paths, http(s) addresses, PIL images, or the bytes of an image file. id names the study where draws are
    made, so that a sample does not depend on what it is batched with; by default its place in the list.
    """

    current: str | Path | Image.Image | bytes
    prior: str | Path | Image.Image | bytes | None = None
    query: str = FINDINGS_PROMPT
    id: str | None = None

    def images(self) -> list[Image.Image]:
        """[current, prior], or [current] where there is no prior, in mode RGB."""
        return [load_image(image) for image in (self.current, self.prior) if image is not None]


# ------------------------------------------------------------------------------------------ record files

BLOCK = 1 << 24  # bytes read at a time, and the longest record of a JSON list
BLANK = re.compile(r"[ \t\r\n]*")


class Records:
    """A JSON list of objects, or JSONL; a record is read and parsed when it is asked for.

    Held in memory is where each record lies, and nothing else. sizes [len]: bytes of each record, which tell long
    from short without a tokenizer.
    """

    def __init__(self, path):
        """ValueError where a JSON list is broken; broken lines of JSONL show when they are read, or in `check`."""
        self.path = Path(path)
        with open(self.path, "rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            if not head:
                raise ValueError(f"{self.path} is empty: give a JSON list of records, or one JSON object per line")
            file.seek(0)
            self.unit = "record" if head.startswith(b"[") else "line"
            starts, ends = self._elements(file) if self.unit == "record" else self._lines(file)
        kept = np.flatnonzero(ends - starts > (self.unit == "line"))  # no empty line, not even of a carriage return
        self.starts, self.sizes, self.numbers = starts[kept], (ends - starts)[kept], kept + 1

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index: int) -> dict:
        with open(self.path, "rb") as file:  # opened anew, so that workers and threads share no position
            return self.read(index, file)

    def __iter__(self):
        with open(self.path, "rb") as file:
            for index in range(len(self)):
                yield self.read(index, file)

    def read(self, index: int, file) -> dict:
        """Record `index` from the open file; ValueError that names its place where it is no JSON object."""
        file.seek(self.starts[index])
        try:
            record = json.loads(file.read(self.sizes[index]))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.place(index)} is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{self.place(index)} is not a JSON object")
        return record

    def place(self, index: int) -> str:
        return f"{self.path} {self.unit} {self.numbers[index]}"

    @staticmethod
    def _lines(file):
        """First byte of every line, and the byte behind its last."""
        ends, size = [], 0
        while block := file.read(BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size)
            size += len(block)
        ends = np.concatenate((*ends, [size]))  # the last line may lack its break
        return np.concatenate(([0], ends[:-1] + 1)), ends

    def _elements(self, file):
        """The same for the elements of a list: each is parsed, for its end, and forgotten."""
        decode, spans, base = json.JSONDecoder().raw_decode, array("q"), 0
        # Latin-1 has one character per byte and JSON's own signs are ASCII: places in this text are places in the file
        text = file.read(BLOCK).decode("latin-1")
        at, closed = text.index("[") + 1, False
        while not closed:
            try:
                begin = BLANK.match(text, at).end()
                if not spans and text[begin] == "]":  # an empty list
                    end = behind = begin
                else:
                    end = decode(text, begin)[1]
                    behind = BLANK.match(text, end).end()
                if text[behind] not in ",]":
                    raise ValueError(f"{text[behind]!r} where a comma or ] is due")
                closed = text[behind] == "]"
                spans.extend((base + begin, base + end))
                at = behind + 1
            except (ValueError, IndexError, RecursionError) as error:
                more = file.read(BLOCK) if len(text) - at <= BLOCK else b""
                if not more:
                    reason = "the file ends within it" if isinstance(error, IndexError) else error
                    raise ValueError(f"{self.path} record {len(spans) // 2 + 1} is not JSON ({reason})") from None
                text, base, at = text[at:] + more.decode("latin-1"), base + at, 0
        if text[at:].strip() or file.read(BLOCK).strip():
            raise ValueError(f"{self.path} goes on behind the end of its list")
        starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        return starts, ends


class Files:
    """The records of several files, numbered through."""

    def __init__(self, files: Sequence[Records]):
        self.files, self.offsets = files, np.cumsum([0, *map(len, files)])

    def __len__(self):
        return int(self.offsets[-1])

    def __getitem__(self, number: int) -> dict:
        file, index = self._find(number)
        return file[index]

    def place(self, number: int) -> str:
        file, index = self._find(number)
        return file.place(index)

    def _find(self, number: int) -> tuple[Records, int]:
        file = int(np.searchsorted(self.offsets, number, side="right")) - 1
        return self.files[file], number - int(self.offsets[file])


def image_names(raw: dict) -> list[str]:
    """The images of a record as named in it: [current, prior], [current], or [] where it is text alone.

    One image named twice is one: without a prior the current image stands for it anyway.
    """
    images = raw.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or len(images) > 2 or not all(isinstance(name, str) and name for name in images):
        raise ValueError(f"image {images!r} is neither a file name nor a list of one or two (current, prior)")
    return list(dict.fromkeys(images))


def _id(raw: dict, key: str) -> str | int:
    if not isinstance(raw.get(key), str | int):
        raise ValueError(f"{key} is missing or neither text nor a whole number")
    return raw[key]


@dataclass(frozen=True)
class Record:
    """A training record. Where a turn has "<image>", it stands at its front."""

    id: str | int
    images: list[str]
    turns: list[tuple[str, str]]  # (question, answer)

    unique: ClassVar[bool] = False  # an id that comes again is counted, no more

    @classmethod
    def parse(cls, raw: dict) -> "Record":
        """ValueError that says what is wrong with the record."""
        images, said = image_names(raw), raw.get("conversations")
        if not isinstance(said, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in said
        ):
            raise ValueError('conversations is not a list of {"from": …, "value": text}')
        speakers, values = [turn.get("from") for turn in said], [turn["value"] for turn in said]
        if not said or speakers != ["human", "gpt"] * (len(said) // 2):
            raise ValueError(f"the speakers are {', '.join(map(str, speakers)) or 'none'}, not human and gpt in turn")
        questions, answers = values[::2], values[1::2]
        if not all(answer.strip() for answer in answers):
            raise ValueError("an answer is empty")
        if any(IMAGE_TEXT in answer for answer in answers):
            raise ValueError(f"an answer contains {IMAGE_TEXT}")
        if (count := sum(question.count(IMAGE_TEXT) for question in questions)) != bool(images):
            raise ValueError(f"{IMAGE_TEXT} stands {count} times in the questions, not {int(bool(images))}")
        for number, question in enumerate(questions):
            if IMAGE_TEXT in question:
                questions[number] = f"{IMAGE_TEXT}\n{question.replace(IMAGE_TEXT, '').strip()}".strip()
        return cls(_id(raw, "id"), images, list(zip(questions, answers, strict=True)))


@dataclass(frozen=True)
class Question:
    """A line of a question file. reference: the report that an answer is compared with, if there is one.

    A training record is a question too: its first one, with the first answer as the reference.
    """

    id: str | int
    images: list[str]
    text: str
    reference: str | None

    unique: ClassVar[bool] = True

    @classmethod
    def parse(cls, raw: dict) -> "Question":
        """ValueError that says what is wrong with the line."""
        images, text = image_names(raw), raw.get("text")
        if not images:
            raise ValueError("there is no image")
        if "conversations" in raw:
            record = Record.parse(raw)
            text, reference = record.turns[0]
            return cls(record.id, images, text.removeprefix(IMAGE_TEXT).strip(), reference)
        if not isinstance(text, str) or IMAGE_TEXT in text:
            raise ValueError(f"text is not the question's text without {IMAGE_TEXT}, which is put before it")
        names = [name for name in ("reference", "findings", "impression") if raw.get(name) is not None]
        reference = raw[names[0]] if names else None
        if not isinstance(reference, str | None):
            raise ValueError(f"{names[0]} is not text")
        return cls(_id(raw, "question_id"), images, text, reference)


class Checked(NamedTuple):
    """What `check` counted."""

    duplicates: int  # records whose id was there already
    images: int  # distinct images
    alone: int  # records without an image
    keys: np.ndarray  # [records]: equal where records can share a prefix, of any files; see `shared_rows`
    lengths: np.ndarray  # [records]: characters that are said in each; of questions 0


def check(
    records: Records,
    kind: type[Record] | type[Question],
    find: Callable[[str], object] = lambda name: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Read and parse every record once; find(name) raises where an image is missing (`ImageFolder.find`).

    ValueError with all that is wrong in one line: the first 20 problems by line or record number, and how many.
    """
    ids, (keys, lengths) = np.arange(len(records)), np.zeros((2, len(records)), dtype=np.int64)
    seen, problems, alone = set(), [], 0
    with open(records.path, "rb") as file:
        for index in range(len(records)):
            progress(index + 1, len(records))
            try:
                raw = records.read(index, file)
                record = kind.parse(raw)
            except ValueError as error:
                problems.append((index, str(error).removeprefix(f"{records.place(index)} ")))
                continue
            ids[index] = hash(str(record.id))
            keys[index] = hash((str(records.path), index))
            alone += not record.images
            if kind is Record:
                lengths[index] = sum(len(text) for turn in record.turns for text in turn)
            if record.images and (kind is Question or record.turns[0][0].startswith(IMAGE_TEXT)):
                keys[index] = hash(tuple(record.images))
            for name in record.images:
                if hash(name) not in seen:  # a third of the memory of the names themselves
                    seen.add(hash(name))
                    try:
                        find(name)
                    except (ValueError, OSError) as error:
                        problems.append((index, str(error)))
    images = len(seen)
    del seen  # tens of MB of a million images, which the sorting can have
    again = np.setdiff1d(np.arange(len(records)), np.unique(ids, return_index=True)[1])
    if kind.unique:
        problems += [(index, "its id was there already: ids must be unique") for index in again]
    if problems:
        problems.sort(key=lambda problem: problem[0])
        listed = "; ".join(f"{records.unit} {records.numbers[index]}: {text}" for index, text in problems[:20])
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{records.path} has problems, {len(problems)} in all: {listed}{more}")
    return Checked(len(again), images, alone, keys, lengths)


# ---------------------------------------------------------------------------------------- where images are


class ImageFolder:
    """Images by their names inside a folder, as frames: uint8 [S, S, 3], what the encoder sees before normalising."""

    def __init__(self, folder, config: PixelConfig | None):
        """config: None where images are only looked for, and no frame is asked for."""
        if not os.path.isdir(folder):
            raise NotADirectoryError(f"no image folder {folder}: check the path")
        self.root, self.config = os.path.realpath(folder), config

    def find(self, name: str) -> str:
        """The path of an image. ValueError where it leads out of the folder, by "..", by a link or from the root."""
        path = os.path.realpath(os.path.join(self.root, name))
        if os.path.commonpath((self.root, path)) != self.root:
            raise ValueError(f"image {name} leads out of the image folder {self.root}: refused")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no image {name} in {self.root}: check the image folder")
        return path

    def frame(self, name: str) -> np.ndarray:
        return frame(load_image(self.find(name)), self.config)


FRAMES, INDEX = "frames.bin", "index.jsonl"


class ImageCache:
    """The same from a folder that `prepare.py cache` has made.

    frames.bin holds frames one behind the other, uint8 [S, S] of a grey image and [S, S, 3] of another. index.jsonl
    has the settings they were made with in its first line, then a line for each, in this order: the image's name,
    its channels and the CRC-32 of its bytes.
    """

    def __init__(self, folder, config: PixelConfig):
        """ValueError where the cache is incomplete or made with other settings than config's."""
        self.folder, self.config = Path(folder), config
        index, file = self.folder / INDEX, self.folder / FRAMES
        if not index.exists():
            raise FileNotFoundError(f"{self.folder} holds no finished image cache: make one with prepare.py cache")
        entries = parse_index(index.read_bytes(), config, index)
        self.numbers = {entry["image"]: number for number, entry in enumerate(entries)}
        self.sums = np.array([entry["crc32"] for entry in entries], dtype=np.uint32)
        sizes = np.array([entry["channels"] for entry in entries], dtype=np.int64) * config.crop**2
        self.bounds = np.concatenate(([0], sizes.cumsum()))
        if not file.exists() or file.stat().st_size < self.bounds[-1]:
            raise ValueError(f"{file} is shorter than {INDEX} says: copy it again, or delete both and make them anew")
        self.frames = np.memmap(file, np.uint8, "r").view(np.ndarray) if self.bounds[-1] else np.empty(0, np.uint8)

    def __reduce__(self):  # for worker processes: the map is opened anew, its content is not sent
        return ImageCache, (self.folder, self.config)

    def find(self, name: str) -> int:
        """The place of an image in the cache."""
        if name not in self.numbers:
            raise FileNotFoundError(f"no image {name} in the cache {self.folder}: run prepare.py cache again")
        return self.numbers[name]

    def frame(self, name: str) -> np.ndarray:
        number = self.find(name)
        data = self.frames[self.bounds[number] : self.bounds[number + 1]]
        if zlib.crc32(data) != self.sums[number]:
            raise ValueError(f"{self.folder / FRAMES} is damaged at {name}: delete the cache and make it again")
        return data.reshape(self.config.crop, self.config.crop, -1).repeat(3 * self.config.crop**2 // len(data), 2)


def cache_settings(config: PixelConfig) -> dict:
    """What frames depend on."""
    special = {"mean": list(config.mean)} if config.pad == "mean" else {}
    special |= {name: True for name in ("squash", "rounds") if getattr(config, name)}
    return {"format": 1, "size": config.size, "crop": config.crop, "pad": config.pad} | special


def parse_index(data: bytes, config: PixelConfig, path: Path) -> list[dict]:
    """The entries of a cache's index, [{"image", "channels", "crc32"}]; path is for what goes wrong."""
    try:
        settings, *entries = map(json.loads, data.splitlines())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete the cache and make it again") from None
    if settings != cache_settings(config):
        raise ValueError(f"{path} was made with {settings}, not {cache_settings(config)}: use another cache")
    return entries


# --------------------------------------------------------------------------------------- records -> batches

IGNORED = -100  # the label of a position that is not learnt


@dataclass(frozen=True)
class Row:
    """A row of a batch: a record, or several with the same images behind one prefix.

    labels[i] is ids[i] where that is learnt, else IGNORED; the loss compares them with the position before.
    """

    ids: list[int]  # the image is one IMAGE; [] where no record has a label left
    labels: list[int]
    segments: list[int]  # 0, or of several records: 0 up to their image, then 1, 2, …
    pixels: torch.Tensor | None  # [2, 3, S, S] (current, prior), [1, 3, S, S] without a prior; None: text alone
    cut: int  # records that were longer than max_length and lost their end
    skipped: int  # records that were left out because nothing to learn was within max_length


def encode(record: Record, template: Template, tokenizer: Tokenizer, max_length: int) -> tuple[list, list, bool]:
    """ids, labels, and whether they were cut. max_length counts the image as one id, as published.

    What is too long ends with the last learnt id that fits: within an answer or at its end, never in a question.
    """
    prompt = render(record.turns, template, tokenizer)
    labels = [id if learnt else IGNORED for id, learnt in zip(prompt.ids, prompt.labels, strict=True)]
    length = len(labels)
    if length > max_length:
        length = max((i + 1 for i in range(max_length) if labels[i] != IGNORED), default=0)
    return prompt.ids[:length], labels[:length], length < len(labels)


@dataclass
class Dataset:
    """Row i is record i, item (i, j, …) is one row of several records with the same images (see `shared_rows`)."""

    records: Records | Files
    images: ImageFolder | ImageCache
    tokenizer: Tokenizer
    template: Template
    max_length: int

    def __len__(self):
        return len(self.records)

    def __getitem__(self, numbers: int | Sequence[int]) -> Row:
        """ValueError that names the record where it or an image of it cannot be read."""
        numbers = np.atleast_1d(numbers)
        if len(numbers) > 1 and self.template.drops_question:
            # the first id behind the image is learnt there, and one position cannot be compared with several
            raise ValueError("a template without questions has no prefix to share")
        raw = [self.records[number] for number in numbers]
        try:
            records = [Record.parse(record) for record in raw]
            parts = [encode(record, self.template, self.tokenizer, self.max_length) for record in records]
            kept = [(ids, labels) for ids, labels, _ in parts if ids]
            ids, labels = kept[0] if kept else ([], [])
            pixels = None
            if IMAGE in ids:
                frames = [self.images.frame(name) for name in records[0].images]
                pixels = torch.stack([normalise(frame, self.images.config) for frame in frames])
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.records.place(numbers[0])}: {error}") from None
        segments = [0] * len(ids)
        if len(kept) > 1:
            prefix = ids.index(IMAGE) + 1
            ids, labels, segments = ids[:prefix], labels[:prefix], segments[:prefix]
            for number, (its_ids, its_labels) in enumerate(kept, 1):
                ids += its_ids[prefix:]
                labels += its_labels[prefix:]
                segments += [number] * len(its_ids[prefix:])
        skipped = len(parts) - len(kept)
        return Row(ids, labels, segments, pixels, sum(cut for *_, cut in parts) - skipped, skipped)


def shared_rows(keys: np.ndarray, most: int) -> list[np.ndarray]:
    """Records with equal keys (`Checked.keys`), at most `most` together -> the records of each row.

    The order is that of the first record of each key: the keys themselves are hashes, other ones in every process.
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    groups = first[inverse]
    members = np.argsort(groups, kind="stable")
    groups, places = groups[members], np.arange(len(members))
    begins = np.diff(groups, prepend=-1) != 0
    within = places - np.maximum.accumulate(np.where(begins, places, 0))
    return np.split(members, places[(within % most == 0) & (places > 0)])


class Batch(NamedTuple):
    """B rows, padded on the right to T positions, of which an image has `image_positions`."""

    ids: torch.Tensor  # [B, T]; IMAGE in all positions of an image, 0 in padding
    labels: torch.Tensor  # [B, T]; IGNORED where nothing is learnt
    segments: torch.Tensor  # [B, T], as in attention.py; -1 in padding
    positions: torch.Tensor  # [B, T]; every segment goes on behind the prefix
    pixels: list[torch.Tensor | None]  # of each row, as in Row
    cut: int
    skipped: int


def collate(items: list[Row], image_positions: int) -> Batch:
    """TrainingSet -> a batch. A row without labels takes no place in it; there may be none left."""
    kept = [item for item in items if item.ids]
    columns = []
    for item in kept:
        ids, labels, segments = (np.array(values) for values in (item.ids, item.labels, item.segments))
        repeats = np.where(ids == IMAGE, image_positions, 1)
        ids, labels, segments = (values.repeat(repeats) for values in (ids, labels, segments))
        places = np.arange(len(ids))
        begins = np.maximum.accumulate(np.where(np.diff(segments, prepend=0) != 0, places, 0))
        positions = np.where(segments > 0, places - begins + (segments == 0).sum(), places)
        columns.append((ids, labels, segments, positions))
    length = max((len(ids) for ids, *_ in columns), default=0)
    batch = torch.empty(4, len(kept), length, dtype=torch.long)
    for values, fill in zip(batch, (0, IGNORED, -1, 0), strict=True):
        values.fill_(fill)
    for row, values in enumerate(columns):
        batch[:, row, : len(values[0])] = torch.from_numpy(np.stack(values))
    pixels = [item.pixels for item in kept]
    return Batch(*batch, pixels, sum(item.cut for item in items), sum(item.skipped for item in items))


def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` rows in an epoch, from its arguments alone."""
    random = np.random.RandomState([seed, epoch])  # unlike its successor it draws the same in every version of numpy
    return random.permutation(count)


# ------------------------------------------------------------------------------------------ steps of training


class TrainingSet(Dataset):
    """What a data loader asks for: rows of records of several files. A mistake is handed on as one."""

    def __init__(
        self,
        files: Sequence[str],
        images: ImageFolder | ImageCache,
        tokenizer: Tokenizer,
        template: Template,
        image_positions: int,
        max_length: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        """ValueError where a record is wrong or lacks its image."""
        super().__init__(Files([Records(file) for file in files]), images, tokenizer, template, max_length)
        self.checked = [check(file, Record, images.find, progress) for file in self.records.files]
        self.image_positions = image_positions

    def __getitem__(self, row: tuple[int, ...]):
        try:
            return super().__getitem__(row)
        except (ValueError, OSError) as error:  # a loader's process would wrap it into its traceback
            return error

    def collate(self, items: list) -> Batch | Exception:
        errors = [item for item in items if isinstance(item, Exception)]
        return errors[0] if errors else collate(items, self.image_positions)

    def ids(self, rows) -> list:
        return [self.records[number]["id"] for row in rows for number in row]


class StepLoader:
    """Which records each step takes, and in which rows, from its arguments and the step alone.

    batch_size: records in a step, of all processes together; micro_batch: rows in a forward pass of one; max_shared:
    records behind one prefix; even: as many forward passes in all processes, some of them of `EMPTY_BATCH`.
    """

    def __init__(
        self,
        rows: TrainingSet,
        world: World,
        *,
        batch_size: int,
        micro_batch: int,
        max_shared: int,
        epochs: float,
        max_steps: int,
        seed: int,
        workers: int = 0,
        even: bool = False,
    ):
        self.dataset, self.world, self.seed, self.workers, self.even = rows, world, seed, workers, even
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.rows = shared_rows(np.concatenate([checked.keys for checked in rows.checked]), max_shared)
        self.lengths = np.concatenate([checked.lengths for checked in rows.checked])
        self.row_of = np.empty(len(rows), dtype=np.int64)
        for number, row in enumerate(self.rows):
            self.row_of[row] = number
        if max(batch_size, world.size) > len(rows):
            sizes = f"batches of {batch_size} and {world.size} processes"
            raise ValueError(f"{len(rows)} records are too few for {sizes}")
        self.per_epoch = math.ceil(len(rows) / batch_size)
        self.num_steps = math.ceil(epochs * self.per_epoch)
        self.num_steps = min(self.num_steps, max_steps or self.num_steps)
        self.seconds_waited = 0.0  # seconds that this process has waited for batches

    @functools.lru_cache(maxsize=2)  # noqa: B019 (the loader is an epoch ahead at most; there is one object)
    def order(self, epoch: int) -> np.ndarray:
        """The records of an epoch; those that share a prefix stand together."""
        return np.concatenate([self.rows[row] for row in order(len(self.rows), self.seed, epoch)])

    def micro_batches(self, step: int) -> list[list[tuple[int, ...]]]:
        """This process's share of a step: of each forward pass the rows, of each row the records.

        Rows of about the same length go together, so that less is padding: of the phantom's stages 0 and 1, reports
        beside short answers, some 30 % of all positions were, with this 9 %.
        """
        epoch, index = divmod(step, self.per_epoch)
        numbers = self.order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        borders = np.flatnonzero(np.diff(self.row_of[numbers])) + 1
        rows = [tuple(row.tolist()) for row in np.split(numbers, borders)]
        rows.sort(key=lambda row: self.lengths[list(row)].sum())
        mine = rows[self.world.rank :: self.world.size]
        most = len(rows[:: self.world.size]) if self.even else len(mine)  # the first process has most
        return [mine[first : first + self.micro_batch] for first in range(0, most, self.micro_batch)]

    def batches(self, first: int) -> Iterator[tuple[int, list[tuple[list, Batch]]]]:
        """(step, [(rows, Batch), …]) of every step from `first` on; ValueError or OSError of a record."""
        plan = (micro for step in range(first, self.num_steps) for micro in self.micro_batches(step))
        options = dict(collate_fn=self.dataset.collate, num_workers=self.workers, worker_init_fn=_obey)
        loader = iter(DataLoader(self.dataset, batch_sampler=plan, **options))
        for step in range(first, self.num_steps):
            begin = time.monotonic()
            found = [(micro, next(loader)) for micro in self.micro_batches(step)]
            self.seconds_waited += time.monotonic() - begin
            for _, batch in found:
                if isinstance(batch, Exception):
                    raise batch
            if self.even:
                found = [(micro, batch if len(batch.ids) else EMPTY_BATCH) for micro, batch in found]
            yield step, [(micro, batch) for micro, batch in found if len(batch.ids)]


# two positions of padding: no label, no loss, no gradient but zeros
EMPTY_BATCH = Batch(*torch.tensor([[[0, 0]], [[IGNORED, IGNORED]], [[-1, -1]], [[0, 1]]]), [None], 0, 0)


def _obey(worker: int):
    """Ctrl-C and SIGTERM, which reach all processes, are for the one that trains: when that ends, a loader does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
