"""Measures this project beside its peers, and estimates what the work costs on other hardware.

    python -m bench [decode|train] [--size mid]       ours beside `transformers` and `peft`
    python -m bench modes [--size mid]                rounded weights, an expert, many studies, beside plain
    python -m bench load                              peak memory of loading 1 GB of 16 bits, on a CPU with Linux
    python -m bench attention                         the fused kernel beside PyTorch's attention, on a GPU
    python -m bench gpu --out FILE                    checks and measures everything that needs a GPU
    python -m bench plan --gpu H100 --model 7b        memory and hours, estimated without running anything

decode measures the encoder on a pair of images, the prefill, and reports of 64 tokens by greedy and beam search (10).
train measures steps of the connector on 4 pairs (step) and on 4 questions about 1 pair (questions), and of LoRA.
Both sides run in separate processes, alternating; a comparison is shown only if both computed the same result.
With one thread on a CPU, the default, seconds are CPU seconds: waiting for a busy core does not count.
"""

if __name__ == "__main__":
    import plumbing.start  # noqa: F401 (first of all)


import argparse
import json
import random
import string
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from attention import attention
from bench import checks, costs, gpu, sides
from bench.costs import RAD_DINO
from bench.measure import measure, measure_peak
from data import Study
from encoder import encoder_config
from model import Libra
from plumbing import fresh
from plumbing.cli import Parser, guard, print_table, progress
from plumbing.families import decoder_config
from plumbing.files import read_json
from tokenizer import find_template

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
GIGABYTE = (
    SIZES["small"][0],
    dict(hidden_size=2048, num_hidden_layers=9, num_attention_heads=16, intermediate_size=5632, vocab_size=8000),
)


