"""Trains a Libra: its connector (stage 1), LoRA beside its language model (stage 2), or everything.

    python train.py configs/align.py --records=train.jsonl --image_folder=mimic-cxr-jpg
    torchrun --nproc-per-node 8 train.py configs/finetune_lora.py --key=value …

The records, the random numbers and the learning rate of a step follow from the config, the step's number and the number
of processes. So a checkpoint holds the trained weights, the optimizer's state, the number of steps, the best score and
the config, and a resumed run equals one that was never interrupted.
"""

if __name__ == "__main__":
    import plumbing.start  # noqa: F401 (first of all)


import argparse
import hashlib
import importlib
import itertools
import math
import os
import re
import signal
import sys
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

# Import it now: otherwise the first optimizer step imports it while the process group is up, and the group then never
# shuts down.
import torch._dynamo
from PIL import Image
from torch import nn
from torch.distributed.checkpoint import state_dict as states

from data import IGNORED, Batch, ImageCache, ImageFolder, Record, Records, StepLoader, Study, TrainingSet, check, ignore
from decoder import Decoder
from lora import LoRAConfig, lora_targets
from model import Libra
from plumbing import fresh
from plumbing.cli import Parser, guard, progress
from plumbing.distributed import World, init_distributed, is_sharded, shard, unsharded
from plumbing.families import names_of
from plumbing.fields import Count, CountOrZero, Positive, Range, Share, Size
from plumbing.files import only_writer_in
from plumbing.layout import find_device
from plumbing.log import Log
from plumbing.quantised import kind_of
from plumbing.resume import Checkpoints, checkpoint_files
from plumbing.settings import read_settings
from sample import generate
from tac import TAC, TACPart
from tokenizer import IMAGE_TEXT, find_template

