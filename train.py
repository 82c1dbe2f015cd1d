"""Both training stages and full fine-tuning: align a connector, learn LoRA, or everything.

    python train.py configs/align.py --records=train.jsonl --image_folder=mimic-cxr-jpg
    torchrun --nproc-per-node 8 train.py configs/finetune_lora.py --key=value …

A run is its config: what happens in a step follows from (config, step) alone, so a checkpoint holds the trained
weights, the optimizer and the number of steps, and a run that goes on equals one that was never broken.
"""

import ast
import difflib
import re
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from plumbing.cli import fail, guard, progress
from plumbing.files import atomic


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
    fsdp: bool = False  # each of torchrun's processes keeps a part of the decoder's layers, which learn

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


RUNTIME = ("fsdp", "out_dir", "device", "workers", "log_every", "save_every", "keep")  # what a resumed run may change


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
import copy
import ctypes
import hashlib
import importlib
import itertools
import math
import pickle
import signal
import zipfile

import torch
import torch._dynamo  # by the first step of an optimizer otherwise, within the processes' group, which then never ends
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint as recompute

from attention import attention
from data import IGNORED, Batch, ImageCache, ImageFolder, Records, StepLoader, Study, TrainingSet
from decoder import Decoder, names_of
from evaluation.metrics import METRICS, score_of, statistics
from lora import PROJECTIONS, LoRAConfig, add_lora
from model import Libra, find_device
from plumbing import fresh as parts
from plumbing.distributed import (
    World,
    copy_full,
    full_tensor,
    init_distributed,
    is_sharded,
    local_tensor,
    shard,
    unsharded,
)
from plumbing.log import TRACKERS, Log
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
    if config.fsdp and "decoder" not in config.train:
        raise ValueError("fsdp is for training the decoder, which train does not name: leave it out")
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
    for parameter in trainable_parameters(libra).values():
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


def trainable_parameters(libra: Libra) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in libra.named_parameters() if parameter.requires_grad}


