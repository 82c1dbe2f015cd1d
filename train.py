"""Both training stages and full fine-tuning: align a connector, learn LoRA, or everything.

    python train.py configs/align.py --records=train.jsonl --image_folder=mimic-cxr-jpg
    torchrun --nproc-per-node 8 train.py configs/finetune_lora.py --key=value …

A run is its config: what happens in a step follows from (config, step) alone, so a checkpoint holds the trained
weights, the optimizer and the number of steps, and a run that goes on equals one that was never broken.
"""

import ast
import difflib
import json
import re
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from cli import atomic, fail, guard, progress


@dataclass(frozen=True)
class TrainConfig:
    model: str = ""  # what to start from: a checkpoint, adapter or connector, by folder, file or hub id
    base: str = ""  # the model under an adapter or a connector, instead of the one that it records
    decoder: str = ""  # instead of model, stock parts: the language model, a folder or a hub id
    encoder: str = ""  # … and the image encoder
    new_decoder: dict = field(default_factory=dict)  # … or both drawn anew: the fields of a Llama's config.json
    new_encoder: dict = field(default_factory=dict)  # … and of a DINOv2's
    connector: str = "TAC"  # … and a fresh connector: TAC, linear, mlp2x_gelu, …
    connector_weights: str = ""  # … or the weights to start it from: an mm_*projector* file
    select_layer: int = -2  # … and the encoder's layer that an MLP connector reads
    template: str = ""  # conversation template; without it the model's own
    pad: str = "black"  # how images become square, in training and after: black, mean, none
    train: tuple[str, ...] = ("connector",)  # what learns: connector, lora, decoder, encoder
    lora_r: int = 128  # LoRA's rank
    lora_alpha: float = 256.0  # LoRA's scale is lora_alpha / lora_r
    lora_dropout: float = 0.05  # before LoRA's first matrix
    lora_targets: tuple[str, ...] = ()  # projections that LoRA stands beside; without it all of them

    records: tuple[str, ...] = ()  # training records: JSON lists or JSONL
    validation: tuple[str, ...] = ()  # records to validate with
    image_folder: str = ""  # where the images that they name are
    image_cache: str = ""  # … or what prepare.py cache made of them
    max_length: int = 2048  # ids of a record, the image counting as one; longer ones are cut
    share_prefix: bool = True  # records with the same images ride behind one prefix
    max_shared: int = 8  # records behind one prefix, at most

    epochs: float = 1.0  # passes over the records
    max_steps: int = 0  # stop after this many steps, if not 0; the schedule ends there too
    batch_size: int = 16  # records in a step, of all processes together
    micro_batch: int = 4  # rows in a forward pass of one process
    lr: float = 2e-5  # learning rate at the end of the warm-up
    mm_projector_lr: float = 0.0  # the connector's, if not 0
    encoder_lr: float = 0.0  # the encoder's, if not 0
    warmup: float = 0.03  # share of the steps in which the learning rate rises; then it falls as a cosine
    weight_decay: float = 0.0  # of matrices; never of biases and norms
    beta2: float = 0.999  # AdamW's second decay rate; the first is 0.9
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    gradient_checkpointing: bool = False  # compute the decoder's layers twice to save memory

    out_dir: str = "out"  # checkpoints, logs, and the model in the published layout (last, best)
    seed: int = 0  # of the order of the records, dropout and fresh weights
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # of frozen weights; auto: float32 on the CPU, else 16 bits
    workers: int = 2  # processes that load data, for each training process; 0: none
    log_every: int = 10  # steps between log lines
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # newest checkpoints that stay
    validate_every: int = 0  # steps between validations; 0: none
    validation_records: int = 256  # records of a validation: the first ones
    metrics: tuple[str, ...] = ()  # scores of written answers: BLEU4, ROUGE-L, … (eval.py's), or module:function
    max_new_tokens: int = 256  # of an answer that is written for them
    best: str = "loss"  # what decides which model is best: loss (lowest) or one of the metrics (highest)
    report_to: tuple[str, ...] = ()  # tensorboard, wandb: log there too


RUNTIME = ("out_dir", "device", "workers", "log_every", "save_every", "keep")  # what a resumed run may change