# types of settings, with their bounds
Rate = Annotated[float, Range(0, 100)]
Part = Literal["connector", "lora", "decoder", "encoder"]


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. The comment after a field is its line in --help."""

    # the model to start from
    model: str = ""  # what to start from: a checkpoint, adapter or connector, as a folder, file or hub id
    base: str = ""  # the model under an adapter or a connector, instead of the one it records
    # … or the parts of a new model: stock ones, or with fresh weights
    decoder: str = ""  # instead of model: a stock language model, a folder or hub id; with encoder
    encoder: str = ""  # instead of model: a stock image encoder, a folder or hub id; with decoder
    new_decoder: dict = field(default_factory=dict)  # a Llama with fresh weights: fields of its config.json
    new_encoder: dict = field(default_factory=dict)  # a DINOv2 with fresh weights: fields of its config.json
    connector: str = "TAC"  # the new model's connector: TAC, linear, mlp2x_gelu, …
    connector_weights: str = ""  # weights that this connector starts from: an mm_*projector* file
    select_layer: Annotated[int, Range(-1000, 1000)] = -2  # the encoder layer that an MLP connector reads
    tac_without: tuple[TACPart, ...] = ()  # parts that a new TAC does not have, as tac.py names them, for ablations
    tac_layer_mean: Annotated[float, Range(0, 100)] = 0.0  # if not 0: its extractor starts as this times the mean layer
    tac_same_place: Annotated[float, Range(0, 100)] = 0.0  # if not 0: at first it subtracts the prior at each place
    tac_shallow: bool = False  # its last MLP starts as if it had two layers instead of four
    template: str = ""  # conversation template; by default the model's own
    pad: Literal["black", "mean", "none"] = "black"  # how images become square, also after training
    dicom_display: Literal["", "standard", "jpg"] = ""  # jpg: show DICOM as MIMIC-CXR-JPG did; by default the model's

    # what learns
    train: tuple[Part, ...] = ("connector",)  # the parts that learn: connector, lora, decoder, encoder
    lora_r: Size = 128  # LoRA's rank
    lora_alpha: Positive = 256.0  # LoRA's scale is lora_alpha / lora_r
    lora_dropout: Annotated[float, Range(0, 0.99)] = 0.05  # dropout before LoRA's first matrix
    lora_targets: tuple[str, ...] = ()  # projections that get a LoRA; by default all of them
    tac_dropout: Annotated[float, Range(0, 0.99)] = 0.1  # dropout in a TAC that learns; 0.1 is the published one

    # what it learns from
    records: tuple[str, ...] = ()  # training records: JSON lists or JSONL
    validation: tuple[str, ...] = ()  # records to validate with
    image_folder: str = ""  # the folder of the images that the records name
    strict: bool = False  # refuse a file with odd records, instead of leaving them out
    image_cache: str = ""  # instead of image_folder: what prepare.py cache made of it
    max_length: Size = 2048  # longest record in ids, an image counting as one; longer records are cut
    share_prefix: bool = True  # records with the same images share one prefix
    max_shared: Count = 8  # most records that share one prefix

    # how
    epochs: Positive = 1.0  # passes over the records
    max_steps: CountOrZero = 0  # end after this many steps, if not 0; the schedule ends there too
    batch_size: Count = 16  # records in a step, over all processes
    micro_batch: Count = 4  # rows in a forward pass of one process
    lr: Rate = 2e-5  # learning rate at the end of the warm-up
    mm_projector_lr: Rate = 0.0  # the connector's, if not 0
    encoder_lr: Rate = 0.0  # the encoder's, if not 0
    warmup: Share = 0.03  # share of the steps in which the learning rate rises; then it falls as a cosine
    weight_decay: Rate = 0.0  # of matrices; biases and norms never decay
    beta2: Annotated[float, Range(0, 0.9999999)] = 0.999  # AdamW's second decay rate; the first is 0.9
    grad_clip: Annotated[float, Range(0, 1e12)] = 1.0  # largest norm of the gradient; 0: no limit
    gradient_checkpointing: bool = False  # compute the decoder's layers twice to save memory
    fsdp: bool = False  # shard the decoder's layers, which must learn, over torchrun's processes
    seed: CountOrZero = 0  # of the order of the records, of dropout and of fresh weights

    # where, and what it writes
    out_dir: str = "out"  # checkpoints, logs, and the model in the published layout (last, best)
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of frozen weights
    workers: Annotated[int, Range(0, 1000)] = 2  # processes that load data, for each training process; 0: none
    log_every: Count = 10  # steps between log lines
    save_every: Count = 500  # steps between checkpoints
    keep: Count = 2  # newest checkpoints that are kept
    validate_every: CountOrZero = 0  # steps between validations; 0: none
    validation_records: Count = 256  # records of a validation, from the first on
    metrics: tuple[str, ...] = ()  # scores of written answers: BLEU4, ROUGE-L, … (as in eval.py), or module:function
    max_new_tokens: Size = 256  # longest answer that is written for them
    best: str = "loss"  # what decides which model is best: loss (lowest) or one of the metrics (highest)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()  # tensorboard, wandb: log there too


DEFAULTS = asdict(TrainConfig())
# what a resumed run may change
RUNTIME = ("strict", "fsdp", "out_dir", "device", "workers", "log_every", "save_every", "keep")


def check_config(config: TrainConfig):
    """Raises ValueError if settings are unknown or exclude each other, before anything takes time."""

    def require(condition, message: str):
        if not condition:
            raise ValueError(message)

    # 1) the model, and what learns of it
    has_parts = (config.decoder and config.encoder) or (config.new_decoder and config.new_encoder)
    require(config.model or has_parts, "the config names no model, nor both a decoder and an encoder")
    is_new_tac = config.connector == "TAC" and not config.model
    is_fresh_tac = is_new_tac and not config.connector_weights
    for name in ("tac_without", "tac_layer_mean", "tac_same_place", "tac_shallow"):
        fits = is_new_tac if name == "tac_without" else is_fresh_tac
        is_default = getattr(config, name) == DEFAULTS[name]
        require(is_default or fits, f"{name} is for a new TAC, but the config names another connector or its weights")
    # what connector a model has is only known when it is loaded, see choose_learning
    is_new_mlp = config.connector != "TAC" and not config.model
    is_default = config.tac_dropout == DEFAULTS["tac_dropout"]
    require(is_default or not is_new_mlp, f"tac_dropout {config.tac_dropout}: {config.connector} has no dropout")
    if config.template:
        find_template(config.template)
    require(config.train, "train names nothing that learns")
    require(not {"lora", "decoder"} <= set(config.train), "train names lora and decoder: give one of them")
    if config.dtype == "float16" and find_device(config.device).type == "cpu":
        raise ValueError("dtype float16 does not train on a CPU: give bfloat16 or float32")
    require("decoder" in config.train or not config.fsdp, "fsdp shards a decoder that learns: add it to train")

    # 2) the data
    require(config.records, "the config names no records")
    has_place = bool(config.image_folder) != bool(config.image_cache)
    require(has_place, "the config must name one of image_folder and image_cache")
    require(config.validation or not config.validate_every, "validate_every is set, but validation names no records")

    # 3) what is reported; the metrics are loaded here, because most of this file does not need them
    from evaluation.metrics import METRICS

    for name in config.metrics:
        # BERTScore needs a model of its own, which a training run does not load
        names = [metric for metric in METRICS if metric != "Bert_score"]
        is_known = name in names or ":" in name
        require(is_known, f"metrics names {name!r}, neither module:function nor one of {', '.join(names)}")
        if ":" in name:
            find_metric(name)
    require(config.best in ("loss", *config.metrics), f"best is {config.best!r}, neither loss nor one of the metrics")


# ------------------------------------------------------------------------------------------ the run


def run(config: TrainConfig, resume: bool, world: World):
    """Checks the settings and trains. Raises ValueError or OSError if that fails, KeyboardInterrupt after Ctrl-C."""
    check_config(config)
    if checkpoint_files(config.out_dir) and not resume:
        raise ValueError(f"{config.out_dir} holds a run already: continue it with --resume, or give another out_dir")
    # rank 0 writes for all ranks
    with only_writer_in(config.out_dir) if world.rank == 0 else nullcontext():
        train(config, resume, world)


def train(config: TrainConfig, resume: bool, world: World):
    """The training loop; errors as in `run`."""
    # 1) load the model, its optimizer and the data; rank 0 alone writes fresh weights
    out = Path(config.out_dir)
    device = world.local_device(find_device(config.device))
    if config.new_decoder and world.rank == 0:
        new_parts(config)
    world.barrier()
    show = progress("loading", "GiB", 2**30)
    libra = build(replace(config, device=str(device)), show)
    if config.fsdp and world.size > 1:
        # each rank will have parts of the layers' parameters in memory of their own
        libra.decoder.separate()
        shard(libra.decoder, libra.decoder.layers, world)
    weights = list(trainable_parameters(libra).values())
    optimizer = make_optimizer(libra, config)
    training_set = open_training_set(config, config.records, libra)
    if training_set.alone == len(training_set) and not {"lora", "decoder"} & set(config.train):
        parts = " and ".join(config.train)
        raise ValueError(f"none of {len(training_set):,} records shows an image, so {parts} can learn nothing")
    validation_set = None
    if config.validate_every:
        validation_set = open_training_set(config, config.validation, libra)
    loader = open_loader(config, training_set, world)
    steps = loader.num_steps

    # 2) resume, if what the checkpoints do not hold is still the same
    checksums = {"records": training_set.checksum, "frozen weights": frozen_checksum(libra)}
    if validation_set:
        checksums["validation records"] = validation_set.checksum
    checkpoints = Checkpoints(config, RUNTIME, libra, optimizer, world, checksums)
    first, best = 0, math.inf if config.best == "loss" else -math.inf
    if resume:
        first, best = checkpoints.load()

    # per position, a parameter takes 2 FLOP forward and 2 backward; one that learns 2 more for its own gradient
    learning = sum(parameter.numel() for parameter in weights)
    frozen = sum(parameter.numel() for parameter in libra.parameters()) - learning
    flops = 4 * frozen + 6 * learning
    log = Log(config, world, first_step=first, num_steps=steps, flops_per_position=flops)
    if world.rank == 0:
        describe(config, loader, learning, frozen)
    stop = StopRequest()
    # where frozen weights have 16 bits and weights that learn 32, as on a GPU, autocast computes with 16
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or libra.dtype.itemsize < 4)

    for step, batches in loader.batches(first):
        done = step + 1
        is_last = done == steps

        # 3) everything random and the learning rate follow from the step
        torch.manual_seed(step_seed(config.seed, step, world.rank))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, steps, config.warmup)

        # 4) loss and backward: the mean over the labels of all ranks, one micro-batch at a time
        (labels,) = world.all_reduce(sum(map(count_labels, batches)))
        losses = []
        for batch in batches:
            with autocast:
                loss = libra.loss(batch) / max(labels, 1)
            # a batch without an image does not reach the connector: it counts in the loss and has gradients of 0
            if loss.requires_grad:
                loss.backward()
            losses.append(float(loss.detach()))

        # 5) sum over ranks and clip; numbers that are not finite must not reach the weights
        world.all_reduce_gradients(weights)
        norm = world.clip_grad_norm(weights, config.grad_clip or math.inf)
        (loss,) = world.all_reduce(sum(losses))
        if not math.isfinite(loss + norm):
            names = name_records(training_set, batches, losses)
            raise ValueError(f"step {done}: the loss is {loss}, the gradient's norm {norm}; records: {names}")

        # 6) step
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 7) log
        positions = sum(map(count_positions, batches))
        values = dict(loss=loss, lr=optimizer.param_groups[0]["lr"], norm=norm)
        log.step(done, values, positions, loader.seconds_waited)

        # 8) validate, and keep the best model
        if validation_set and (is_last or done % config.validate_every == 0):
            with autocast, unsharded(libra.decoder):
                scores = validate(libra, config, validation_set, world)
            log.scores(done, scores)
            score = scores[config.best]
            if (score < best) if config.best == "loss" else (score > best):
                best = score
                export(libra, config, out / "best", world)

        # 9) save; all ranks stop if one of them was asked to
        (stops,) = world.all_reduce(stop.received)
        if stops or is_last or done % config.save_every == 0:
            checkpoints.save(done, best)
        if stops and not is_last:
            print(f"train.py: stopped after step {done} of {steps}; --resume continues it", file=sys.stderr)
            raise KeyboardInterrupt

    # 10) write the trained model
    export(libra, config, out / "last", world)
    if world.rank == 0:
        log.plot_loss()
    # wait until everything is written: if one rank crashes on exit, torchrun kills the others
    world.barrier()


class StopRequest:
    """Remembers Ctrl-C or SIGTERM, so that the current step ends and is saved. A second one interrupts at once."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = True


