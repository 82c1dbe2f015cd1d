"""What `python -m bench gpu` checks and measures, a function each: (card, arguments) -> figures.

A check returns `ok`, whether its results are right; without it, it measures only. It raises Missing if what it needs is
not there. On a CPU it runs on toy sizes.
"""

import contextlib
import gc
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import kernel
import train
from attention import attention
from bench import costs, sides
from data import IGNORED, Study
from decoder import Cache, Decoder, DecodingStep
from encoder import Encoder, encoder_config
from model import Libra
from plumbing import fresh
from plumbing.cli import follow_parent
from plumbing.distributed import World, shard, unsharded
from plumbing.families import decoder_config
from plumbing.log import read_log
from plumbing.quantised import Int8Linear, plain_linear, quantise_linears
from sample import Options, decode, generate, prefill
from tac import TAC

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SEVEN = GOLDEN / "libra-7b" / "model"


class Missing(Exception):
    """What a check needs is not there."""


@dataclass(frozen=True)
class Card:
    """The device of a check. On a CPU everything is small."""

    device: str  # cuda or cpu

    @property
    def is_toy(self) -> bool:
        return self.device == "cpu"

    @property
    def gpu(self) -> str | None:
        """Its row in costs.GPUS; None: its peak is not known."""
        return None if self.is_toy else costs.find_gpu(torch.cuda.get_device_name())

    @property
    def dtype(self) -> torch.dtype:
        """The type of frozen weights in training."""
        return torch.float32 if self.is_toy else torch.bfloat16

    def share_of_peak(self, flops: float, seconds: float) -> float | None:
        return flops / seconds / costs.peak_flops(self.gpu) if self.gpu else None

    def wait(self):
        if not self.is_toy:
            torch.cuda.synchronize()

    def seconds(self, function: Callable, calls: int = 10) -> float:
        """Seconds of a call: the median of three series, each measured as a whole, after some calls that warm up."""
        calls, series = (1 if self.is_toy else calls), []
        for number in range(4):
            self.wait()
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            self.wait()
            if number:
                series.append((time.perf_counter() - begin) / calls)
        return statistics.median(series)


def relative(out: torch.Tensor, reference: torch.Tensor) -> float:
    """The relative error of a whole tensor, in float64."""
    reference = reference.to(out.device, torch.float64)
    return float((out.double() - reference).norm() / reference.norm().clamp(min=1e-300))


def machine(card: Card) -> dict:
    """The first line of the file."""
    facts = dict(device="cpu", gpu=None, cards=0, gigabytes=None, capability=None)
    if not card.is_toy:
        its = torch.cuda.get_device_properties(0)
        facts = dict(device=its.name, gpu=card.gpu, cards=torch.cuda.device_count())
        facts |= dict(gigabytes=its.total_memory / 1e9, capability=[its.major, its.minor])
    # which version of the program this is, without git
    digest = hashlib.sha256()
    for file in sorted([*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("bench/*.py")]):
        digest.update(file.read_bytes())
    triton = kernel.triton and kernel.triton.__version__
    versions = dict(torch=torch.__version__, triton=triton, cuda=torch.version.cuda, hip=torch.version.hip)
    versions |= dict(python=platform.python_version(), program=digest.hexdigest()[:12])
    return facts | versions | dict(date=time.strftime("%Y-%m-%d %H:%M:%S %Z"))


# ------------------------------------------------------------------------------------------ 1: exactness


def golden_folders(card: Card) -> dict[str, Path]:
    """Family -> folder of a tiny checkpoint and of what the published code computes with it."""
    roots = [GOLDEN]
    if os.environ.get("GOLDEN_DIR") and not card.is_toy:
        roots.append(Path(os.environ["GOLDEN_DIR"]))
    return {model.parent.name: model.parent for root in roots for model in sorted(root.glob("*/model"))}


def golden_cases(card: Card, folder: Path):
    """Yields (expected.json, its tensors, the study) of a family's cases whose images are at hand."""
    for file in sorted(folder.glob("case*/expected.json")):
        case = json.loads(file.read_text())
        images = [folder.parent / "images" / name for name in (case["current"], case["prior"]) if name]
        if all(image.exists() for image in images):
            yield case, load_file(file.with_suffix(".safetensors")), Study(*images, query=case["query"])
            if card.is_toy:
                return