def read_config(path: str, overrides: list[str]) -> TrainConfig:
    """Defaults < a Python file of assignments < --key=value; ValueError with place, type and nearest key."""
    try:
        code = compile(Path(path).read_text(encoding="utf-8"), path, "exec")
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    namespace: dict = {}
    try:
        exec(code, namespace)
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    values = {name: _typed(name, value, path) for name, value in namespace.items() if not name.startswith("__")}
    for override in overrides:
        name, equals, text = override.removeprefix("--").partition("=")
        if not equals or not override.startswith("--"):
            raise ValueError(f"{override!r} is not of the form --key=value; see --help")
        values[name] = _typed(name, text, "the command line", parse=True)
    return replace(TrainConfig(), **values)


def _typed(name: str, value, where: str, parse: bool = False):
    known = {field.name: field for field in fields(TrainConfig)}
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise ValueError(f"{where}: no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help"))
    kind = type(getattr(TrainConfig(), name))
    if parse and kind is tuple:
        value = tuple(part for part in value.split(",") if part)
    elif parse and kind is not str:
        with suppress(ValueError, SyntaxError):  # it stays a text then, which the next lines refuse
            value = ast.literal_eval(value)
    if kind is tuple and isinstance(value, str | list):
        value = (value,) if isinstance(value, str) else tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is tuple and not all(isinstance(part, str) for part in value)):
        expected = "a tuple of texts" if kind is tuple else kind.__name__
        raise ValueError(f"{where}: {name} is {value!r}, not of type {expected}")
    return value


def parse(arguments: list[str]):
    """(config, resume) of a command line; prints help or a mistake and leaves."""
    if "--help" in arguments or "-h" in arguments:
        print("usage: train.py configs/NAME.py [--key=value …] [--resume]\n\nkeys, their defaults and meanings:")
        pattern = re.compile(r"^    (\w+): \S.* = (.+?)  # (.+)$", re.M)
        for name, default, meaning in pattern.findall(Path(__file__).read_text(encoding="utf-8")):
            print(f"  {name:<22} {default:<16} {meaning}")
        print("  --resume: go on from the newest checkpoint in out_dir")
        sys.exit(0)
    if not arguments or arguments[0].startswith("--"):
        sys.exit(fail("train.py", "the first argument is a config, such as configs/align.py; see --help"))
    try:
        rest = [argument for argument in arguments[1:] if argument != "--resume"]
        return read_config(arguments[0], rest), len(rest) < len(arguments) - 1
    except ValueError as error:
        sys.exit(fail("train.py", error))


if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    ARGUMENTS = parse(sys.argv[1:])

# ruff: noqa: E402
import ctypes
import functools
import hashlib
import importlib
import itertools
import math
import os
import pickle
import signal
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader

import parts
import report
from attention import attention
from data import (
    IGNORED,
    Batch,
    Dataset,
    ImageCache,
    ImageFolder,
    Record,
    Records,
    Study,
    check,
    collate,
    order,
    shared_rows,
)
from decoder import PROJECTIONS, LoRAConfig, add_lora, names_of
from metrics import METRICS, score_of, statistics
from model import Libra, find_device
from sample import generate
from tokenizer import IMAGE, IMAGE_TEXT, find_template

# ------------------------------------------------------------------------------------------ what learns

PARTS = ("connector", "lora", "decoder", "encoder")