def step_seed(*key) -> int:
    """Makes a seed of a few numbers, such as (seed, step, rank)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:7], "little")  # torch takes 63 bits


def lr_at(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: a linear warm-up from 0, then half a cosine to 0 (scripts/pretrain.sh)."""
    rising = math.ceil(steps * warmup)
    if step < rising:
        return step / rising
    angle = math.pi * (step - rising) / (steps - rising)
    return 0.5 * (1 + math.cos(angle))


def count_labels(batch: Batch) -> int:
    return int((batch.labels != IGNORED).sum())


def count_positions(batch: Batch) -> int:
    return int((batch.segments >= 0).sum())  # padding has segment -1


def name_records(training_set: TrainingSet, batches: list, losses: list) -> str:
    """The ids of the records whose loss is not finite."""
    names = []
    for batch, loss in zip(batches, losses, strict=True):
        if math.isfinite(loss):
            continue
        for number in itertools.chain.from_iterable(batch.numbers):
            id = training_set.record(number).id
            names.append(training_set.place(number) if id is None else str(id))
    return ", ".join(names) or "of another process, or none"


def describe(config: TrainConfig, loader: StepLoader, learning: int, frozen: int):
    """Prints the settings that differ from the defaults, how many parameters learn, and from how many records."""
    for name, value in asdict(config).items():
        if value != DEFAULTS[name]:
            print(f"{name}={value!r}", end=" ")
    print()
    parts, records = "+".join(config.train), loader.training_set
    print(f"{parts} learns: {learning:,} parameters, {frozen:,} are frozen")
    odd = f"{records.duplicates:,} with an earlier one's id, {records.alone:,} without an image"
    print(f"{len(records):,} records ({odd}) in {len(loader.rows):,} rows")