def golden_ids(card: Card) -> dict:
    """Token ids, greedy and beams, equal those of the published code in float32; so do logits, nearly."""
    differing, cases, worst = [], 0, 0.0
    for family, folder in golden_folders(card).items():
        libra = Libra.from_pretrained(folder / "model", device=card.device, dtype="float32")
        for case, expected, study in golden_cases(card, folder):
            cases += 1
            logits = prefill(libra, [study], case["template"]).logits[0]
            worst = max(worst, relative(logits, expected["last_logits"]))
            options = dict(max_new_tokens=case["max_new_tokens"], template=case["template"])
            settings = {name: value for name, value in case["beam"].items() if name != "outputs"}
            for label, some, outputs in (
                ("greedy", {}, [case["greedy"]]),
                ("beams", settings, case["beam"]["outputs"]),
            ):
                ours = [output.token_ids for output in generate(libra, study, **options, **some)]
                if ours != [without_padding(output["token_ids"]) for output in outputs]:
                    differing.append(f"{family}, {case['current']}, {label}")
    ok = cases > 0 and not differing and worst < 1e-4
    return dict(ok=ok, cases=cases, differing=differing, worst_relative_error_of_logits=worst)


def without_padding(ids: list[int]) -> list[int]:
    """Golden beams may end with pad ids, which are 0."""
    while ids and ids[-1] == 0:
        ids = ids[:-1]
    return ids


def golden_batch(card: Card) -> dict:
    """Studies in a batch give what each gives alone, in float32."""
    batch = json.loads((GOLDEN / "batch" / "expected.json").read_text())
    studies = []
    for names, query in zip(batch["images"], batch["queries"], strict=True):
        studies.append(Study(*[GOLDEN / "images" / name for name in names if name], query=query))
    libra = Libra.from_pretrained(SEVEN, device=card.device, dtype="float32")
    options = dict(max_new_tokens=max(map(len, batch["single"])), no_repeat_ngram=3)
    together = [outputs[0].token_ids for outputs in generate(libra, studies, **options)]
    alone = [generate(libra, study, **options)[0].token_ids for study in studies]
    return dict(ok=together == alone == batch["single"], studies=len(studies), equal_alone=together == alone)


def golden_bfloat16(card: Card) -> dict:
    """In bfloat16 the logits of the first token are near the published ones of float32."""
    errors = {}
    for family, folder in golden_folders(card).items():
        libra = Libra.from_pretrained(folder / "model", device=card.device, dtype="bfloat16")
        for case, expected, study in golden_cases(card, folder):
            logits = prefill(libra, [study], case["template"]).logits[0]
            errors[family] = max(errors.get(family, 0.0), relative(logits, expected["last_logits"]))
    return dict(ok=max(errors.values()) < 0.1, relative_errors=errors)


def int8_layer(card: Card) -> dict:
    """The int8 layer, whatever kernel computes it, beside plain numbers in float64; and its speed beside bfloat16."""
    rows, columns = (48, 64) if card.is_toy else (11008, 4096)
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=False, device=card.device)
    layer = Int8Linear(linear).requires_grad_(False)
    linear = linear.bfloat16().requires_grad_(False)
    figures = dict(shape=[rows, columns], rows={})
    for count in (1, 10, 160) if card.is_toy else (1, 7, 10, 160, 1431):
        x = torch.randn(count, columns, device=card.device)
        exact = plain_linear(x.double(), layer.weight, layer.weight_scale)
        x = x.bfloat16()
        figures["rows"][count] = dict(
            relative_error=relative(layer(x), exact),
            microseconds=1e6 * card.seconds(lambda x=x: layer(x)),
            plain_microseconds=1e6 * card.seconds(lambda x=x: plain_linear(x, layer.weight, layer.weight_scale)),
            bfloat16_microseconds=1e6 * card.seconds(lambda x=x: linear(x)),
        )
    ok = all(row["relative_error"] < 0.01 for row in figures["rows"].values())
    return dict(ok=ok, **figures)


