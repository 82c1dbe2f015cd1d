"""Estimates without running anything: multiplications, bytes, and from them memory and hours on a GPU.

`python -m bench plan` prints `plan`; measured times are divided by the FLOP of `Costs`. The share of a GPU's peak that
is reached is assumed, or with `--measured FILE` read from what `python -m bench gpu` wrote.
"""

import re
from types import MappingProxyType
from typing import Annotated, NamedTuple

import torch
from torch import nn

from data import Records
from decoder import Decoder, DecoderConfig
from encoder import Encoder, EncoderConfig
from plumbing.fields import Range, check_value
from plumbing.log import PEAK_TFLOPS
from tac import TAC

PREFIX, QUESTION, ANSWER = 40, 38, 79  # ids of a Diff-VQA record: before its image, and behind it
Part = Annotated[float, Range(1e-6, 1)]  # of a peak
RANK = 128  # of LoRA, as published
# the published test set: studies, ids of the prompt, tokens of a report; and the studies in a batch
TEST_SET, PROMPT, REPORT, BATCH = 2461, 62, 120, 8


class GPU(NamedTuple):
    memory: float  # bytes
    bandwidth: float  # bytes/s


GPUS = {  # from the makers' data sheets
    "A100": GPU(80e9, 2.04e12), "A100-40": GPU(40e9, 1.56e12), "H100": GPU(80e9, 3.35e12),
    "H200": GPU(141e9, 4.8e12), "B200": GPU(180e9, 7.7e12), "L40S": GPU(48e9, 0.864e12),
    "A6000": GPU(48e9, 0.768e12), "3090": GPU(24e9, 0.936e12), "4090": GPU(24e9, 1.01e12),
    "5090": GPU(32e9, 1.79e12), "MI300X": GPU(192e9, 5.3e12),
}  # fmt: skip
RAD_DINO = dict(model_type="dinov2", image_size=518, patch_size=14)
LLAMA_3 = dict(model_type="llama", num_key_value_heads=8, vocab_size=128256)
MODELS = {  # fields of the published config.json files that differ from our defaults
    "7b": dict(model_type="llama"),  # Llama 2, Vicuna, Meditron
    "3b": LLAMA_3 | dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
                         head_dim=128, tie_word_embeddings=True),
    "8b": LLAMA_3 | dict(intermediate_size=14336),
    "mistral-7b": dict(model_type="mistral"),
}  # fmt: skip


def find_gpu(name: str) -> str | None:
    """The row of GPUS for the name that a driver gives a card; None for a card that is not in it.

    Names of several cards contain one another's: a GH200 is no H200, an H100 with PCIe is slower than the H100.
    """
    if re.search(r"H100 (PCIe|NVL)|Ti|SUPER|Laptop|4090 D", name):
        return None
    if "A100" in name and "40GB" in name:
        return "A100-40"
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu}\b", name)), None)


def peak_flops(gpu: str) -> float:
    """FLOP/s of a row of GPUS in bfloat16."""
    return 1e12 * PEAK_TFLOPS[gpu.removesuffix("-40")]