# ------------------------------------------------------------------------------------------ the model and its data


def build(config: TrainConfig, show=lambda done, total: None) -> Libra:
    """Loads a config's model. What learns is float32; the rest is frozen, in the config's dtype and
    in evaluation mode.

    show(bytes done, bytes in all) is called while weights are read.
    """
    # fresh weights depend on the seed alone
    torch.manual_seed(config.seed)
    libra = load_model(config, show)
    find_template(libra.template)
    if kind := kind_of(libra.decoder):
        raise ValueError(f"{libra.base} has {kind} weights, which do not train: use the model that it was made from")
    if "encoder" in config.train and libra.encoder_files.is_open_clip:
        raise ValueError("an open_clip encoder cannot be trained: published checkpoints have no place for it")

    choose_learning(libra, config)
    return libra


def choose_learning(libra: Libra, config: TrainConfig):
    """Puts the parts that learn into training mode and float32; LoRA is added if it is one of them."""
    # 1) the parts that learn, in training mode
    for part in config.train:
        if part == "lora":
            targets = config.lora_targets or lora_targets(names_of(libra.config.json))
            targets = tuple(sorted(targets))
            libra.add_lora(LoRAConfig(config.lora_r, config.lora_alpha, targets, config.lora_dropout))
            libra.decoder.train()
        else:
            getattr(libra, part).requires_grad_(True).train()
    libra.decoder.gradient_checkpointing = config.gradient_checkpointing
    # a model's connector may be an MLP, which has no dropout
    if config.tac_dropout != DEFAULTS["tac_dropout"] and not isinstance(libra.connector, TAC):
        raise ValueError(f"tac_dropout {config.tac_dropout}: {libra.config.mm_projector_type} has no dropout")
    for module in libra.connector.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.tac_dropout

    # 2) 16 bits are too few to add up small updates
    for parameter in trainable_parameters(libra).values():
        parameter.data = parameter.data.float()