# ------------------------------------------------------------------------------------------ 2: the attention kernel

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHARED = [0] * 70 + [1] * 9 + [2] * 40 + [3] * 11 + [-1] * 5
PLACES = [*range(70), *range(70, 79), *range(70, 110), *range(70, 81), *[0] * 5]


def masks(device) -> list[tuple]:
    """(name, queries, keys, arguments of `attention`), at odd lengths."""
    segments = torch.tensor([SHARED, [0] * 3 + [1] * 66 + [2] * 66], device=device)
    positions = torch.tensor([PLACES, [*range(3), *range(3, 69), *range(3, 69)]], device=device)
    return [
        ("no mask", 67, 131, {}),
        ("causal", 135, 135, dict(causal=True)),
        ("causal behind cached keys", 9, 135, dict(causal=True)),
        ("segments", 135, 135, dict(segments=segments)),
        ("segments behind cached keys", 51, 135, dict(segments=segments)),
        ("window", 135, 135, dict(window=40)),
        ("window behind cached keys", 51, 135, dict(window=7)),
        ("segments and window", 135, 135, dict(segments=segments, window=40, positions=positions)),
    ]


def attention_numerics(card: Card, dtype: str, sizes: list[int]) -> dict:
    """The kernel, forward and backward, beside plain attention in float64: head sizes, and every mask."""
    impl, type_, worst, wrong = fused_impl(card), getattr(torch, dtype), {}, []
    for D in sizes:
        for name, T, S, mask in masks(card.device):
            torch.manual_seed(0)
            # [B, T, H, D] in memory, as the projections of a layer leave it; two query heads share a key head
            shapes = ((2, T, 4, D), (2, S, 2, D), (2, S, 2, D))
            inputs = [torch.randn(shape, device=card.device).mul(1.5).to(type_) for shape in shapes]
            gradient = torch.randn(2, 4, T, D, device=card.device).to(type_)
            numbers = [with_gradients(inputs, gradient, impl, mask)]
            numbers.append(with_gradients([x.double() for x in inputs], gradient.double(), "torch", mask))
            for part, ours, exact in zip(("out", "dq", "dk", "dv"), *numbers, strict=True):
                error = relative(ours, exact)
                worst[D] = max(worst.get(D, 0.0), error)
                if not error < LIMITS[type_]:
                    wrong.append(f"head size {D}, {name}, {part}: {error:.1e}")
    return dict(ok=not wrong, impl=impl, limit=LIMITS[type_], worst_relative_error=worst, wrong=wrong)


def fused_impl(card: Card) -> str:
    """The kernel's name in `attention`. Without a GPU, PyTorch's: then only the check itself is checked."""
    if kernel.kernel_available(card.device) or kernel.interpreted():
        return "triton"
    if not card.is_toy:
        raise Missing("the kernel needs Triton and an AMD GPU or an NVIDIA GPU from Ampere on")
    return "torch"


def with_gradients(inputs, gradient, impl: str, mask: dict) -> list[torch.Tensor]:
    """The output of attention, and the gradients of q, k and v."""
    inputs = [x.transpose(1, 2).detach().requires_grad_() for x in inputs]
    out = attention(*inputs, impl=impl, **mask)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def long_masks(device) -> list[tuple]:
    """(name, positions, arguments of `attention`, visible pairs of a query and a key) at the sizes of the 7B model."""
    # four questions of 150 positions behind a pair of images and its prompt
    segments = torch.tensor([1431 * [0] + 150 * [1] + 150 * [2] + 150 * [3] + 150 * [4]], device=device)
    shared = 1431**2 / 2 + 4 * (150 * 1431 + 150**2 / 2)
    return [
        ("causal, 2,048 positions", 2048, dict(causal=True), 2048**2 / 2),
        ("4 × 150 behind 1,431", 2031, dict(segments=segments), shared),
        ("causal, 4,096 positions, window 1,024", 4096, dict(causal=True, window=1024), 4096 * 1024 - 1024**2 / 2),
    ]


