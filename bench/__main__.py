"""Measures this project beside its peers, and estimates what the work costs on other hardware.

    python -m bench [decode|train] [--size mid]       ours beside `transformers` and `peft`
    python -m bench attention                         the fused kernel beside PyTorch's attention, on a GPU
    python -m bench plan --gpu H100 --model 7b        memory and hours, estimated without running anything

    encoder     features of a pair of images
    prefill     image pair and prompt, until the logits of the first token
    greedy      a report of 64 tokens, from images to text; beams: the same with 10 beams
    step        a training step of the connector: 4 pairs, a question about each
    questions   the same: 1 pair, 4 questions, in one row of ours and four rows of the peer
    lora        a training step of LoRA: 2 pairs, a question about each

Both sides run in separate processes, alternating; a comparison is shown only if both computed the same result.
With one thread on a CPU, the default, seconds are CPU seconds: waiting for a busy core does not count.
"""

import argparse
import json
import random
import statistics
import string
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from attention import attention
from bench import costs, sides
from bench.measure import measure, run
from data import Study
from decoder import decoder_config
from encoder import encoder_config
from model import Libra
from plumbing import fresh
from plumbing.cli import Parser, guard, progress
from plumbing.files import read_json
from tokenizer import find_template

RAD_DINO = dict(model_type="dinov2", image_size=518, patch_size=14)
SIZES = {  # random models: fields of the config.json of encoder and decoder
    "small": (
        RAD_DINO | dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6),
        dict(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1408, vocab_size=8000),
    ),
    "mid": (
        RAD_DINO,
        dict(hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, intermediate_size=2816, vocab_size=32000),
    ),
}


def write_random_model(folder: Path, encoder: dict, decoder: dict) -> str:
    """Writes a float32 checkpoint in the published layout. Returns its folder."""
    # the tokenizer learns the words of the prompt, and random ones until its vocabulary is full
    letters, template = random.Random(0), find_template("libra_v1")
    texts = 1000 * [template.start + template.open + Study("").query]
    texts += ["".join(letters.choices(string.ascii_lowercase, k=6)) for _ in range(decoder["vocab_size"] // 2)]
    fresh.write_encoder(folder / "encoder", encoder, mean=0.5307, std=0.2583)
    fresh.write_decoder(folder / "decoder", decoder | dict(max_position_embeddings=4096), texts)
    torch.manual_seed(0)
    libra = Libra.from_parts(folder / "decoder", folder / "encoder", template="libra_v1", device="cpu", dtype="float32")
    libra.save_pretrained(folder / "model")
    return str(folder / "model")


def compare(options):
    """Measures each piece of work with both sides, and prints a row for it."""
    works = {"decode": sides.DECODING, "train": sides.TRAINING, "all": [*sides.DECODING, *sides.TRAINING]}[options.what]
    facts = dict(torch=torch.__version__, model=options.model or options.size, runs=options.runs)
    show, rows = progress("measuring", "comparisons"), []
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or write_random_model(Path(folder), *SIZES[options.size])
        for work in works:
            row = dict(work=work, other="peft" if work == "lora" else "transformers")
            pair = [partial(sides.prepare, side, work, model, options.device) for side in (sides.Ours, sides.Peer)]
            try:
                ours, peer = measure(pair, options.device, options.threads, options.runs)
                row |= dict(seconds=ours.seconds, memory=ours.memory)
                row |= dict(other_seconds=peer.seconds, ratio=peer.seconds / ours.seconds, other_memory=peer.memory)
            except (ValueError, ImportError, RuntimeError) as error:
                row["note"] = f"no comparison: {error}"
            rows.append(row)
            show(len(rows), len(works))
    report(facts, rows, options)


def compare_attention(options):
    """Forward and backward passes of the fused kernel and of PyTorch's attention: 32 heads of 128, bfloat16."""
    if options.device == "cpu":
        raise ValueError("attention needs a GPU: the fused kernel does not run on a CPU")
    # four questions of 150 positions behind a pair of images and a prompt
    segments = torch.tensor([1431 * [0] + 150 * [1] + 150 * [2] + 150 * [3] + 150 * [4]], device=options.device)
    masks = {
        "causal, 2,048 positions": dict(causal=True),
        "4 × 150 behind 1,431": dict(segments=segments),
        "causal, 4,096 positions, window 1,024": dict(causal=True, window=1024),
    }
    rows = []
    for (label, mask), positions in zip(masks.items(), (2048, 2031, 4096), strict=True):
        shape = (3, 1, 32, positions, 128)
        q, k, v = torch.randn(shape, device=options.device, dtype=torch.bfloat16, requires_grad=True)
        seconds = {}
        for impl in ("triton", "torch"):
            step = lambda: torch.autograd.grad(attention(q, k, v, impl=impl, **mask).sum(), (q, k, v))
            step()  # compiles the kernel
            seconds[impl] = statistics.median(run(step, options.device).seconds for _ in range(options.runs))
        ratio = seconds["torch"] / seconds["triton"]
        rows.append(dict(mask=label, seconds=seconds["triton"], other_seconds=seconds["torch"], ratio=ratio))
    report(dict(machine=torch.cuda.get_device_name()), rows, options)


def report(facts: dict, rows: list[dict], options):
    """Prints what was measured, as JSON or as a table."""
    if options.json:
        return print(json.dumps(facts | {"rows": rows}))
    print(*facts.values(), sep=", ")
    for row in rows:
        row.update({name: f"{row[name] / 2**30:.2f} GiB" for name in ("memory", "other_memory") if name in row})
        print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()), sep="  ")


def plan(options):
    """Prints an estimate for a published model or for a folder with a config.json."""
    name = options.model or "7b"
    fields = costs.MODELS.get(name) or read_json(Path(name, "config.json"))
    model = costs.Costs(encoder_config(RAD_DINO, "RAD-DINO", {}), decoder_config(fields, name))
    parts = costs.plan(model, options)
    if options.json:
        return print(json.dumps({part: [term._asdict() for term in terms] for part, terms in parts.items()}))
    for part, terms in parts.items():
        print(f"\n{part}")
        for term in terms:
            print(f"  {term.term:<24} {term.value:>10,.2f} {term.unit:<6} {term.how}".rstrip())


def parse(arguments=None):
    parser = Parser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="?", default="all", choices=("all", "decode", "train", "attention", "plan"), help="all: decode and train")
    add("--size", default="small", choices=SIZES, help="random model: small (some minutes), mid (some 40 minutes)")
    add("--model", metavar="DIR", help="a checkpoint instead; plan: 7b, 3b, 8b, mistral-7b, or a folder with a config.json")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda if there is one")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads; above 1, seconds are wall seconds")
    add("--runs", type=int, default=3, metavar="N", help="runs of each side; their median counts")
    add("--json", action="store_true", help="print one JSON object")
    add("--gpu", default="H100", choices=costs.GPUS, help="plan: the GPU")
    add("--gpus", type=int, default=1, metavar="N", help="plan: number of GPUs")
    add("--rows", type=int, default=4, metavar="N", help="plan: rows in a forward pass of one GPU")
    add("--questions", type=int, default=4, metavar="N", help="plan: questions about a pair in stage 1")
    add("--records", type=int, default=100_000, metavar="N", help="plan: training records")
    options = parser.parse_args(arguments)
    for name in ("threads", "runs", "gpus", "rows", "questions", "records"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is not at least 1")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(arguments=None) -> int:
    options = parse(arguments)
    commands = {"attention": compare_attention, "plan": plan}
    return guard("python -m bench", commands.get(options.what, compare), options)


if __name__ == "__main__":
    sys.exit(main())