def build(config: TrainConfig, show=lambda done, total: None) -> Libra:
    """The model of a config: what learns in float32, the rest as it is stored, frozen and in evaluation mode."""
    unknown = [part for part in config.train if part not in PARTS]
    if unknown or not config.train:
        raise ValueError(f"train names {unknown or 'nothing'}, not some of {', '.join(PARTS)}")
    if "lora" in config.train and "decoder" in config.train:
        raise ValueError("train names lora and decoder: give one of them")
    torch.manual_seed(config.seed)
    options = dict(device=config.device, dtype=config.dtype, progress=show)
    if config.model:
        libra = Libra.from_pretrained(config.model, base=config.base or None, **options)
    elif (config.decoder and config.encoder) or (config.new_decoder and config.new_encoder):
        more = dict(connector_weights=config.connector_weights or None, select_layer=config.select_layer)
        places = new_parts(config) if config.new_decoder else (config.decoder, config.encoder)
        libra = Libra.from_parts(*places, config.connector, **more, **options)
    else:
        raise ValueError("the config names no model, nor both decoder and encoder: what is to be trained?")
    libra.template = config.template or libra.template
    find_template(libra.template)
    libra.pixels = replace(libra.pixels, pad=config.pad)
    libra.parts.config.update(mm_conversation_template=libra.template, mm_image_pad=config.pad)
    if "encoder" in config.train:
        if libra.encoder.config.model_type == "open_clip":
            raise ValueError("an open_clip encoder cannot be trained: published checkpoints have no place for it")
        libra.parts.config["unfreeze_mm_vision_tower"] = True
        libra.config = replace(libra.config, unfreeze_mm_vision_tower=True)
    if "lora" in config.train:
        names = names_of(libra.parts.config)
        whole = [name for name in PROJECTIONS if name not in sum(names.fused.values(), ())]
        targets = config.lora_targets or (*names.fused, *whole)
        libra.lora = LoRAConfig(config.lora_r, config.lora_alpha, tuple(sorted(targets)), config.lora_dropout)
        add_lora(libra.decoder, names, libra.lora)
    for part in PARTS:
        if part in config.train and part != "lora":
            getattr(libra, part).requires_grad_(True).train()
    libra.decoder.train("lora" in config.train or "decoder" in config.train)
    libra.decoder.gradient_checkpointing = config.gradient_checkpointing
    for parameter in trained(libra).values():
        parameter.data = parameter.data.float()
    return libra


def new_parts(config: TrainConfig) -> tuple[Path, Path]:
    """A language model and an image encoder with fresh weights, in out_dir/new; the records teach the tokenizer."""
    folder = Path(config.out_dir, "new")
    if not (folder / "decoder").exists():
        records = itertools.chain(*map(Records, config.records))
        said = (turn["value"] for record in records for turn in record["conversations"])
        template = find_template(config.template)
        texts = itertools.chain(said, [template.start + template.open] * 1000)  # often: its words become tokens
        parts.write_encoder(folder / "encoder", config.new_encoder, seed=config.seed)
        parts.write_decoder(folder / "decoder", config.new_decoder, texts, seed=config.seed)
    return folder / "decoder", folder / "encoder"


def trained(libra: Libra) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in libra.named_parameters() if parameter.requires_grad}