def load_model(config: TrainConfig, show) -> Libra:
    """Loads a whole model, or puts one together from a language model, an encoder and a connector."""
    # settings that config.json records for whoever loads the trained model
    changes = {"mm_image_pad": config.pad}
    if config.dicom_display:
        changes["mm_dicom_display"] = config.dicom_display
    if config.template:
        changes["mm_conversation_template"] = config.template
    if "encoder" in config.train:
        changes["unfreeze_mm_vision_tower"] = True
    options = dict(device=config.device, dtype=config.dtype, changes=changes, progress=show)

    if config.model:
        return Libra.from_pretrained(config.model, base=config.base or None, **options)
    # a fresh connector between two parts, which are stock ones or fresh too
    decoder, encoder = config.decoder, config.encoder
    if config.new_decoder:
        decoder, encoder = new_parts(config)
    options |= dict(connector_weights=config.connector_weights or None, select_layer=config.select_layer)
    options |= dict(without=config.tac_without)
    libra = Libra.from_parts(decoder, encoder, config.connector, **options)
    if config.connector == "TAC" and not config.connector_weights:
        _, positions = libra.encoder.split_positions()  # [1, N, C], of the patches
        libra.connector.start(positions[0], config.tac_layer_mean, config.tac_same_place, config.tac_shallow)
    return libra


def new_parts(config: TrainConfig) -> tuple[Path, Path]:
    """Writes a language model and an image encoder with fresh weights into out_dir/new. Returns their folders."""
    folder = Path(config.out_dir, "new")
    if (folder / "decoder").exists():
        return folder / "decoder", folder / "encoder"

    # the tokenizer learns from the records, and from the template often enough that its words become tokens
    template = find_template(config.template)
    texts = [template.start + template.open] * 1000
    for records in map(Records, config.records):
        check(records, Record, visit=lambda record: texts.extend(itertools.chain(*record.turns)), tell=ignore)
    fresh.write_encoder(folder / "encoder", config.new_encoder, seed=config.seed)
    fresh.write_decoder(folder / "decoder", config.new_decoder, texts, seed=config.seed)
    return folder / "decoder", folder / "encoder"


def trainable_parameters(libra: Libra) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in libra.named_parameters() if parameter.requires_grad}


