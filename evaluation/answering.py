"""A model answers a question file, under the true prior or another; killed at any moment it goes on, to the same bytes.

Batches are formed from the whole file before looking at what is answered. Each process appends the batches that it has
finished to a work file of its own, and when all are there one of them writes the answer file.
"""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

import sample
from data import ImageFolder, Question, Records, Study, check, image_names
from model import Libra
from plumbing import checkpoint
from plumbing.cli import progress
from plumbing.distributed import World
from plumbing.files import atomic, read_json
from plumbing.image import load_image
from plumbing.layout import ADAPTER_FILES, ModelFiles, find_device, find_dtype, find_model_files
from sample import Options

MOST = 16  # studies in a batch that --batch-size does not name


def choose(records: Records, ids: str | None, limit: int | None, only_priors: bool = False) -> dict[str, int]:
    """{id: row} of the questions to answer, in the file's order: those with a prior, of these --ids, of these --limit.

    ids: a file with one on each line, or a list with commas. ValueError where the file or an id is wrong.
    """
    check(records, Question)
    questions = enumerate(map(Question.parse, records))
    rows = {str(question.id): row for row, question in questions if len(question.images) == 2 or not only_priors}
    kind = " with a prior" * only_priors
    if not rows:
        raise ValueError(f"{records.path} has no question{kind}")
    if ids is not None:
        text = Path(ids).read_text(encoding="utf-8") if os.path.isfile(ids) else ids.replace(",", "\n")
        wanted = set(filter(None, map(str.strip, text.splitlines())))
        if unknown := sorted(wanted - rows.keys()):
            more = f" (and {len(unknown) - 1:,} more of --ids)" if unknown[1:] else ""
            raise ValueError(f"{records.path} has no question {unknown[0]}{kind}{more}")
        rows = {id: row for id, row in rows.items() if id in wanted}
    return dict(itertools.islice(rows.items(), limit))


@dataclass(frozen=True)
class Asked:
    """Questions {id: row of the file}, and what a model sees of them under one of the CONDITIONS."""

    records: Records
    rows: dict[str, int]
    condition: str
    folder: ImageFolder
    shuffled: Callable[[Question], str]  # question -> another patient's prior

    BLACK = ""  # the name of a black image

    def questions(self, ids: Iterable[str]) -> Iterator[Question]:
        return (Question.parse(self.records[self.rows[id]]) for id in ids)

    def names(self, question: Question) -> list[str]:
        """Of the images that are seen, current first; those of the question where it has no prior."""
        if len(question.images) < 2 or self.condition == "true":
            return question.images
        current, prior = question.images
        if self.condition == "shuffled":
            return [current, self.shuffled(question)]
        return {"dummy": [current], "reversed": [prior, current], "blank": [current, self.BLACK]}[self.condition]

    def study(self, question: Question) -> Study:
        names = self.names(question)
        images = [self.folder.find(name) for name in names if name != self.BLACK]
        if self.BLACK in names:
            images.append(Image.new("L", load_image(images[0]).size))
        return Study(*images, query=question.text, id=str(question.id))

    def find_images(self):
        """ValueError that names the question where an image is missing."""
        for question in self.questions(self.rows):
            with naming(question):
                for name in filter(None, self.names(question)):
                    self.folder.find(name)

    def lengths(self, libra: Libra, template: str | None, options: Options) -> dict[str, int]:
        """{id: positions of the prompt}; ValueError that names the question where it is too long."""
        found = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of reports that may grow too long `prefill` warns
            for id, question in zip(self.rows, self.questions(self.rows), strict=True):
                with naming(question):
                    found[id] = sample.check_length(libra, sample.prompt_of(libra, question.text, template), options)
        return found

    def prepare(self, libra: Libra, batch: list[str]) -> list[tuple[Question, Study, torch.Tensor]]:
        """Question, study and pixels of each; ValueError that names the question where an image cannot be read."""
        prepared = []
        for question in self.questions(batch):
            with naming(question):
                study = self.study(question)
                prepared.append((question, study, libra.preprocess(study.images())))
        return prepared