def make_optimizer(libra: Libra, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with the published groups: no decay of biases and norms, rates of their own for connector and encoder."""
    rates = {"connector": config.mm_projector_lr or config.lr, "encoder": config.encoder_lr or config.lr}
    norms = [f"{name}." for name, module in libra.named_modules() if "Norm" in type(module).__name__]
    groups: dict[tuple, list] = {}
    for name, parameter in trained(libra).items():
        decays = not (name.endswith("bias") or any(name.startswith(norm) for norm in norms))
        rate = rates.get(name.split(".")[0], config.lr)
        groups.setdefault((rate, config.weight_decay if decays else 0.0), []).append(parameter)
    settings = [dict(params=held, lr=rate, peak=rate, weight_decay=decay) for (rate, decay), held in groups.items()]
    return torch.optim.AdamW(settings, betas=(0.9, config.beta2), eps=1e-8)


def rate_at(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate in a step: linear warm-up from 0, then half a cosine to 0, as published."""
    rising = math.ceil(steps * warmup)
    if step < rising:
        return step / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


# ------------------------------------------------------------------------------------------ the loss


def loss_sum(libra: Libra, batch: Batch) -> torch.Tensor:
    """Sum of the losses of all labels of a batch. Only positions before a label reach the head."""
    ids, labels, segments, positions = (values.to(libra.device) for values in batch[:4])
    embeddings = libra.decoder.embed_tokens(ids.clamp(0))  # [B, T, C]
    pictures = [pixels for pixels in batch.pixels if pixels is not None]
    if pictures:
        images = libra.embed_batch(pictures).to(embeddings.dtype)  # [rows with an image, N, C]
        embeddings = embeddings.masked_scatter((ids == IMAGE)[..., None], images)
    config = libra.decoder.config
    shared = bool((segments > 0).any())  # else what is right-padded needs no mask: no position sees what follows it

    def attend(layer, q, k, v):
        window = config.window(layer)
        if shared:
            return attention(q, k, v, segments=segments, window=window, positions=positions)
        return attention(q, k, v, causal=True, window=window)

    hidden = libra.decoder(embeddings, positions, attend)
    learnt = labels[:, 1:] != IGNORED
    hidden, labels = hidden[:, :-1][learnt], labels[:, 1:][learnt]
    chunks = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    score = lambda hidden, labels: F.cross_entropy(libra.logits(hidden), labels, reduction="sum")
    if len(labels) <= CHUNK:
        return score(hidden, labels)
    return sum(recompute(score, *chunk, use_reentrant=False) for chunk in chunks)  # logits of one chunk at a time


CHUNK = 1024  # positions whose logits are in memory at once


# ------------------------------------------------------------------------------------------ processes


class Processes:
    """This process among those that torchrun started; alone without it."""

    def __init__(self, device: str):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = str(find_device(device))
        if self.count > 1:
            if self.device == "cuda":
                self.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.startswith("cuda") else "gloo")

    def sum(self, *values) -> list[float]:
        """Of each number the sum over all processes."""
        if self.count == 1:
            return [float(value) for value in values]
        summed = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def sum_gradients(self, parameters):
        """Add the gradients of all processes, in buckets; those that took no part count as 0."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        bucket: list[torch.Tensor] = []
        for number, parameter in enumerate(parameters, 1):
            bucket.append(parameter.grad)
            if number == len(parameters) or sum(grad.numel() for grad in bucket) > 2**24:
                flat = torch.cat([grad.flatten() for grad in bucket])
                dist.all_reduce(flat)
                for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                    grad.copy_(part.view_as(grad))
                bucket = []

    def gather(self, values: list) -> list:
        """The lists of all processes, one behind the other."""
        if self.count == 1:
            return values
        lists = [None] * self.count
        dist.all_gather_object(lists, values)
        return list(itertools.chain(*lists))


# ------------------------------------------------------------------------------------------ data


class Rows:
    """What a data loader asks for: rows of records, numbered through several files. A mistake is handed on as one."""

    def __init__(self, config: TrainConfig, files: tuple[str, ...], libra: Libra, progress):
        if not files:
            raise ValueError("the config names no records")
        if bool(config.image_folder) == bool(config.image_cache):
            raise ValueError("the config must name one of image_folder and image_cache")
        images = (ImageFolder if config.image_folder else ImageCache)(
            config.image_folder or config.image_cache, libra.pixels
        )
        template, self.image_positions = find_template(libra.template), libra.image_positions
        self.files = [Dataset(Records(file), images, libra.tokenizer, template, config.max_length) for file in files]
        self.checked = [check(file.records, Record, images.find, progress) for file in self.files]
        self.offsets = np.cumsum([0, *map(len, self.files)])

    def __len__(self):
        return int(self.offsets[-1])

    def place(self, number: int) -> tuple[Dataset, int]:
        file = int(np.searchsorted(self.offsets, number, side="right")) - 1
        return self.files[file], number - int(self.offsets[file])

    def __getitem__(self, row: tuple[int, ...]):
        file, first = self.place(row[0])
        try:
            return file[[first + number - row[0] for number in row]]
        except (ValueError, OSError) as error:  # a loader's process would wrap it into its traceback
            return error

    def collate(self, items: list) -> Batch | Exception:
        errors = [item for item in items if isinstance(item, Exception)]
        return errors[0] if errors else collate(items, self.image_positions)

    def ids(self, rows) -> list:
        places = [self.place(number) for row in rows for number in row]
        return [file.records[number]["id"] for file, number in places]


class Steps:
    """Which records each step takes, and in which rows, from (config, step) alone."""

    def __init__(self, config: TrainConfig, rows: Rows, sharing: bool, processes: "Processes"):
        self.config, self.processes = config, processes
        groups = [checked.groups + offset for checked, offset in zip(rows.checked, rows.offsets, strict=False)]
        self.rows = shared_rows(np.concatenate(groups), config.max_shared if sharing else 1)
        self.row_of = np.empty(len(rows), dtype=np.int64)
        for number, row in enumerate(self.rows):
            self.row_of[row] = number
        if max(config.batch_size, processes.count) > len(rows):
            sizes = f"batches of {config.batch_size} and {processes.count} processes"
            raise ValueError(f"{len(rows)} records are too few for {sizes}")
        self.per_epoch = math.ceil(len(rows) / config.batch_size)
        self.count = math.ceil(config.epochs * self.per_epoch)
        self.count = min(self.count, config.max_steps or self.count)

    @functools.lru_cache(maxsize=2)  # noqa: B019 (the loader is an epoch ahead at most; there is one object)
    def order(self, epoch: int) -> np.ndarray:
        """The records of an epoch; those that share a prefix stand together."""
        return np.concatenate([self.rows[row] for row in order(len(self.rows), self.config.seed, epoch)])

    def micro_batches(self, step: int) -> list[list[tuple[int, ...]]]:
        """This process's share of a step: of each forward pass the rows, of each row the records."""
        epoch, index = divmod(step, self.per_epoch)
        numbers = self.order(epoch)[index * self.config.batch_size : (index + 1) * self.config.batch_size]
        borders = np.flatnonzero(np.diff(self.row_of[numbers])) + 1
        rows = [tuple(row.tolist()) for row in np.split(numbers, borders)]
        mine, size = rows[self.processes.rank :: self.processes.count], self.config.micro_batch
        return [mine[first : first + size] for first in range(0, len(mine), size)]

    def batches(self, rows: Rows, first: int):
        """(step, [(rows, Batch), …]) of every step from `first` on."""
        plan = (micro for step in range(first, self.count) for micro in self.micro_batches(step))
        options = dict(collate_fn=rows.collate, num_workers=self.config.workers, worker_init_fn=_obey)
        loader = iter(DataLoader(rows, batch_sampler=plan, **options))
        for step in range(first, self.count):
            found = [(micro, next(loader)) for micro in self.micro_batches(step)]
            for _, batch in found:
                if isinstance(batch, Exception):
                    raise batch
            yield step, [(micro, batch) for micro, batch in found if len(batch.ids)]