def write_random_model(folder: Path, encoder: dict, decoder: dict, dtype: str = "float32") -> str:
    """Writes a checkpoint in the published layout. Returns its folder."""
    # the tokenizer learns the words of the prompt, and random ones until its vocabulary is full
    letters, template = random.Random(0), find_template("libra_v1")
    texts = 1000 * [template.start + template.open + Study("").query]
    texts += ["".join(letters.choices(string.ascii_lowercase, k=6)) for _ in range(decoder["vocab_size"] // 2)]
    fresh.write_encoder(folder / "encoder", encoder, mean=0.5307, std=0.2583)
    fresh.write_decoder(folder / "decoder", decoder | dict(max_position_embeddings=4096), texts)
    torch.manual_seed(0)
    libra = Libra.from_parts(folder / "decoder", folder / "encoder", template="libra_v1", device="cpu", dtype=dtype)
    libra.save_pretrained(folder / "model")
    return str(folder / "model")


def compare(options):
    """Prints a row for each piece of work."""
    works = {"decode": sides.DECODING, "train": tuple(sides.TRAINING)}
    works |= {"modes": tuple(sides.MODES), "all": (*sides.DECODING, *sides.MODES, *sides.TRAINING)}
    peers = {work: name for work, (_, _, name) in sides.MODES.items()} | {"lora": "peft"}
    works = works[options.what]
    show, rows = progress("measuring", "comparisons"), []
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or write_random_model(Path(folder), *SIZES[options.size])
        for work in works:
            row = dict(work=work, other=peers.get(work, "transformers"))
            try:
                pair = sides.pair_of(work, model, options.device)
                ours, peer = measure(pair, options.device, options.threads, options.runs)
                row |= dict(seconds=ours.seconds, other_seconds=peer.seconds, ratio=peer.seconds / ours.seconds)
                row |= dict(memory=ours.memory, other_memory=peer.memory)
            except (ImportError, RuntimeError) as error:
                # the peer is not installed, ran out of memory or differs: the other rows are still worth having
                row["note"] = str(error)
            rows.append(row)
            show(len(rows), len(works))
    unit = "CPU seconds" if options.device == "cpu" and options.threads == 1 else "seconds"
    model = options.model or options.size
    report(rows, dict(torch=torch.__version__, model=model, unit=unit, runs=options.runs), options)


def compare_attention(options):
    """Forward and backward passes of the fused kernel and of PyTorch's attention: 32 heads of 128, bfloat16."""
    if options.device == "cpu":
        raise ValueError("attention needs a GPU: the fused kernel does not run on a CPU")
    rows = []
    for label, positions, mask, _ in checks.long_masks(options.device):
        inputs = torch.randn(3, 1, 32, positions, 128, device=options.device, dtype=torch.bfloat16)
        inputs = [x.requires_grad_(True) for x in inputs]
        seconds = []
        for impl in ("triton", "torch"):
            output = partial(attention, *inputs, impl=impl, **mask)
            timer = Timer("torch.autograd.grad(output().sum(), inputs)", globals=dict(output=output, inputs=inputs))
            # the timer waits for the GPU, and warms up, which compiles the kernel
            seconds.append(timer.timeit(options.runs).median)
        row = dict(mask=label, other="PyTorch", seconds=seconds[0], other_seconds=seconds[1])
        rows.append(row | dict(ratio=seconds[1] / seconds[0]))
    report(rows, dict(machine=torch.cuda.get_device_name()), options)


def measure_loading(options):
    """Prints for each type of weights the model's bytes, and the most anonymous memory that loading it takes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or write_random_model(Path(folder), *GIGABYTE, dtype="bfloat16")
        for dtype in ("int4", "int8", "bfloat16", "float32"):
            peak = measure_peak(partial(sides.load, dtype, model))
            rows.append(dict(dtype=dtype, model=peak.result, peak=peak.memory, ratio=peak.memory / peak.result))
    if options.json:
        return print(json.dumps(rows))
    table = [["", "model GiB", "peak GiB", "ratio"]]
    for row in rows:
        table.append([row["dtype"], f"{row['model'] / 2**30:.3f}", f"{row['peak'] / 2**30:.3f}", f"{row['ratio']:.3f}"])
    print_table(table)


def report(rows: list[dict], facts: dict, options):
    """Prints rows as JSON or as a table."""
    if options.json:
        return print(json.dumps(facts | {"rows": rows}))
    table = [["", "ours s", "its s", "ratio", "ours GiB", "its GiB", "against"]]
    for row in rows:
        cells = [f"{row[name]:.4f}" if name in row else "-" for name in ("seconds", "other_seconds", "ratio")]
        cells += [f"{row[name] / 2**30:.2f}" if name in row else "-" for name in ("memory", "other_memory")]
        table.append([row.get("work") or row["mask"], *cells, row.get("note", row["other"])])
    print(*facts.values(), sep=", ")
    print_table(table)


def plan(options):
    """Prints an estimate for a published model or for a folder with a config.json."""
    name = options.model or "7b"
    fields = costs.MODELS.get(name) or read_json(Path(name, "config.json"))
    model = costs.Costs(encoder_config(RAD_DINO, "RAD-DINO", {}), decoder_config(fields, name))
    measured = costs.read_measured(options.measured, options.gpu) if options.measured else {}
    parts = costs.plan(model, options, measured)
    if options.json:
        return print(json.dumps(parts))
    source = f"with shares of the peak from {options.measured}" if measured else "nothing here was measured"
    print(f"{name} on {options.gpus} × {options.gpu}: an estimate, {source}")
    for part, terms in parts.items():
        print(f"\n{part}")
        for term in terms:
            print("  {term:<24} {value:>10,.2f} {unit:<6} {how}".format(**term).rstrip())


def parse(arguments=None):
    parser = Parser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    commands = ("all", "decode", "modes", "train", "attention", "load", "gpu", "plan")
    add("what", nargs="?", default="all", choices=commands, help="all: decode, modes and train")
    add("--size", default="small", choices=SIZES, help="random model: small (some minutes), mid (some 40 minutes)")
    add("--model", metavar="DIR", help="a checkpoint instead; plan: 7b, 3b, 8b, mistral-7b or a folder")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda if there is one")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads; above 1, seconds are wall seconds")
    add("--runs", type=int, default=3, metavar="N", help="runs of each side; their median counts")
    add("--json", action="store_true", help="print one JSON object")
    add("--minutes", type=float, default=8, metavar="M", help="gpu: begin no check that may take longer than this")
    add("--out", metavar="FILE", help="gpu: where lines of JSON are added, one for each check")
    add("--gpu", default="H100", choices=costs.GPUS, help="plan: the GPU")
    add("--gpus", type=int, default=1, metavar="N", help="plan: number of GPUs")
    add("--rows", type=int, default=4, metavar="N", help="plan: rows in a forward pass of one GPU")
    add("--questions", type=int, default=4, metavar="N", help="plan: questions about a pair in stage 1")
    add("--measured", metavar="FILE", help="plan: shares of the peak from what `gpu` wrote, instead of assumed ones")
    add("--records", type=int, default=100_000, metavar="N", help="plan: training records")
    options = parser.parse_args(arguments)
    for name in ("threads", "runs", "gpus", "rows", "questions", "records"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is not at least 1")
    if options.what == "gpu" and not options.out:
        parser.error("gpu needs --out FILE for its lines of JSON")
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes} is not above 0")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(arguments=None) -> int:
    options = parse(arguments)
    commands = {"attention": compare_attention, "load": measure_loading, "gpu": gpu.run, "plan": plan}
    return guard("python -m bench", commands.get(options.what, compare), options)


if __name__ == "__main__":
    sys.exit(main())