@contextmanager
def naming(question: Question):
    """What goes wrong with a question names it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"question {question.id}: {error}") from None


def shuffle_priors(records: Records, seed: int) -> Callable[[Question], str]:
    """A function: question -> another patient's prior, drawn by (seed, question id) from all priors of the file.

    A patient is the folder pNNNNNNNN in an image's path; where there is none, every prior is a patient of its own.
    """
    patient = lambda name: next((part for part in Path(name).parts if re.fullmatch(r"p\d{8}", part)), name)
    priors = [names[1] for names in map(image_names, records) if len(names) == 2]
    patients = list(map(patient, priors))
    if len(set(patients)) == 1:
        raise ValueError(f"{records.path} has priors of one patient only: there is no other's to show")

    def draw(question: Question) -> str:
        dice, own = random.Random(f"{seed}/{question.id}"), patient(question.images[1])
        while patients[place := dice.randrange(len(priors))] == own:
            pass
        return priors[place]

    return draw


def fitting(libra: Libra, positions: int, options: Options, world: World) -> int:
    """Studies in a batch, 1 to MOST: as many as have room for cache and logits in half of the free memory.

    The other half is for what does not grow with them, or little: a prefill, and copies while suffixes grow and move.
    positions: of the longest prompt. Of several processes all take the least, so that they cut the same batches.
    """
    config = libra.decoder.config
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * libra.dtype.itemsize
    suffixes = options.num_beams * (options.max_new_tokens * position + 4 * 4 * libra.vocabulary)  # float32, 4 copies
    free = checkpoint.free_memory(libra.device) // (world.size if libra.device.type == "cpu" else 1)
    return min(world.all_gather(max(1, min(MOST, free // 2 // (positions * position + suffixes)))))


def fingerprint(parts: ModelFiles) -> str:
    """Tells a model from others and from itself after more training: its config, 64 samples of each file of weights."""
    digest = hashlib.sha256(json.dumps(parts.config, sort_keys=True).encode())
    adapters = [checkpoint.find_file(source, ADAPTER_FILES) for source in parts.adapters]
    for path in (*checkpoint.weight_files(parts.weights), *parts.overlays, *filter(None, adapters)):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for place in range(0, size, size // 64 + 1):
                file.seek(place)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def load_model(arguments, world: World) -> Libra:
    arguments.device = str(world.local_device(find_device(arguments.device)))
    return sample.load(arguments)


def work_files(answers: Path) -> list[Path]:
    """The answers of each rank, in the order in which they were finished; they go when the answer file is whole."""
    name = re.compile(rf"\.{re.escape(answers.name)}\.\d+")
    return sorted(path for path in answers.parent.iterdir() if name.fullmatch(path.name))


def whole_lines(path) -> Iterator[tuple[int, bytes]]:
    """(first byte, line) of every line of a work file; a last one without its break is torn, and left out."""
    place = 0
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield place, line
            place += len(line)


def find_answers(answers: Path) -> dict[str, tuple[Path, int]]:
    """{question id: (work file, first byte of its line)}."""
    lines = ((path, *line) for path in work_files(answers) for line in whole_lines(path))
    return {str(json.loads(line)["question_id"]): (path, place) for path, place, line in lines}


@contextmanager
def own_work_file(answers: Path, rank: int):
    """A rank's work file, to append whole lines to; ValueError where another process has it."""
    path = answers.with_name(f".{answers.name}.{rank}")
    with open(path, "ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with this process, however it ends
        except OSError:
            raise ValueError(f"{answers} is being written by another process: wait for it") from None
        try:
            file.truncate(sum(len(line) for _, line in whole_lines(path)))
            yield file
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise OSError(f"{answers}: {error.strerror}: make room and run this again, what is done is kept") from None
        finally:
            if path.exists() and not path.stat().st_size:
                path.unlink()


def sidecar_of(answers: Path) -> Path:
    return answers.with_name(f"{answers.name}.settings.json")


def settings_of(arguments, asked: Asked) -> dict:
    """All that an answer file depends on."""
    parts, device = find_model_files(arguments.model, arguments.base), find_device(arguments.device)
    questions = hashlib.sha256()
    with open(asked.records.path, "rb") as file:
        while block := file.read(1 << 20):
            questions.update(block)
    ids = hashlib.sha256("\n".join(asked.rows).encode())
    return {
        "model": arguments.model, "base": arguments.base, "encoder": arguments.encoder, "weights": fingerprint(parts),
        "dtype": str(find_dtype(arguments.dtype, device, parts.config)).removeprefix("torch."), "device": device.type,
        "template": arguments.template, "questions": questions.hexdigest()[:16],
        "asked": f"{len(asked.rows)} ids ({ids.hexdigest()[:16]})", "prior": asked.condition,
        "image_folder": asked.folder.root, "batch_size": arguments.batch_size,
    } | asdict(sample.options_of(arguments))  # fmt: skip


def begun_with(answers: Path, settings: dict) -> dict | None:
    """The settings that an answer file, or what is done of it, was made with; None where nothing is.

    ValueError or OSError where they are not `settings`; where these leave the batch size open it may be any.
    """
    there, sidecar = [path for path in (answers, *work_files(answers)) if path.exists()], sidecar_of(answers)
    if not (answers.exists() or find_answers(answers)):
        return None
    if not sidecar.exists():
        raise FileExistsError(f"{there[0]} is there, and no {sidecar.name} says how it was made: delete it, or move it")
    begun = read_json(sidecar)
    settings = settings | {"batch_size": settings["batch_size"] or begun.get("batch_size")}
    changed = [f"{name} {begun.get(name)}, not {value}" for name, value in settings.items() if begun.get(name) != value]
    if changed:
        delete = ", ".join(map(str, (*there, sidecar)))
        raise ValueError(f"{answers} was made with {'; '.join(changed)}: give another file, or delete {delete}")
    return begun


def write_answers(arguments, asked: Asked, answers: Path, load: Callable[[], Libra], world: World):
    """Write an answer file, or what is missing of it.

    Batches are cut from all the questions before it is looked what is answered, so that a rerun, or more processes,
    decode the same batches. A finished batch goes to a work file beside the answers; at the end these are merged, in
    the questions' order. FILE.settings.json says what it was made with. load() gives the model when it is needed.
    """
    if not answers.parent.is_dir():
        raise FileNotFoundError(f"no folder {answers.parent} for {answers.name}: make it, or check the path")
    settings, rank = settings_of(arguments, asked), world.rank
    with own_work_file(answers, rank) as work:
        begun = begun_with(answers, settings)
        whole = answers.exists()
        world.barrier()
        if not whole:
            asked.find_images()  # before the model is read
            libra = load()
            options, template = sample.options_of(arguments), arguments.template
            lengths = asked.lengths(libra, template, options)
            size = arguments.batch_size or (begun and begun["batch_size"])
            size = size or fitting(libra, max(lengths.values()), options, world)
            order = sorted(asked.rows, key=lengths.get, reverse=True)  # what does not fit shows at once
            batches = [order[i : i + size] for i in range(0, len(order), size)]
            done = find_answers(answers).keys()
            mine = [batch for batch in batches if not done >= set(batch)][rank :: world.size]
            world.barrier()
            if rank == 0 and not begun:
                with atomic(sidecar_of(answers)) as file:
                    file.write(json.dumps(settings | {"batch_size": size}, indent=1) + "\n")
            world.barrier()
            among = f" (process 1 of {world.size})" * (world.size > 1)
            show = progress(f"answering {answers.name}{among}", "studies")
            finished, total = 0, sum(map(len, mine))
            for lines in decode_batches(libra, asked, mine, template, options, arguments.model):
                data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
                while data:
                    data = data[work.write(data) :]
                os.fsync(work.fileno())
                finished += len(lines)
                if rank == 0:
                    show(finished, total)
            world.barrier()
            if rank == 0:
                merge(answers, asked.rows)
        if rank == 0:
            for path in work_files(answers):
                path.unlink()
            there = ", all there before" if whole else ""
            print(f"{answers}: {len(asked.rows):,} answers{there}", file=sys.stderr)
        world.barrier()


def decode_batches(libra: Libra, asked: Asked, batches: list[list[str]], template, options: Options, model: str):
    """The lines of each batch; the images of the next one are read while it is decoded."""
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(asked.prepare, libra, batch) for batch in batches[:1]]
        for number in range(len(batches)):
            questions, studies, pixels = zip(*ahead.pop().result(), strict=True)
            ahead = [pool.submit(asked.prepare, libra, batch) for batch in batches[number + 1 : number + 2]]
            try:
                prefix = sample.prefill(libra, list(studies), template, options, pixels)
                outputs = sample.decode(libra, prefix, options)
            except torch.OutOfMemoryError:
                raise MemoryError(
                    f"{len(studies)} studies together do not fit on {libra.device}: give a smaller --batch-size"
                ) from None
            yield [
                {"question_id": question.id, "prompt": question.text, "text": best.text, "model_id": model}
                for question, (best, *_) in zip(questions, outputs, strict=True)
            ]


def merge(answers: Path, ids: Iterable[str]):
    """All work files -> the answer file, its lines in the order of the ids."""
    places = find_answers(answers)
    with ExitStack() as stack, atomic(answers, "wb") as file:
        opened = {path: stack.enter_context(open(path, "rb")) for path in work_files(answers)}
        for id in ids:
            path, place = places[id]
            opened[path].seek(place)
            file.write(opened[path].readline())