def _obey(worker: int):
    """A loader's process ends when it is told to; Ctrl-C is for the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ------------------------------------------------------------------------------------------ checkpoints


class Checkpoints:
    """checkpoints/step-N.pt in out_dir: trained weights, optimizer, steps done, best score, config. Whole or absent."""

    def __init__(self, config: TrainConfig):
        self.config, self.folder = config, Path(config.out_dir, "checkpoints")

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, libra: Libra, optimizer, best: float):
        """The state after `step` steps; older checkpoints than the newest `keep` go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = {name: parameter.detach() for name, parameter in trained(libra).items()}
        state = dict(config=asdict(self.config), step=step, best=best, weights=weights)
        try:
            with atomic(self.folder / f"step-{step:07}.pt", "wb") as file:
                torch.save(state | {"optimizer": optimizer.state_dict()}, file)
        except (OSError, RuntimeError) as error:  # torch's writer has an error of its own for a full disk
            raise OSError(f"{self.folder} could not be written ({error}): is the disk full?") from None
        for file in self.files()[: -self.config.keep]:
            file.unlink()

    def load(self, libra: Libra, optimizer) -> tuple[int, float]:
        """(steps done, best score) of the newest checkpoint that is whole; ValueError where it is another run's."""
        for file in reversed(self.files()):
            try:
                state = torch.load(file, map_location=libra.device, weights_only=True)
                missing = {"config", "step", "best", "weights", "optimizer"} - state.keys()
            except (RuntimeError, EOFError, OSError, AttributeError, pickle.UnpicklingError, zipfile.BadZipFile):
                missing = {"a whole file"}
            if missing:
                print(f"train.py: {file} is damaged or no checkpoint: the one before is used", file=sys.stderr)
                continue
            for name, value in asdict(self.config).items():
                before = state["config"].get(name)
                if name not in RUNTIME and before != value:
                    raise ValueError(f"{file} was made with {name}={before!r}, not {value!r}: use another out_dir")
            weights, ours = state["weights"], trained(libra)
            if weights.keys() != ours.keys() or any(weights[name].shape != ours[name].shape for name in ours):
                raise ValueError(f"{file} holds other weights than this config trains: use another out_dir")
            with torch.no_grad():
                for name, parameter in ours.items():
                    parameter.copy_(weights[name])
            optimizer.load_state_dict(state["optimizer"])
            return state["step"], state["best"]
        raise ValueError(f"{self.folder} holds no checkpoint to go on from: run without --resume")