def matrix_size(model: nn.Module) -> int:
    """Number of parameters without norms, biases and convolutions."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)


class Costs:
    """Numbers of parameters, FLOP and bytes. In FLOP a multiplication and an addition count as two."""

    def __init__(self, encoder: EncoderConfig, decoder: DecoderConfig):
        self.encoder_config, self.decoder_config = encoder, decoder
        self.patches = (encoder.image_size // encoder.patch_size) ** 2
        # on PyTorch's meta device parameters have shapes and take no memory
        with torch.device("meta"):
            model = Decoder(decoder)
            self.tac = matrix_size(TAC(encoder.num_hidden_layers, encoder.hidden_size, 1, decoder.hidden_size))
            self.encoder = matrix_size(Encoder(encoder))
        self.layers, self.decoder = matrix_size(model.layers), matrix_size(model)
        self.head = decoder.vocab_size * decoder.hidden_size
        # beside each of the seven projections: [RANK, inputs] and [outputs, RANK]
        linear = [module for module in model.layers.modules() if isinstance(module, nn.Linear)]
        self.lora = sum(RANK * (module.in_features + module.out_features) for module in linear)

    def encode(self) -> int:
        """FLOP for a pair of images."""
        config = self.encoder_config
        T, C = self.patches + config.class_token, config.hidden_size
        attention = 4 * config.num_hidden_layers * T * T * C
        embedding = 2 * self.patches * 3 * config.patch_size**2 * C
        return 2 * (2 * T * self.encoder + attention + embedding)

    def connect(self) -> int:
        """FLOP for a pair, without the layerwise extractor, whose time is that of reading features."""
        N = self.patches
        return 2 * N * self.tac + 3 * 4 * N * N * self.encoder_config.hidden_size

    def attend(self, pairs: float) -> float:
        """FLOP for pairs of a position and a position that it sees, in every layer of the decoder."""
        config = self.decoder_config
        return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs

    def prefill(self, positions: int) -> float:
        return 2 * positions * self.layers + self.attend(positions**2 / 2) + 2 * self.head

    def step(self, questions: int, lora: bool) -> float:
        """FLOP for a training step on one row: `questions` about one pair, behind one prefix."""
        prefix, text = self.patches + PREFIX, QUESTION + ANSWER
        positions = prefix + questions * text
        linear = 2 * (positions * self.layers + questions * ANSWER * self.head)
        attention = self.attend(prefix**2 / 2 + questions * (text * prefix + text**2 / 2))
        # backward costs once more for inputs (of frozen weights too), and once more for weights that learn
        learning = self.connect() + 6 * positions * self.lora if lora else 3 * self.connect()
        return self.encode() + learning + 2 * linear + 3 * attention

    def activations(self, lora: bool) -> int:
        """Bytes that one position leaves in one layer for the backward pass, under autocast."""
        config = self.decoder_config
        C, hidden, D = config.hidden_size, config.intermediate_size, config.head_dim
        q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
        # float32: the inputs of two norms; 16 bits: q, k, v, the attention's output, gate and up
        size = 8 * C + 2 * (2 * q + 2 * kv) + 4 * hidden
        if lora:
            # 16 bits: the inputs of q, k and v, of o, of gate and up, of down; what seven lora_A return
            size += 2 * (C + q + C + hidden) + 2 * 7 * RANK
        return size


def term(name: str, amount: float, unit: str, how: str = "") -> dict:
    """A line of a plan; amount: bytes, FLOP or seconds."""
    return dict(term=name, value=amount / {"GB": 1e9, "TFLOP": 1e12, "h": 3600}[unit], unit=unit, how=how)


def bandwidth_of(beams: int) -> str:
    """The name of the share of the bandwidth that a search of BATCH studies reaches."""
    return f"bandwidth, {beams} beam(s), {BATCH} together"


def read_measured(path, gpu: str) -> dict[str, float]:
    """Shares of a GPU's peak from a file of `python -m bench gpu`. ValueError if it has none of this GPU."""
    shares, devices, is_same = {}, set(), False
    records = Records(path)
    for number in range(len(records)):
        line, place = records[number], records.place(number)
        # each run begins with its machine
        if line.get("name") == "machine":
            devices.add(str(line.get("device")))
            is_same = line.get("gpu") == gpu
        some = check_value(line.get("share"), dict[str, Part] | None, "share", place)
        if is_same:
            shares |= some or {}
    if not shares:
        machines = " and ".join(sorted(devices)) or "no machine that it names"
        raise ValueError(f"{path} has no share of the peak of the GPU {gpu}: it was measured on {machines}")
    return shares