def frozen_checksum(libra: Libra) -> int:
    """Tells other frozen weights from these. The same on every device, in float32 and in bfloat16."""
    checksum = 0
    for name, parameter in libra.named_parameters():
        if not parameter.requires_grad:
            # integers, because their sum does not depend on the order
            bits = parameter.bfloat16().view(torch.int16).sum(dtype=torch.int64)
            checksum = zlib.crc32(f"{name} {int(bits)}".encode(), checksum)
    return checksum


def make_optimizer(libra: Libra, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with the published groups (libra/train/libra_trainer.py, create_optimizer).

    Biases and norms do not decay; the connector and the encoder may have learning rates of their own.
    """
    rates = {"connector": config.mm_projector_lr or config.lr, "encoder": config.encoder_lr or config.lr}
    norms = [module for module in libra.modules() if "Norm" in type(module).__name__]
    in_norms = {parameter for module in norms for parameter in module.parameters()}

    groups: dict[tuple, dict] = {}
    for name, parameter in trainable_parameters(libra).items():
        part = name.split(".")[0]
        rate = rates.get(part, config.lr)
        decay = config.weight_decay
        if name.endswith("bias") or parameter in in_norms:
            decay = 0.0
        # sharded parameters and others cannot be updated in one call
        key = (rate, decay, is_sharded(parameter))
        if key not in groups:
            groups[key] = dict(params=[], lr=rate, peak=rate, weight_decay=decay)
        groups[key]["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, config.beta2), eps=1e-8)


def export(libra: Libra, config: TrainConfig, folder: Path, world: World):
    """Writes the trained model in the published layout, for `sample.py --model`. Every rank must call this."""
    # a sharded decoder is gathered on rank 0, and a second Libra has it beside everything else of the first
    if any(map(is_sharded, libra.decoder.parameters())):
        whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors = states.get_model_state_dict(libra.decoder, options=whole)
        with torch.device("meta"):
            decoder = Decoder(libra.decoder.config)
        if world.rank == 0:
            decoder.load_state_dict(tensors, assign=True)
        libra = libra.with_decoder(decoder)
    if world.rank != 0:
        return

    # only what was trained, if that has a place of its own
    if "lora" in config.train:
        libra.save_adapter(folder)
    elif config.train == ("connector",):
        libra.save_connector(folder)
    else:
        libra.save_pretrained(folder)
    if config.new_decoder:
        libra.save_parts(folder / "parts")


def open_training_set(config: TrainConfig, files: tuple[str, ...], libra: Libra) -> TrainingSet:
    """Opens and checks record files. Raises ValueError if an image is missing or no record is left."""
    if config.image_folder:
        images = ImageFolder(config.image_folder, libra.pixels)
    else:
        images = ImageCache(config.image_cache, libra.pixels)
    return TrainingSet(
        files,
        images,
        tokenizer=libra.tokenizer,
        template=find_template(libra.template),
        image_positions=libra.image_positions,
        max_length=config.max_length,
        image_text=libra.image_text,
        strict=config.strict,
        progress=progress("checking records"),
    )


def open_loader(config: TrainConfig, training_set: TrainingSet, world: World) -> StepLoader:
    """Plans the batches of every step."""
    names = ("batch_size", "micro_batch", "epochs", "max_steps", "seed", "workers")
    settings = {name: getattr(config, name) for name in names}
    max_shared = config.max_shared if config.share_prefix else 1
    # sharded layers are gathered by all ranks together, so all need as many forward passes
    return StepLoader(training_set, world, max_shared=max_shared, even=config.fsdp, **settings)


# ------------------------------------------------------------------------------------------ validation


@torch.no_grad()
def validate(libra: Libra, config: TrainConfig, dataset: TrainingSet, world: World) -> dict[str, float]:
    """Returns the loss, and the scores of written answers, over the first `validation_records` records."""
    learning = [module for module in libra.modules() if module.training]
    libra.eval()
    count = min(config.validation_records, len(dataset))
    mine = list(range(count))[world.rank :: world.size]

    # 1) the mean loss of all labels, without sharing prefixes
    total = labels = 0.0
    for first in range(0, len(mine), config.micro_batch):
        numbers = mine[first : first + config.micro_batch]
        batch = dataset.batch([[number] for number in numbers])
        total += float(libra.loss(batch))
        labels += count_labels(batch)
    total, labels = world.all_reduce(total, labels)
    scores = {"loss": total / max(labels, 1)}

    # 2) written answers
    if config.metrics:
        references, predictions = write_answers(libra, config, dataset, mine)
        references = list(itertools.chain(*world.all_gather(references)))
        predictions = list(itertools.chain(*world.all_gather(predictions)))
        scores |= score_answers(config.metrics, references, predictions)

    # back to training
    for module in learning:
        module.training = True
    return scores


def write_answers(libra: Libra, config: TrainConfig, dataset: TrainingSet, numbers: list):
    """Answers the first question of the records that start with an image. Returns (references, predictions)."""
    studies, references = [], []
    for number in numbers:
        record = dataset.record(number)
        if record.starts_with_image:
            question, answer = record.turns[0]
            if isinstance(dataset.images, ImageFolder):
                images = map(dataset.images.find, record.images)
            else:
                # a cached frame has the model's size already, and preprocessing leaves it as it is
                images = map(Image.fromarray, map(dataset.images.frame, record.images))
            query = question.removeprefix(IMAGE_TEXT).strip()
            studies.append(Study(*images, query=query))
            references.append(answer)

    predictions = []
    for first in range(0, len(studies), config.micro_batch):
        batch = studies[first : first + config.micro_batch]
        outputs = generate(libra, batch, max_new_tokens=config.max_new_tokens)
        predictions += [sequences[0].text for sequences in outputs]
    return references, predictions


def score_answers(metrics, references: list[str], predictions: list[str]) -> dict[str, float]:
    """Scores answers by eval.py's metrics, and by functions (references, predictions) named as module:function."""
    from evaluation.metrics import score_of, statistics

    if not references:
        raise ValueError("the validation records have no image to ask about: take out metrics, or give others")
    table = statistics(predictions, references)
    scores = {}
    for name in metrics:
        if ":" in name:
            scores[name] = float(find_metric(name)(references, predictions))
        elif name in table:
            sums = table[name].sum(0)
            scores[name] = float(score_of(sums, len(predictions)))
        else:
            raise ValueError(f"metrics names {name}, which needs more packages: see eval.py score --help")
    return scores


def find_metric(name: str):
    """module:function -> the function. Raises ValueError if there is none."""
    module, function = name.split(":", 1)
    try:
        metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"metrics names {name}, which cannot be imported ({error})") from None
    if not callable(metric):
        raise ValueError(f"metrics names {name}, which is no function")
    return metric