def export(libra: Libra, config: TrainConfig, folder: Path):
    """What was trained, in the published layout; `sample.py --model` reads it."""
    if "lora" in config.train:
        libra.save_adapter(folder)
    elif config.train == ("connector",):
        libra.save_connector(folder)
    else:
        libra.save_pretrained(folder)
    if config.new_decoder:
        libra.save_parts(folder / "parts")


# ------------------------------------------------------------------------------------------ validation


@torch.no_grad()
def validate(libra: Libra, config: TrainConfig, rows: Rows, processes: "Processes") -> dict[str, float]:
    """Loss, and scores of written answers, over the first validation_records records."""
    count, modes = min(config.validation_records, len(rows)), [(module, module.training) for module in libra.modules()]
    libra.eval()
    mine = list(range(count))[processes.rank :: processes.count]
    total = labels = 0.0
    for first in range(0, len(mine), config.micro_batch):
        batch = rows.collate([rows[(number,)] for number in mine[first : first + config.micro_batch]])
        if isinstance(batch, Exception):
            raise batch
        if len(batch.ids):
            total += float(loss_sum(libra, batch))
            labels += int((batch.labels != IGNORED).sum())
    total, labels = processes.sum(total, labels)
    scores = {"loss": total / max(labels, 1)}
    if config.metrics:
        studies, answers = [], []
        for file, number in map(rows.place, mine):
            record = Record.parse(file.records[number])
            if record.images and record.turns[0][0].startswith(IMAGE_TEXT):
                question = record.turns[0][0].removeprefix(IMAGE_TEXT).strip()
                studies.append(Study(*map(picture(file.images), record.images), query=question))
                answers.append(record.turns[0][1])
        written = []
        for first in range(0, len(studies), config.micro_batch):
            outputs = generate(libra, studies[first : first + config.micro_batch], max_new_tokens=config.max_new_tokens)
            written += [output[0].text for output in outputs]
        written, answers = processes.gather(written), processes.gather(answers)
        if not answers:
            raise ValueError("the validation records have no image to ask about: take out metrics, or give others")
        table = statistics(written, answers)
        if lacking := [name for name in config.metrics if ":" not in name and name not in table]:
            raise ValueError(f"metrics names {lacking[0]}, which needs more packages: see eval.py score --help")
        for name in config.metrics:
            module, colon, function = name.partition(":")
            scores[name] = (
                float(getattr(importlib.import_module(module), function)(answers, written))
                if colon else float(score_of(table[name].sum(0), len(written)))
            )  # fmt: skip
    for module, training in modes:
        module.training = training
    return scores


def picture(images: ImageFolder | ImageCache):
    """name -> what a Study takes: a path, or a frame of the cache, which framing leaves as it is."""
    return images.find if isinstance(images, ImageFolder) else lambda name: Image.fromarray(images.frame(name))


# ------------------------------------------------------------------------------------------ the run