def attention_speed(card: Card) -> dict:
    """The kernel beside PyTorch's attention: 4 rows, 32 heads of 128, bfloat16; seconds, and shares of the peak."""
    B, H, D = (1, 1, 16) if card.is_toy else (4, 32, 128)
    impls = {fused_impl(card), "torch"}
    rows = {}
    for name, T, mask, pairs in long_masks(card.device)[: 1 if card.is_toy else None]:
        q, k, v = (torch.randn(B, H, T, D, device=card.device, dtype=torch.bfloat16) for _ in range(3))
        flops, row = 4 * B * H * D * pairs, {}
        for impl in impls:
            forward = partial(attention, q, k, v, impl=impl, **mask)
            # the backward pass computes five products where the forward pass computes two
            both = partial(with_gradients, [x.transpose(1, 2) for x in (q, k, v)], torch.ones_like(q), impl, mask)
            for part, function, work in (("forward", forward, flops), ("both", both, 3.5 * flops)):
                seconds = card.seconds(function)
                row[f"{impl}_{part}_ms"] = 1e3 * seconds
                row[f"{impl}_{part}_share_of_peak"] = card.share_of_peak(work, seconds)
        rows[name] = row
    return dict(masks=rows)


# ------------------------------------------------------------------------------------------ 3: decoding