# ------------------------------------------------------------------------------------------ command line


def parse(arguments: list[str] | None) -> tuple[TrainConfig, bool]:
    """Reads a command line. Returns (config, resume); prints help or a mistake and exits."""
    parser = Parser(prog="train.py", usage="train.py configs/NAME.py [--key=value …] [--resume]")
    parser.add_argument("config", help="a file of assignments to the keys below, such as configs/align.py")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in out_dir")
    # a flag for each setting; its help is the comment after it in this file
    source = Path(__file__).read_text(encoding="utf-8")
    for name, comment in re.findall(r"^    (\w+): .* = .+?  # (.+)$", source, re.MULTILINE):
        text = f"{comment} (default: {DEFAULTS[name]!r})"
        parser.add_argument(f"--{name}", metavar="", default=argparse.SUPPRESS, help=text)

    settings = vars(parser.parse_args(arguments))
    path, resume = settings.pop("config"), settings.pop("resume")
    try:
        return TrainConfig(**read_settings(TrainConfig, path, settings)), resume
    except ValueError as error:
        parser.error(error)


def main(arguments: list[str] | None = None) -> int:
    config, resume = parse(arguments)
    with init_distributed() as world:
        status = guard("train.py", lambda config: run(config, resume, world), config)
        if config.fsdp and world.size > 1:
            # DTensor keeps the process group, whose gloo threads abort a normal exit now and then (torch 2.13)
            sys.stdout.flush()
            os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