def return_memory_at_once():
    """Tell glibc to give back every block of a megabyte when it is freed.

    By itself it learns to keep blocks of up to 32 MB, and activations of all sizes leave holes between them: a step of
    stage 1 on the random model of middle size takes 4.9 GiB so, and 7.9 without, in 3 % less time.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def run(arguments):
    config, resume = arguments
    processes, checkpoints = Processes(config.device), Checkpoints(config)
    main, out = processes.rank == 0, Path(config.out_dir)
    if processes.device == "cpu":
        return_memory_at_once()
    if checkpoints.files() and not resume:
        raise ValueError(f"{out} holds a run already: go on with --resume, or give another out_dir")
    if unknown := [name for name in config.metrics if name not in METRICS and ":" not in name]:
        raise ValueError(f"metrics names {unknown[0]!r}, neither module:function nor one of {', '.join(METRICS)}")
    if config.best not in ("loss", *config.metrics):
        raise ValueError(f"best is {config.best!r}, neither loss nor one of the metrics")
    if config.validate_every and not config.validation:
        raise ValueError("validate_every is set, and the config names no validation records")
    if main and config.new_decoder:
        new_parts(config)
    processes.sum(0)  # the others wait for it
    libra = build(replace(config, device=processes.device), progress("loading", "GiB", 2**30))
    weights, optimizer = trained(libra), make_optimizer(libra, config)
    rows = Rows(config, config.records, libra, progress("checking records"))
    held_out = Rows(config, config.validation, libra, progress("checking records")) if config.validate_every else None
    steps = Steps(config, rows, config.share_prefix and not find_template(libra.template).drops_question, processes)
    best = math.inf if config.best == "loss" else -math.inf
    first, best = checkpoints.load(libra, optimizer) if resume else (0, best)
    log, asked = Log(config, first, processes), Asked()
    log.begin(libra, rows, steps)
    autocast = lambda: torch.autocast(libra.device.type, torch.bfloat16, enabled=libra.device.type == "cuda")

    for step, batches in steps.batches(rows, first):
        done = step + 1
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_at(step, steps.count, config.warmup)
        torch.manual_seed(draw(config.seed, step, processes.rank))
        (labels,) = processes.sum(sum((batch.labels != IGNORED).sum() for _, batch in batches))  # of the global batch
        losses = []
        for _, batch in batches:
            with autocast():
                loss = loss_sum(libra, batch) / max(labels, 1)
            loss.backward()
            losses.append(float(loss.detach()))
        processes.sum_gradients(list(weights.values()))
        norm = float(torch.nn.utils.clip_grad_norm_(weights.values(), config.grad_clip or math.inf))
        (loss,) = processes.sum(sum(losses))
        if not math.isfinite(loss + norm):
            bad = [micro for (micro, _), value in zip(batches, losses, strict=True) if not math.isfinite(value)]
            names = ", ".join(str(name) for micro in bad for name in rows.ids(micro)) or "of another process, or none"
            raise ValueError(f"step {done}: the loss is {loss}, the gradient's norm {norm}; records: {names}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        log.step(done, dict(loss=loss, lr=optimizer.param_groups[0]["lr"], norm=norm), batches)
        if held_out and (done % config.validate_every == 0 or done == steps.count):
            with autocast():
                scores = validate(libra, config, held_out, processes)
            log.scores(done, scores)
            if (scores[config.best] < best) if config.best == "loss" else (scores[config.best] > best):
                best = scores[config.best]
                if main:
                    export(libra, config, out / "best")
        (leave,) = processes.sum(asked.to_leave)
        if main and (leave or done % config.save_every == 0 or done == steps.count):
            checkpoints.save(done, libra, optimizer, best)
        if leave and done < steps.count:
            print(f"train.py: stopped after step {done} of {steps.count}; --resume goes on", file=sys.stderr)
            raise KeyboardInterrupt
    if main:
        export(libra, config, out / "last")
        log.end()


class Asked:
    """Whether Ctrl-C or SIGTERM came, which lets a step end and saves; a second one ends at once."""

    def __init__(self):
        self.to_leave = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.hear)

    def hear(self, number, frame):
        if self.to_leave:
            raise KeyboardInterrupt
        self.to_leave = True


def draw(*key) -> int:
    """A seed from numbers: dropout depends on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")


PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # FLOP/s in bfloat16, dense