def make_optimizer(libra: Libra, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with the published groups: no decay of biases and norms, rates of their own for connector and encoder."""
    rates = {"connector": config.mm_projector_lr or config.lr, "encoder": config.encoder_lr or config.lr}
    norms = [f"{name}." for name, module in libra.named_modules() if "Norm" in type(module).__name__]
    groups: dict[tuple, list] = {}  # sharded parameters and others cannot be updated in one call
    for name, parameter in trainable_parameters(libra).items():
        decays = not (name.endswith("bias") or any(name.startswith(norm) for norm in norms))
        rate = rates.get(name.split(".")[0], config.lr)
        key = (rate, config.weight_decay if decays else 0.0, is_sharded(parameter))
        groups.setdefault(key, []).append(parameter)
    settings = [dict(params=held, lr=rate, peak=rate, weight_decay=decay) for (rate, decay, _), held in groups.items()]
    return torch.optim.AdamW(settings, betas=(0.9, config.beta2), eps=1e-8)


def lr_at(step: int, steps: int, warmup: float) -> float:
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


# ------------------------------------------------------------------------------------------ data


def open_training_set(config: TrainConfig, files: tuple[str, ...], libra: Libra, show=lambda done, total: None):
    if not files:
        raise ValueError("the config names no records")
    if bool(config.image_folder) == bool(config.image_cache):
        raise ValueError("the config must name one of image_folder and image_cache")
    kind, place = (ImageFolder, config.image_folder) if config.image_folder else (ImageCache, config.image_cache)
    images, template = kind(place, libra.pixels), find_template(libra.template)
    lengths = dict(image_positions=libra.image_positions, max_length=config.max_length)
    return TrainingSet(files, images, tokenizer=libra.tokenizer, template=template, progress=show, **lengths)


def open_loader(config: TrainConfig, rows: TrainingSet, libra: Libra, world: World) -> StepLoader:
    shares = config.share_prefix and not find_template(libra.template).drops_question
    names = ("batch_size", "micro_batch", "epochs", "max_steps", "seed", "workers")
    settings = {name: getattr(config, name) for name in names}
    return StepLoader(rows, world, max_shared=config.max_shared if shares else 1, even=config.fsdp, **settings)


# ------------------------------------------------------------------------------------------ checkpoints


class Checkpoints:
    """checkpoints/step-N.pt in out_dir: trained weights, optimizer, steps done, best score, config. Whole or absent.

    Tensors go by their names and are whole, so that any number of processes goes on, with fsdp or without.
    """

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.main, self.folder = config, world.rank == 0, Path(config.out_dir, "checkpoints")

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, libra: Libra, optimizer, best: float):
        """The state after `step` steps, which all processes must give; older checkpoints than the newest `keep` go."""
        state = dict(config=asdict(self.config), step=step, best=best, weights={}, optimizer={})
        for name, parameter in trainable_parameters(libra).items():
            moments = optimizer.state[parameter]
            state["weights"][name] = full_tensor(parameter.detach(), self.main)
            state["optimizer"][name] = {key: full_tensor(value, self.main) for key, value in moments.items()}
        if not self.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with atomic(self.folder / f"step-{step:07}.pt", "wb") as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:  # torch's writer has an error of its own for a full disk
            raise OSError(f"{self.folder} could not be written ({error}): is the disk full?") from None
        for file in self.files()[: -self.config.keep]:
            file.unlink()

    def load(self, libra: Libra, optimizer) -> tuple[int, float]:
        """(steps done, best score) of the newest checkpoint that is whole; ValueError where it is another run's."""
        for file in reversed(self.files()):
            try:  # mapped: of tens of GB each process reads what it needs
                state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
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
            weights, moments, ours = state["weights"], state["optimizer"], trainable_parameters(libra)
            same = weights.keys() == moments.keys() == ours.keys()
            if not same or any(weights[name].shape != ours[name].shape for name in ours):
                raise ValueError(f"{file} holds other weights than this config trains: use another out_dir")
            with torch.no_grad():
                for name, parameter in ours.items():
                    copy_full(parameter, weights[name])
                    optimizer.state[parameter] = {
                        key: value.clone() if key == "step" else copy_full(torch.empty_like(parameter), value)
                        for key, value in moments[name].items()
                    }
            return state["step"], state["best"]
        raise ValueError(f"{self.folder} holds no checkpoint to go on from: run without --resume")


def export(libra: Libra, config: TrainConfig, folder: Path, main: bool):
    """The main process writes what was trained, in the published layout, which `sample.py --model` reads."""
    if any(map(is_sharded, libra.decoder.parameters())):  # a model beside it then, with the whole decoder
        tensors = {name: full_tensor(parameter.detach(), main) for name, parameter in libra.decoder.named_parameters()}
        libra = copy.copy(libra)
        libra._modules = dict(libra._modules)
        with torch.device("meta"):
            libra.decoder = Decoder(libra.decoder.config)
        if main:
            libra.decoder.load_state_dict(tensors, assign=True)
    if not main:
        return
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
def validate(libra: Libra, config: TrainConfig, rows: TrainingSet, world: World) -> dict[str, float]:
    """Loss, and scores of written answers, over the first validation_records records."""
    count, modes = min(config.validation_records, len(rows)), [(module, module.training) for module in libra.modules()]
    libra.eval()
    mine = list(range(count))[world.rank :: world.size]
    total = labels = 0.0
    for first in range(0, len(mine), config.micro_batch):
        batch = rows.batch([[number] for number in mine[first : first + config.micro_batch]])
        total += float(loss_sum(libra, batch))
        labels += int((batch.labels != IGNORED).sum())
    total, labels = world.all_reduce(total, labels)
    scores = {"loss": total / max(labels, 1)}
    if config.metrics:
        studies, answers = [], []
        for number in mine:
            record = rows.record(number)
            if record.starts_with_image:
                question = record.turns[0][0].removeprefix(IMAGE_TEXT).strip()
                studies.append(Study(*map(picture(rows.images), record.images), query=question))
                answers.append(record.turns[0][1])
        written = []
        for first in range(0, len(studies), config.micro_batch):
            outputs = generate(libra, studies[first : first + config.micro_batch], max_new_tokens=config.max_new_tokens)
            written += [output[0].text for output in outputs]
        written, answers = (list(itertools.chain(*world.all_gather(texts))) for texts in (written, answers))
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
    """Tell glibc to give back every block of 16 megabytes when it is freed.

    By itself it learns to keep blocks of up to 32 MB, and activations of all sizes leave holes between them: a step of
    stage 1 on the random model of middle size takes 5.1 GiB so, and 7.9 without. Smaller blocks stay: fresh pages for
    each would cost the phantom a third of its time.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**24)  # M_MMAP_THRESHOLD


def run(config: TrainConfig, resume: bool, world: World):
    main, out, device = world.rank == 0, Path(config.out_dir), world.local_device(find_device(config.device))
    checkpoints = Checkpoints(config, world)
    check_config(config)
    if checkpoints.files() and not resume:
        raise ValueError(f"{out} holds a run already: go on with --resume, or give another out_dir")
    if device.type == "cpu":
        return_memory_at_once()
    if main and config.new_decoder:
        new_parts(config)
    world.barrier()
    libra = build(replace(config, device=str(device)), progress("loading", "GiB", 2**30))
    if config.fsdp and world.size > 1:
        shard(libra.decoder, libra.decoder.layers, world)
    weights, optimizer = list(trainable_parameters(libra).values()), make_optimizer(libra, config)
    checking = progress("checking records")
    rows = open_training_set(config, config.records, libra, checking)
    held_out = config.validate_every and open_training_set(config, config.validation, libra, checking)
    steps = open_loader(config, rows, libra, world)
    first, best = checkpoints.load(libra, optimizer) if resume else (0, math.inf * (1 if config.best == "loss" else -1))
    learning, frozen = sizes(libra)
    work = 4 * frozen + 6 * learning  # FLOP of a position; 2 of a parameter are for its own gradient
    log = Log(out, asdict(config), config.report_to, config.log_every, first, steps.num_steps, work, world)
    if main:
        describe(libra, config, rows, steps)
    asked = Asked()
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    for step, batches in steps.batches(first):
        done, losses = step + 1, []
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, steps.num_steps, config.warmup)
        torch.manual_seed(step_seed(config.seed, step, world.rank))
        (labels,) = world.all_reduce(sum((batch.labels != IGNORED).sum() for batch in batches))
        for batch in batches:
            with autocast():
                loss = loss_sum(libra, batch) / max(labels, 1)
            loss.backward()
            losses.append(float(loss.detach()))
        world.all_reduce_gradients(weights)
        norm = world.clip_grad_norm(weights, config.grad_clip or math.inf)
        (loss,) = world.all_reduce(sum(losses))
        if not math.isfinite(loss + norm):
            bad = [batch for batch, value in zip(batches, losses, strict=True) if not math.isfinite(value)]
            numbers = itertools.chain.from_iterable(row for batch in bad for row in batch.numbers)
            names = ", ".join(str(rows.record(number).id) for number in numbers) or "of another process, or none"
            raise ValueError(f"step {done}: the loss is {loss}, the gradient's norm {norm}; records: {names}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        positions = sum(int((batch.segments >= 0).sum()) for batch in batches)
        log.step(done, dict(loss=loss, lr=optimizer.param_groups[0]["lr"], norm=norm), positions, steps.seconds_waited)
        if held_out and (done % config.validate_every == 0 or done == steps.num_steps):
            with autocast(), unsharded(libra.decoder):
                scores = validate(libra, config, held_out, world)
            log.scores(done, scores)
            if (scores[config.best] < best) if config.best == "loss" else (scores[config.best] > best):
                best = scores[config.best]
                export(libra, config, out / "best", main)
        (leave,) = world.all_reduce(asked.to_leave)
        if leave or done % config.save_every == 0 or done == steps.num_steps:
            checkpoints.save(done, libra, optimizer, best)
        if leave and done < steps.num_steps:
            print(f"train.py: stopped after step {done} of {steps.num_steps}; --resume goes on", file=sys.stderr)
            raise KeyboardInterrupt
    export(libra, config, out / "last", main)
    if main:
        log.plot_loss()
    world.barrier()  # all is written then: were one to go down badly at its end, torchrun would stop the others


def check_config(config: TrainConfig):
    """ValueError where settings do not go together."""
    if unknown := [name for name in config.metrics if name not in METRICS and ":" not in name]:
        raise ValueError(f"metrics names {unknown[0]!r}, neither module:function nor one of {', '.join(METRICS)}")
    if config.best not in ("loss", *config.metrics):
        raise ValueError(f"best is {config.best!r}, neither loss nor one of the metrics")
    if config.validate_every and not config.validation:
        raise ValueError("validate_every is set, and the config names no validation records")
    if unknown := [name for name in config.report_to if name not in TRACKERS]:
        raise ValueError(f"report_to names {unknown[0]!r}, not one of {', '.join(TRACKERS)}")


def sizes(libra: Libra) -> tuple[int, int]:
    """(parameters that learn, parameters that are frozen)."""
    learning = sum(parameter.numel() for parameter in trainable_parameters(libra).values())
    return learning, sum(parameter.numel() for parameter in libra.parameters()) - learning


def describe(libra: Libra, config: TrainConfig, rows: TrainingSet, steps: StepLoader):
    """What differs from the defaults, what learns, what it takes."""
    plain, (learning, frozen) = asdict(TrainConfig()), sizes(libra)
    print(*(f"{name}={value!r}" for name, value in asdict(config).items() if value != plain[name]))
    tensors = [(local_tensor(parameter), parameter.requires_grad) for parameter in libra.parameters()]
    held = sum(tensor.nbytes + 12 * tensor.numel() * learns for tensor, learns in tensors)
    print(
        f"{'+'.join(config.train)} learns: {learning / 1e6:.2f} M parameters, {frozen / 1e6:.2f} M are frozen; "
        f"weights, gradients and optimizer {held / 2**30:.2f} GiB{' of each process' * config.fsdp}; "
        f"{len(rows):,} records ({rows.duplicates:,} with the id of an earlier one) in {len(steps.rows):,} rows; "
        f"{steps.num_steps:,} steps"
    )


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


def step_seed(*key) -> int:
    """A seed from numbers: dropout depends on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")


def main(arguments) -> int:
    with init_distributed() as world:
        return guard("train.py", lambda arguments: run(*arguments, world), arguments)


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