TOY_ENCODER = costs.RAD_DINO | dict(image_size=56, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
TOY_DECODER = dict(model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, intermediate_size=96, vocab_size=900)  # fmt: skip
loaded: dict[str, Libra] = {}  # the one random model of this process, by its kind: making it takes seconds


def random_libra(card: Card, kind: str) -> Libra:
    """RAD-DINO, TAC and Llama 7B with random weights, made on the card.

    kind: bfloat16 or int8, to decode; connector or lora, the part that learns in training.
    """
    if kind not in loaded:
        unload()
        loaded[kind] = make_libra(card, kind)
    return loaded[kind]


def unload():
    loaded.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# not in inference mode, in which it may be called: what is made there can neither be trained nor compiled
@torch.inference_mode(False)
@torch.no_grad()
def make_libra(card: Card, kind: str) -> Libra:
    is_trained = kind in ("connector", "lora")
    dtype = card.dtype if is_trained else torch.bfloat16
    config = decoder_config(TOY_DECODER if card.is_toy else costs.MODELS["7b"], "7b")
    torch.manual_seed(0)
    # 1) the decoder never exists outside the card
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
    decoder.to_empty(device=card.device)
    for weight in decoder.parameters():
        nn.init.ones_(weight) if weight.ndim == 1 else nn.init.normal_(weight, 0, 0.02)

    # 2) encoder and connector are small
    encoder = Encoder(encoder_config(TOY_ENCODER if card.is_toy else costs.RAD_DINO, "RAD-DINO", {}))
    fresh.init_weights(encoder, seed=0)
    sizes = encoder.config
    connector = TAC(sizes.num_hidden_layers, sizes.hidden_size, config.num_attention_heads, config.hidden_size)

    # 3) everything else is a tiny checkpoint's; its tokenizer passes over ids that it does not have
    tiny = Libra.from_pretrained(SEVEN, device="cpu", dtype="float32")
    settings = {name: getattr(tiny, name) for name in signature(Libra).parameters}
    settings |= dict(encoder=encoder.to(card.device, dtype), connector=connector.to(card.device, dtype))
    settings |= dict(decoder=decoder, pixels=replace(tiny.pixels, size=sizes.image_size, crop=sizes.image_size))
    libra = Libra(**settings).eval().requires_grad_(False)
    libra.vocabulary = config.vocab_size
    libra.eos_token_ids = []  # every report has its full length
    if kind == "int8":
        quantise_linears(decoder, kind)
    decoder.join()
    if is_trained:
        train.choose_learning(libra, train.TrainConfig(train=(kind,)))
    return libra


def step_bytes(libra: Libra, cache: Cache) -> int:
    """Bytes that a decoding step must read: all weights but the table of embeddings, and all keys and values."""
    size = lambda tensor: tensor.numel() * tensor.element_size()
    weights = sum(map(size, libra.decoder.parameters())) - size(libra.decoder.embed_tokens.weight)
    keys, _ = cache.prefix[0]
    B, H, _, D = keys.shape
    K = cache.suffix[0].shape[3]
    positions = int(cache.lengths.sum()) + B * K * cache.steps
    return weights + positions * 2 * len(cache.prefix) * H * D * keys.element_size()


class Step(NamedTuple):
    """A decoding step of fixed shape: it may be repeated, because nobody counts the position that it adds."""

    libra: Libra
    cache: Cache
    run: Callable
    search_ms: float  # a token of the whole search, which chooses tokens and moves beams, too


@torch.inference_mode()
def make_step(card: Card, dtype: str, studies: int, beams: int) -> Step:
    """Prefills random studies, searches once, and stops behind half of a report."""
    libra = random_libra(card, dtype)
    tokens = 6 if card.is_toy else costs.REPORT
    side = libra.pixels.crop
    pixels = torch.randn(2, 3, side, side, device=card.device, dtype=libra.dtype)
    # the prompt has about as many ids as in the published test set
    some = [Study("", query="no " * (costs.PROMPT - 25)) for _ in range(studies)]
    options = Options(num_beams=beams, max_new_tokens=tokens)
    prefix = prefill(libra, some, options=options, pixels=[pixels] * studies)

    # 1) the whole search, as a user runs it; a first, shorter one warms up
    decode(libra, prefix, replace(options, max_new_tokens=3))
    card.wait()
    begin = time.perf_counter()
    outputs = decode(libra, prefix, options)
    card.wait()
    seconds = time.perf_counter() - begin
    if len(outputs[0][0].token_ids) != tokens:
        raise ValueError(f"a report has {len(outputs[0][0].token_ids)} tokens, not {tokens}")

    # 2) half of a report behind every beam
    cache = prefix.cache
    cache.start(beams)
    for _ in range(tokens // 2):
        libra.decode_step(cache, [[5] * beams] * studies)
    embeddings = libra.decoder.embed_tokens(torch.full((studies, beams), 5, device=card.device))  # [B, K, hidden]
    positions = (cache.lengths[:, None] + cache.steps).expand(-1, beams)  # [B, K]

    @torch.inference_mode()
    def run():
        return libra.logits(libra.decoder(embeddings, positions, DecodingStep(cache), cache.lengths))

    return Step(libra, cache, run, 1e3 * seconds / tokens)


def decode_ms(card: Card, dtype: str, studies: int, beams: int, mode: str) -> dict:
    """Milliseconds of a decoding step of the random 7B, beside the time to read its bytes from memory once."""
    if mode == "graph" and card.is_toy:
        raise Missing("CUDA graphs need a GPU")
    decoder = random_libra(card, dtype).decoder
    # the model is used by other checks, too
    decoder.compiled_step = None
    if mode == "compiled":
        # a toy is not worth a C++ compiler's time
        decoder.compile_step(backend="eager" if card.is_toy else "inductor")
    step = make_step(card, dtype, studies, beams)
    run, figures = step.run, {}
    if mode == "graph":
        graph = capture(step.run)
        run = graph.replay
    else:
        figures = dict(search_ms=step.search_ms, launches=count_launches(card, step.run))
    milliseconds = 1e3 * card.seconds(run)
    size = step_bytes(step.libra, step.cache)
    floor = 1e3 * size / costs.GPUS[card.gpu].bandwidth if card.gpu else None
    figures |= dict(step_ms=milliseconds, gigabytes=size / 1e9, floor_ms=floor)
    if floor:
        figures["times_the_floor"] = milliseconds / floor
        if "search_ms" in figures:
            figures["search_times_the_floor"] = figures["search_ms"] / floor
            # what `costs.plan` assumes: the share of the bandwidth that a whole search reaches
            if dtype == "bfloat16" and mode == "eager" and studies == costs.BATCH:
                figures["share"] = {costs.bandwidth_of(beams): floor / figures["search_ms"]}
    return figures


def capture(run: Callable) -> torch.cuda.CUDAGraph:
    """Records the launches of a function, to be replayed without Python."""
    # what is made in the first calls must not be part of the recording
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def count_launches(card: Card, run: Callable) -> int | None:
    """Kernels that a call launches; on a CPU the operators that it calls."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not card.is_toy:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    run()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        card.wait()
    if card.is_toy:
        return sum(event.cpu_parent is None and event.name.startswith("aten::") for event in profile.events())
    # the driver's own call launches Triton's kernels
    launches = sum(event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for event in profile.events())
    return launches or None  # a profiler that sees no launch does not work here


@torch.inference_mode()
def first_token(card: Card) -> dict:
    """Milliseconds to the first token of a study, in bfloat16: encoder and connector, then the prefill."""
    libra = random_libra(card, "bfloat16")
    side = libra.pixels.crop
    pixels = torch.randn(2, 3, side, side, device=card.device, dtype=libra.dtype)
    study = Study("", query="no " * (costs.PROMPT - 25))
    run = partial(prefill, libra, [study], options=Options(max_new_tokens=8), pixels=[pixels])
    positions = int(run().cache.lengths[0])
    seconds = card.seconds(run, calls=3)
    images = card.seconds(lambda: libra.embed_images(pixels), calls=3)
    work = costs.Costs(libra.encoder.config, libra.decoder.config)
    flops = work.encode() + work.connect() + work.prefill(positions)
    share = card.share_of_peak(flops, seconds)
    figures = dict(positions=positions, milliseconds=1e3 * seconds, images_ms=1e3 * images, share_of_peak=share)
    return figures | ({"share": {"first token": share}} if share else {})


# ------------------------------------------------------------------------------------------ 4: training


def training_step(card: Card, work: str, shared: bool = True, checkpointing: bool = False) -> dict:
    """A training step of the random 7B, under autocast: rows a second, share of the peak (MFU), peak memory.

    work: a row of sides.TRAINING. step and questions train the connector (stage 1), lora is stage 2.
    """
    libra = random_libra(card, "lora" if work == "lora" else "connector")
    libra.decoder.gradient_checkpointing = checkpointing
    batch = sides.training_batch(libra, work, shared)
    labels = int((batch.labels != IGNORED).sum())
    learning = libra.decoder if work == "lora" else libra.connector
    step = sides.training_step(learning, lambda: libra.loss(batch) / labels)
    if not card.is_toy:
        torch.cuda.reset_peak_memory_stats()
    seconds = card.seconds(step, calls=2)
    loss, norm = step()

    pairs, questions = sides.TRAINING[work]
    rows = len(batch.ids)
    flops = costs.Costs(libra.encoder.config, libra.decoder.config).step(pairs * questions // rows, work == "lora")
    mfu = card.share_of_peak(rows * flops, seconds)
    figures = dict(rows=rows, positions=batch.ids.numel(), seconds_a_step=seconds, rows_a_second=rows / seconds)
    figures |= dict(records_a_second=pairs * questions / seconds, mfu=mfu, loss=loss, norm=norm)
    figures["peak_gigabytes"] = None if card.is_toy else torch.cuda.max_memory_allocated() / 1e9
    if mfu and not checkpointing and shared and work in ("questions", "lora"):
        figures["share"] = {"stage 2" if work == "lora" else "stage 1": mfu}
    return dict(ok=math.isfinite(loss + norm), **figures)


STAGES = {"connector": {}, "lora": dict(lora_r=4, lora_alpha=8.0, lora_dropout=0.0)}


def tiny_run(stage: str, device: str, **settings) -> train.TrainConfig:
    """The settings of a training run of a tiny checkpoint."""
    records = str(GOLDEN / "training" / "records.json")
    settings = dict(records=(records,), image_folder=str(GOLDEN / "images"), device=device, workers=0) | settings
    return train.TrainConfig(model=str(SEVEN), train=(stage,), lr=1e-3, **STAGES[stage] | settings)


def losses_of_steps(stage: str, device: str, steps: int, autocast: bool = False) -> list[float]:
    """Trains a tiny checkpoint on one batch, in float32 or under autocast, without dropout."""
    config = tiny_run(stage, device, dtype="float32")
    libra = train.build(config).eval()
    optimizer = train.make_optimizer(libra, config)
    batch = train.open_training_set(config, config.records, libra).batch([[0], [1], [2]])
    losses = []
    for _ in range(steps):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = libra.loss(batch) / train.count_labels(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def losses_equal_the_cpus(card: Card) -> dict:
    """The losses of 20 steps in float32 equal those of the CPU; under autocast they stay near."""
    steps, figures, ok = 5 if card.is_toy else 20, {}, True
    for stage in STAGES:
        exact = torch.tensor(losses_of_steps(stage, "cpu", steps))
        errors = {}
        for name, autocast, limit in (("float32", False, 1e-4), ("bfloat16", True, 1e-2)):
            losses = torch.tensor(losses_of_steps(stage, card.device, steps, autocast))
            errors[name] = float(((losses - exact) / exact).abs().max())
            ok = ok and errors[name] < limit
        figures[stage] = dict(first=float(exact[0]), last=float(exact[-1]), worst_relative_error=errors)
    return dict(ok=ok, steps=steps, **figures)


def resuming(card: Card) -> dict:
    """A run that is interrupted and resumed has the losses of the whole run, dropout included."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        steps = dict(max_steps=4, epochs=9.0, save_every=1, keep=9, log_every=1, batch_size=2)
        config = tiny_run("connector", card.device, out_dir=out, **steps)
        losses = []
        for resume in (False, True):
            train.run(config, resume, World())
            losses.append([entry["loss"] for entry in read_log(Path(out, "log.jsonl")) if "loss" in entry])
            # what a run leaves that ends after two steps
            for file in train.checkpoint_files(out)[2:]:
                file.unlink()
    whole, resumed = losses
    worst = max(abs(x - y) / abs(x) for x, y in zip(whole, resumed, strict=True))
    return dict(ok=len(whole) == 4 and whole == resumed, worst_relative_error=worst)


# ------------------------------------------------------------------------------------------ 5: several processes


def sharding(card: Card, processes: int) -> dict:
    """FSDP gives the loss and the gradient of a copy on every process, over NCCL (on a CPU gloo)."""
    if processes > 1 and torch.cuda.device_count() < processes:
        raise Missing(f"there are not {processes} GPUs")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(shard_and_compare, (processes, card.device, folder), nprocs=processes)
        return json.loads(Path(folder, "figures.json").read_text())


def shard_and_compare(rank: int, size: int, device: str, folder: str):
    """One process of `sharding`; the first one writes the figures."""
    # a check that hangs is killed, and this process must not outlive it
    follow_parent()
    # 1) what torchrun and `init_distributed` do
    os.environ["LOCAL_RANK"] = str(rank)
    world = World(rank, size)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    place = world.local_device(torch.device(device))
    total = torch.ones(1000, device=place)
    dist.all_reduce(total)

    # 2) the same step with a copy of the decoder, then with shards
    config = replace(tiny_run("connector", str(place)), train=("connector", "decoder"))
    libra = train.build(config).eval()
    batch = train.open_training_set(config, config.records, libra).batch([[rank], [2]])
    weights = list(train.trainable_parameters(libra).values())
    copy = loss_and_norm(libra, batch, weights, world)
    shard(libra.decoder, libra.decoder.layers, world)
    weights = list(train.trainable_parameters(libra).values())
    sharded = loss_and_norm(libra, batch, weights, world)

    # 3) an update, and the loss behind it as in a validation
    train.make_optimizer(libra, config).step()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device != "cpu"), unsharded(libra.decoder):
        (after,) = world.all_reduce(libra.loss(batch))
    if rank == 0:
        errors = [abs(x - y) / abs(x) for x, y in zip(copy, sharded, strict=True)]
        limit = 1e-5 if device == "cpu" else 2e-2  # on a GPU the weights of shards are gathered in bfloat16
        ok = bool((total == size).all()) and max(errors) < limit and after < copy[0]
        figures = dict(ok=ok, backend=backend, relative_error_of_loss=errors[0], relative_error_of_norm=errors[1])
        Path(folder, "figures.json").write_text(json.dumps(figures))
    world.barrier()
    # a process that ends in the usual way aborts now and then (see train.main)
    os._exit(0)


def loss_and_norm(libra: Libra, batch, weights: list, world: World) -> tuple[float, float]:
    """The loss of all processes, and the norm of its gradient, which stays in the weights."""
    libra.zero_grad()
    with torch.autocast(libra.device.type, torch.bfloat16, enabled=libra.device.type == "cuda"):
        loss = libra.loss(batch)
    loss.backward()
    world.all_reduce_gradients(weights)
    (total,) = world.all_reduce(loss.detach())
    return total, world.clip_grad_norm(weights, math.inf)