class Log:
    """A line for each log step on stdout and in log.jsonl, the loss as a picture, other trackers if asked."""

    def __init__(self, config: TrainConfig, first: int, processes: Processes):
        self.config, self.processes, self.out = config, processes, Path(config.out_dir)
        self.file, self.trackers, self.positions = self.out / "log.jsonl", [], 0
        if processes.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            lines = self.file.read_text().splitlines() if self.file.exists() and first else []
            with atomic(self.file) as file:  # what a killed run logged behind its checkpoint comes again
                file.writelines(f"{line}\n" for line in lines if json.loads(line)["step"] <= first)
            with atomic(self.out / "run.json") as file:
                json.dump(asdict(config), file, indent=1)
            self.trackers = [TRACKERS[name](config) for name in config.report_to]

    def begin(self, libra: Libra, rows: Rows, steps: Steps):
        self.learning = sum(parameter.numel() for parameter in trained(libra).values())
        self.frozen = sum(parameter.numel() for parameter in libra.parameters()) - self.learning
        self.steps, self.last, self.since = steps.count, time.monotonic(), 0
        if self.processes.rank:
            return
        plain = asdict(TrainConfig())
        changed = [f"{name}={value!r}" for name, value in asdict(self.config).items() if value != plain[name]]
        held = sum(parameter.nbytes for parameter in libra.parameters()) + 12 * self.learning
        duplicates = sum(checked.duplicates for checked in rows.checked)
        print(*changed)
        print(
            f"{'+'.join(self.config.train)} learns: {self.learning / 1e6:.2f} M parameters, {self.frozen / 1e6:.2f} M "
            f"are frozen; weights, gradients and optimizer {held / 2**30:.2f} GiB; {len(rows):,} records "
            f"({duplicates:,} with the id of an earlier one) in {len(steps.rows):,} rows; {steps.count:,} steps"
        )

    def step(self, done: int, values: dict, batches):
        self.positions += sum(int((batch.segments >= 0).sum()) for _, batch in batches)
        self.since += 1
        if done % self.config.log_every and done != self.steps:
            return
        (positions,) = self.processes.sum(self.positions)
        if self.processes.rank:
            self.positions = 0
            return
        seconds = time.monotonic() - self.last
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        peak = next((peak for chip, peak in PEAKS.items() if chip in name), None)
        values |= {"positions_per_second": positions / seconds}
        if peak:  # forward and backward 4 FLOP a parameter and position, and 2 more for its own gradient
            work = (4 * self.frozen + 6 * self.learning) * positions
            values |= {"mfu": work / seconds / peak / self.processes.count}
        left = (self.steps - done) * seconds / self.since
        shown = f"step {done}/{self.steps} loss {values['loss']:.4f} lr {values['lr']:.2e} norm {values['norm']:.3f}"
        shown += f" {positions / seconds:,.0f} positions/s" + (f" MFU {values['mfu']:.0%}" if peak else "")
        print(f"{shown} {left / 60:.0f} min left", flush=True)
        self.write(done, values)
        self.last, self.since, self.positions = time.monotonic(), 0, 0

    def scores(self, done: int, scores: dict[str, float]):
        if self.processes.rank == 0:
            print(f"step {done} validation: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            self.write(done, {f"validation {name}": value for name, value in scores.items()})

    def write(self, done: int, values: dict[str, float]):
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": done} | values) + "\n")
        for track in self.trackers:
            track(values, done)

    def end(self):
        lines = [json.loads(line) for line in self.file.read_text().splitlines()]
        names = {"loss": "training", "validation loss": "validation"}
        found = {shown: [(line["step"], line[name]) for line in lines if name in line] for name, shown in names.items()}
        with atomic(self.out / "loss.svg") as file:
            file.write(report.curves("loss", "step", {name: points for name, points in found.items() if points}))


def _tensorboard(config: TrainConfig):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("report_to names tensorboard: pip install tensorboard") from None
    writer = SummaryWriter(config.out_dir)
    return lambda values, step: [writer.add_scalar(name, value, step) for name, value in values.items()]


def _wandb(config: TrainConfig):
    try:
        import wandb
    except ImportError:
        raise ValueError("report_to names wandb: pip install wandb") from None
    started = wandb.init(project="nanolibra", dir=config.out_dir, config=asdict(config))
    return lambda values, step: started.log(values, step=step)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def main(arguments) -> int:
    try:
        return guard("train.py", run, arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