def plan(costs: Costs, options, measured: dict[str, float] = MappingProxyType({})) -> dict[str, list[dict]]:
    """Memory and time of both training stages and of the test set; options: gpu, gpus, rows, questions, records.

    measured: shares of the peak, as `read_measured` returns them; without one we assume 40 % of the FLOP/s and 60 % of
    the bytes/s.
    """
    gpu, peak = GPUS[options.gpu], peak_flops(options.gpu)

    def share(name: str, assumed: float) -> tuple[float, str]:
        if name in measured:
            return measured[name], f"{measured[name]:.0%} (measured)"
        return assumed, f"{assumed:.0%} (assumed)"

    def compute(name: str, flops: float) -> tuple[float, str]:
        """Seconds for FLOP, and how they were estimated."""
        value, text = share(name, 0.4)
        return flops / (value * peak * options.gpus), f"{text} of {options.gpus} × {peak / 1e12:,.0f} TFLOP/s"

    config, parts = costs.decoder_config, {}
    layers, weights = config.num_hidden_layers, costs.decoder + costs.encoder

    def memory(name: str, size: float) -> dict:
        # the allocator leaves gaps
        verdict = "fits" if size < 0.92 * gpu.memory else "does not fit"
        return term(name, size, "GB", f"{verdict} {gpu.memory / 1e9:.0f} GB")

    # 1) training: 16 bytes for each parameter that learns are its weight, gradient and AdamW's state in float32
    for stage, part, questions, learning in (
        ("stage 1", "TAC", options.questions, costs.tac),
        ("stage 2", "LoRA", 1, costs.lora),
    ):
        lora = part == "LoRA"
        frozen, learning = 2 * (weights + lora * costs.tac), 16 * learning
        positions = options.rows * (costs.patches + PREFIX + questions * (QUESTION + ANSWER))
        size = costs.activations(lora)
        checkpoints = positions * (layers * 2 * config.hidden_size + size)  # all layers' inputs, and one layer
        work = costs.step(questions, lora)
        time, computing = compute(stage, options.records / questions * work)
        parts[f"{stage}, {part}: {questions} question(s) about each pair in a row"] = [
            term("frozen weights", frozen, "GB", "2 bytes each"),
            term("what learns", learning, "GB", f"{learning / 16e6:.0f} M × 16 bytes: weights, gradients, AdamW"),
            term("activations", positions * layers * size, "GB", f"{positions:,} × {layers} × {size:,} bytes"),
            memory("memory", frozen + learning + positions * layers * size),
            memory("… with checkpointing", frozen + learning + checkpoints),
            term("work", work, "TFLOP", "a row; with checkpointing a third more"),
            term("time", time, "h", f"{options.records:,} records, {computing}"),
        ]

    # 2) the test set: first tokens are limited by computing, all others by reading memory
    prompt, weights = costs.patches + PROMPT, 2 * (weights + costs.tac)
    position = 4 * layers * config.num_key_value_heads * config.head_dim  # bytes of keys and values
    work = costs.encode() + costs.connect() + costs.prefill(prompt)
    first, computing = compute("first token", TEST_SET * work)
    for beams in (1, 10):
        cache = BATCH * (prompt + beams * REPORT) * position
        half = BATCH * (prompt + beams * REPORT / 2) * position
        token = 2 * (costs.layers + costs.head) + half
        value, text = share(bandwidth_of(beams), 0.6)
        others = TEST_SET / BATCH * REPORT * token / (value * gpu.bandwidth * options.gpus)
        reading = f"{text} of {options.gpus} × {gpu.bandwidth / 1e12:.2f} TB/s"
        parts[f"{TEST_SET:,} studies, {beams} beam(s), {REPORT} tokens, {BATCH} together"] = [
            term("weights", weights, "GB", "2 bytes each"),
            term("keys and values", cache, "GB", f"{position:,} bytes a position"),
            memory("memory", weights + cache),
            term("before the first token", work, "TFLOP", "a study: encoder, TAC, prefill"),
            term("time", first, "h", computing),
            term("read for a token", token, "GB", "weights, keys and values, with half of the report written"),
            term("time", others, "h", reading),
            term("time in all", first + others, "h"),
        ]
    return parts
