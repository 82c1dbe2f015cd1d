"""What the work costs here, beside peers, in one run; and what it would cost elsewhere, on paper.

    python bench.py [decode|train] [--size mid]       ours, the same of `transformers` and `peft`, and what limits it
    python bench.py attention                         the fused kernel beside PyTorch's own attention
    python bench.py plan --gpu H100 --model 7b        memory and hours of training and of the published test set

Each side of a comparison is a process of its own: it holds one model, and its peak memory is its own. The sides take
turns. They must have computed the same (values, ids, losses, norms of gradients), or nothing is compared.
With one thread on a CPU, the default, seconds are CPU seconds: waiting for a core that others use is left out.
"""

import argparse
import sys

from plumbing.cli import Parser, guard, print_table, progress


def parse(arguments=None):
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="?", default="all", choices=("all", "decode", "train", "attention", "plan"),
        help="rows to measure (all: decode and train), attention alone, or costs on paper")  # fmt: skip
    add("--size", default="small", choices=SIZES, help="random model: small (some minutes), mid (some 40 minutes)")
    add("--model", metavar="DIR", help="a checkpoint instead; plan: 7b (its default), 3b, … or a folder's config.json")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is one, else cpu")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads; with more than 1, wall seconds (1)")
    add("--runs", type=int, default=3, metavar="N", help="runs of each side; the median counts (3)")
    add("--json", action="store_true", help="print one JSON object")
    add("--plot", metavar="FILE", help="write the bars as SVG")
    add("--gpu", default="H100", metavar="NAME", help="plan: A100, H100, H200, 4090, … (H100)")
    add("--gpus", type=int, default=1, metavar="N", help="plan: how many (1)")
    add("--rows", type=int, default=4, metavar="N", help="plan: rows in a forward pass of one GPU (4)")
    add("--questions", type=int, default=4, metavar="N", help="plan: questions about a pair in stage 1 (4)")
    add("--records", type=int, default=100_000, metavar="N", help="plan: training records, one pass (100,000)")
    arguments = parser.parse_args(arguments)
    for name in ("threads", "runs", "gpus", "rows", "questions", "records"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} is not at least 1")
    return arguments


RAD_DINO = dict(model_type="dinov2", image_size=518, patch_size=14)
SIZES = {  # of the random models: the fields of the encoder's and of the decoder's config.json
    "small": (
        RAD_DINO | dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6),
        dict(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1408, vocab_size=8000,
             max_position_embeddings=4096),
    ),
    "mid": (
        RAD_DINO,
        dict(hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, intermediate_size=2816, vocab_size=32000,
             max_position_embeddings=4096),
    ),
}  # fmt: skip

if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    ARGUMENTS = parse()

# ruff: noqa: E402
import html
import json
import multiprocessing
import platform
import random
import re
import resource
import statistics
import tempfile
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from attention import attention
from bench import costs
from data import IGNORED, Row, Study, collate
from decoder import Cache, decoder_config
from encoder import encoder_config
from lora import PROJECTIONS
from model import Libra
from plumbing import fresh as parts
from plumbing.files import atomic, read_json
from plumbing.layout import find_device
from plumbing.pixels import preprocess
from sample import generate, prompt_of
from tokenizer import IMAGE, find_template
from train import TrainConfig, build, make_optimizer, return_memory_at_once

# ------------------------------------------------------------------------------------------ the model and its inputs


def write(folder: Path, encoder: dict, decoder: dict, shards: int = 3) -> Path:
    """A random checkpoint in the published layout, float32, of these config.json fields; returns its folder."""
    drawn, template = random.Random(0), find_template("libra_v1")
    word = lambda: "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=6))
    texts = [*(template.start + template.open + Study("").query for _ in range(1000)),
             *(word() for _ in range(decoder["vocab_size"] // 2))]  # fmt: skip
    parts.write_encoder(folder / "encoder", encoder, mean=0.5307, std=0.2583)
    parts.write_decoder(folder / "decoder", decoder, texts)
    torch.manual_seed(0)
    libra = Libra.from_parts(folder / "decoder", folder / "encoder", template="libra_v1", device="cpu", dtype="float32")
    size = sum(parameter.nbytes for parameter in (*libra.decoder.parameters(), *libra.connector.parameters()))
    libra.save_pretrained(folder / "model", shard_size=round(1.1 * size / shards))
    return folder / "model"


def study(number: int) -> Study:
    noise = np.random.RandomState(number).randint(0, 256, (2, 1200, 1000), dtype=np.uint8)
    return Study(*(Image.fromarray(image).convert("RGB") for image in noise))


@dataclass(frozen=True)
class Setup:
    """What a process needs to make its side; the file `given` holds what ours hands to the peers."""

    model: str
    device: str
    threads: int
    given: str


def device_of(arguments) -> str:
    chosen = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return str(find_device(chosen))


def give(libra: Libra, file: Path):
    """What the peers cannot have of their own: the connector, how images become pixels, a prompt's ids."""
    given = dict(connector=libra.connector, pixels=libra.pixels, ids=prompt_of(libra, Study("").query).ids,
                 vocabulary=libra.vocabulary, positions=libra.image_positions, dtype=libra.dtype,
                 encoder=libra.encoder.config, decoder=libra.decoder.config,
                 folders=(libra.encoder_files.source.folder, libra.weights.folder))  # fmt: skip
    torch.save(given, file)
    return given


def pixels_of(number: int, given: dict) -> torch.Tensor:
    return torch.stack([preprocess(image, given["pixels"]) for image in study(number).images()])


def batch(given: dict, numbers: list[int], questions: int, shared: bool):
    """A training batch of drawn ids: questions about each of these pairs, in one row or in rows of their own."""
    drawn = np.random.RandomState(0)
    draw = lambda count: drawn.randint(3, given["vocabulary"], count).tolist()
    prefix, items = [*draw(costs.PREFIX), IMAGE], []
    for number in numbers:
        pixels = pixels_of(number, given)
        texts = [(draw(costs.QUESTION), draw(costs.ANSWER)) for _ in range(questions)]
        for row in [texts] if shared else [[text] for text in texts]:
            ids, labels, segments = list(prefix), [IGNORED] * len(prefix), [0] * len(prefix)
            for segment, (question, answer) in enumerate(row, int(shared)):
                ids += question + answer
                labels += [IGNORED] * len(question) + answer
                segments += [segment] * len(question + answer)
            items.append(Row(ids, labels, segments, pixels))
    return collate(items, given["positions"])


# ------------------------------------------------------------------------------------------ the sides


TRAINING = {  # work -> the batch
    "step": dict(numbers=[0, 1, 2, 3], questions=1, shared=False),
    "questions": dict(numbers=[0], questions=4, shared=True),
    "lora": dict(numbers=[0, 1], questions=1, shared=False),
}
NEW = 64  # tokens of a report
BEAMS = {"greedy": 1, "beams": 10}
STUDIES, SHORT = 8, 32  # a batch, and the tokens of each report


def ours(work: str, setup: Setup, separate: bool = False):
    """A function that does some work once and returns what it computed, as a list of numbers."""
    read = partial(Libra.from_pretrained, setup.model, device=setup.device)
    if work == "load":
        return lambda: touch(read())
    if work in TRAINING:
        return train_ours(work, setup, separate)
    libra = read()
    libra.eos_token_ids = []
    pixels = libra.preprocess(study(0).images())
    if work == "encoder":
        return lambda: sampled(libra.features(pixels))
    if work in BEAMS:
        options = dict(num_beams=BEAMS[work], max_new_tokens=NEW, no_repeat_ngram=0)
        return lambda: generate(libra, study(0), **options)[0].token_ids
    if work == "studies":
        studies = [study(number) for number in range(1 if separate else STUDIES)]
        return lambda: generate(libra, studies, max_new_tokens=SHORT)[0][0].token_ids
    features = libra.features(pixels)[None]
    if work == "connector":
        return lambda: sampled(libra.connector(features))
    embeddings = libra.splice(prompt_of(libra, Study("").query).ids, libra.connector(features)[0])
    cache = lambda: Cache(libra.decoder.config, 1, len(embeddings), libra.device, libra.dtype)
    return lambda: sampled(libra.prefill(cache(), 0, embeddings))


def train_ours(work: str, setup: Setup, separate: bool):
    config = TrainConfig(model=setup.model, device=setup.device, train=("lora" if work == "lora" else "connector",))
    libra, given = build(config), torch.load(setup.given, weights_only=False)
    rows = batch(given, **TRAINING[work] | ({"shared": False} if separate else {}))
    labels = int((rows.labels != IGNORED).sum())
    return step(libra, lambda: libra.loss(rows) / labels, make_optimizer(libra, config))


def step(model: nn.Module, loss_of, optimizer):
    """A training step of a model. What it returns comes from a step before, that nothing drawn has part in.

    There dropout is off, and LoRA's first matrices are of one seed; the steps that are timed have their dropout.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    autocast = partial(torch.autocast, "cuda", torch.bfloat16) if weights[0].is_cuda else nullcontext
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))

    @torch.enable_grad()
    def run():
        with autocast():
            loss = loss_of()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [float(loss.detach()), float(norm)]

    drawing = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for module in drawing:
        module.p = 0.0
    checked = run()
    for module, p in drawing.items():
        module.p = p
    return lambda: run() and checked


def peer(work: str, setup: Setup):
    """The same from `transformers` (and `peft`): Dinov2Model, our connector, LlamaForCausalLM."""
    try:
        import transformers
    except ImportError:
        raise ValueError("pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of deprecated names inside `peft`
    given = torch.load(setup.given, weights_only=False)
    sizes = given["decoder"]
    if given["encoder"].model_type != "dinov2" or sizes.qkv_bias or sizes.qk_norm or sizes.norm_offset:
        raise ValueError("the peer is written for DINOv2 and Llama alone")
    tower, language = given["folders"]

    def read():
        options = dict(dtype=given["dtype"])
        encoder = transformers.Dinov2Model.from_pretrained(tower, **options)
        decoder = transformers.LlamaForCausalLM.from_pretrained(language, **options)
        return [module.to(setup.device).eval().requires_grad_(False) for module in (encoder, decoder)]

    if work == "load":
        return lambda: touch(*read())
    encoder, decoder = read()
    decoder.generation_config.eos_token_id = None
    connector = given["connector"].to(setup.device).requires_grad_(False)

    @torch.no_grad()
    def features(pixels):  # [B, 3, S, S] -> [B, L, N, C]
        hidden = encoder(pixels, output_hidden_states=True).hidden_states[1:]
        return torch.stack([layer[:, 1:] for layer in hidden], 1)

    if work in TRAINING:
        learnt = connector.float().train().requires_grad_(True) if work != "lora" else adapt(decoder)
        rows = batch(given, **TRAINING[work] | {"shared": False})
        ids, labels = rows.ids.to(setup.device), rows.labels.to(setup.device)
        pixels = torch.cat(rows.pixels).to(setup.device, given["dtype"])

        def loss():
            images = connector(features(pixels).unflatten(0, (-1, 2)))
            embeddings = decoder.get_input_embeddings()(ids.clamp(0))
            embeddings = embeddings.masked_scatter((ids == IMAGE)[..., None], images.to(embeddings.dtype))
            return decoder(inputs_embeds=embeddings, labels=labels, use_cache=False).loss

        weights = [parameter for parameter in learnt.parameters() if parameter.requires_grad]
        return step(learnt, loss, torch.optim.AdamW(weights, lr=TrainConfig().lr, weight_decay=0.0))

    def prompt():  # all that stands before the first new token, as embeddings [1, T, hidden]
        images = connector(features(pixels_of(0, given).to(setup.device, given["dtype"]))[None])
        at = given["ids"].index(IMAGE)
        embed = lambda ids: decoder.get_input_embeddings()(torch.tensor([ids], device=setup.device))
        return torch.cat((embed(given["ids"][:at]), images, embed(given["ids"][at + 1 :])), 1)

    if work == "encoder":
        pixels = pixels_of(0, given).to(setup.device, given["dtype"])
        return lambda: sampled(features(pixels))
    if work == "prefill":
        options = dict(inputs_embeds=prompt(), use_cache=True, logits_to_keep=1)
        return lambda: sampled(decoder(**options).logits[0, 0, : given["vocabulary"]])
    options = dict(num_beams=BEAMS[work], do_sample=False, max_new_tokens=NEW, pad_token_id=0)

    def report():
        embeddings = prompt()
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=setup.device)
        return decoder.generate(inputs_embeds=embeddings, attention_mask=mask, **options)[0].tolist()

    return report


def adapt(decoder: nn.Module) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise ValueError("pip install peft") from None
    rank = dict(r=costs.RANK, lora_alpha=2 * costs.RANK, lora_dropout=TrainConfig().lora_dropout)
    return peft.get_peft_model(decoder, peft.LoraConfig(**rank, target_modules=list(PROJECTIONS))).train()


def touch(*models: nn.Module) -> list:
    """Read every weight: `transformers` maps files, and what nothing reads was not loaded."""
    for model in models:
        for parameter in model.parameters():
            parameter.sum()
    return []


def sampled(values: torch.Tensor) -> list[float]:
    """Some thousand of the values, evenly spread: what two sides are compared by."""
    return values.flatten()[:: values.numel() // 1000 or 1].float().tolist()


# ------------------------------------------------------------------------------------------ measuring


def serve(connection, side, setup: Setup):
    """A side's process: makes it, then runs it as often as it is asked to."""
    try:
        torch.set_num_threads(setup.threads)
        if setup.device == "cpu":
            return_memory_at_once()
        with torch.no_grad():
            run, clock = side(setup), clock_of(setup)
            connection.send(None)
            while connection.recv():
                begin = clock()
                result = run()
                connection.send((clock() - begin, result, peak_memory(setup.device)))
    except (EOFError, ConnectionError, KeyboardInterrupt):  # the program that asked is gone
        return
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        connection.send(str(error) or type(error).__name__)


def clock_of(setup: Setup):
    if setup.device != "cpu":
        return lambda: torch.cuda.synchronize() or time.perf_counter()
    return time.process_time if setup.threads == 1 else time.perf_counter


def peak_memory(device: str) -> int:
    """Bytes: of the GPU, else of this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # what getrusage says may be the parent's there
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


PRELOADED = ["bench"]  # modules that every side has from its birth


def measure(sides: dict, setup: Setup, runs: int, show=lambda: None) -> tuple[dict, dict]:
    """({side: (median of seconds, peak of memory)}, {side: why not}), our side first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    workers, results, failed = {}, {}, {}

    def ask(name, message=None):
        try:
            if message is not None:
                workers[name][1].send(message)
            answer = workers[name][1].recv()
        except (EOFError, BrokenPipeError):
            answer = "its process was killed: out of memory?"
        if isinstance(answer, str):
            failed[name] = answer
            results.pop(name, None)
        return answer

    try:
        for name, side in sides.items():
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, side, setup), daemon=True)
            process.start()
            there.close()
            workers[name], results[name] = (process, here), []
            ask(name)
        for _ in range(runs):
            for name in list(results):
                answer = ask(name, True)
                if name in results:
                    results[name].append(answer)
                show()
    finally:
        for process, connection in workers.values():
            process.kill()
            process.join()
            connection.close()
    first = next(iter(sides))
    if first in failed:
        raise ValueError(f"{first} failed: {failed[first]}")
    for name, found in results.items():
        pairs = zip(results[first], found, strict=True)
        if not all(agree(mine[1], others[1], setup) for mine, others in pairs):
            failed[name] = "it computed something else: no comparison"
    seconds = {name: statistics.median(run[0] for run in found) for name, found in results.items()}
    return {name: (seconds[name], found[-1][2]) for name, found in results.items() if name not in failed}, failed


def agree(mine: list, others: list, setup: Setup) -> bool:
    """Whether two sides computed the same: float32 on the CPU strictly, 16 bits on a GPU as far as they carry."""
    if len(mine) != len(others):
        return False
    if all(isinstance(value, int) for value in mine):
        return mine == others or setup.device != "cpu"
    mine, others = np.array(mine), np.array(others)
    return bool(np.linalg.norm(mine - others) <= (1e-4 if setup.device == "cpu" else 3e-2) * np.linalg.norm(mine))


def peaks(setup: Setup, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy (read and written), the best of five."""
    clock, side = clock_of(setup), 2048 if setup.device == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=setup.device).to(dtype)
    source = torch.zeros(2**26, device=setup.device)
    target = torch.zeros_like(source)

    def best(run):
        seconds = []
        for _ in range(5):
            begin = clock()
            run()
            seconds.append(clock() - begin)
        return min(seconds)

    return 2 * side**3 / best(lambda: a @ b), 2 * source.nbytes / best(lambda: target.copy_(source))


# ------------------------------------------------------------------------------------------ rows

LABELS = {
    "load": "load, every weight read", "encoder": "encoder, a pair", "connector": "connector",
    "prefill": "prefill, POSITIONS positions", "greedy": f"greedy, {NEW} tokens, all included",
    "beams": f"10 beams × {NEW}, all included",
    "studies": f"{STUDIES} studies, greedy {SHORT}, one batch", "step": "stage-1 step, 4 pairs, a question each",
    "questions": "stage-1 step, a pair, 4 questions, one row", "lora": f"LoRA step, 2 rows, rank {costs.RANK}",
}  # fmt: skip
DECODING = ("load", "encoder", "connector", "prefill", "greedy", "beams", "studies")


def sides_of(work: str) -> dict:
    sides = {"ours": partial(ours, work)}
    if work in ("studies", "questions"):
        other = f"{STUDIES} × one study" if work == "studies" else "rows of their own"
        sides[other] = partial(ours, work, separate=True)
    if work not in ("connector", "studies"):
        sides["peft" if work == "lora" else "transformers"] = partial(peer, work)
    return sides


def table(what: str, setup: Setup, given: dict, runs: int, peak: tuple, show) -> list[dict]:
    """A row for every comparison: seconds, peak memory and ratio of both sides, and what limits ours."""
    works = {"all": (*DECODING, *TRAINING), "decode": DECODING, "train": ("encoder", *TRAINING)}[what]
    found, seconds, rows = {}, {}, []
    total = runs * sum(len(sides_of(work)) for work in works)
    done = iter(range(1, total + 1))
    for work in works:
        measured, failed = measure(sides_of(work), setup, runs, lambda: show(next(done), total))
        found[work], seconds[work] = (measured, failed), measured["ours"][0]
        shown = ", ".join(f"{side} {a:.2f} s {b / 2**30:.2f} GiB" for side, (a, b) in measured.items())
        print(f"{work}: {shown}", *failed.values(), sep="; ", file=sys.stderr)
    for work, (measured, failed) in found.items():
        mine, memory = measured.pop("ours")
        label = LABELS[work].replace("POSITIONS", f"{positions_of(given):,}")
        row = dict(work=work, label=label, seconds=mine, encoders=mine / seconds["encoder"], memory=memory,
                   limit=limit(work, seconds, given, peak))  # fmt: skip
        for other, (its_seconds, its_memory) in measured.items():
            its_seconds *= STUDIES if work == "studies" else 1
            theirs = dict(other_seconds=its_seconds, ratio=its_seconds / mine, other_memory=its_memory)
            rows.append(row | dict(other=other) | theirs)
        rows += [row | dict(other=other, note=note) for other, note in failed.items()]
        if not (measured or failed):
            rows.append(row | dict(other=None))
    return rows


def limit(work: str, seconds: dict, given: dict, peak: tuple) -> str:
    """What our time goes into: its share of the peak of matrix products, or of the memory's."""
    encoder, decoder, size = given["encoder"], given["decoder"], given["dtype"].itemsize
    weights = costs.layer_parameters(decoder) + decoder.vocab_size * decoder.hidden_size  # read for every token
    if work == "load":
        return f"{weights * size / seconds[work] / 1e9:.1f} GB/s, the decoder alone"
    if work in BEAMS:
        shares = [seconds[part] / seconds[work] for part in ("encoder", "connector", "prefill")]
        token = (1 - sum(shares)) * seconds[work] / (NEW - 1)
        keys = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * positions_of(given)
        return (f"encoder {shares[0]:.0%}, connector {shares[1]:.0%}, prefill {shares[2]:.0%}; a token "
                f"{1e3 * token:.1f} ms, {(weights + keys) * size / token / peak[1]:.0%} of the copy")  # fmt: skip
    if work in TRAINING:
        shape = TRAINING[work]
        flops = costs.step_flops(encoder, decoder, len(shape["numbers"]), shape["questions"], work == "lora")
    else:
        pair, prefill = costs.encoder_flops(encoder, 2), costs.prefill_flops(decoder, positions_of(given))
        tac = costs.connector_flops(encoder, decoder.hidden_size)
        every = STUDIES * (pair + tac + prefill + 2 * SHORT * weights)
        flops = {"encoder": pair, "connector": tac, "prefill": prefill, "studies": every}[work]
    return f"{flops / seconds[work] / peak[0]:.0%} of the matrix product"


def positions_of(given: dict) -> int:
    return len(given["ids"]) - 1 + given["positions"]


def cells(row: dict) -> list[str]:
    number = lambda name, form: f"{row[name]:{form}}" if name in row else "–"
    gib = lambda name: f"{row[name] / 2**30:.2f}" if name in row else "–"
    other = f"{row['other'] or '–'}"
    return [row["label"], number("seconds", ".2f"), number("encoders", ".2f"), gib("memory"), other,
            number("other_seconds", ".2f"), number("ratio", ".2f"), gib("other_memory"), row["limit"]]  # fmt: skip


def bars(rows: list[dict], title: str) -> str:
    """The table as an SVG picture: of each row our bar and the other's, in passes of the encoder."""
    scale = 520 / max(row["encoders"] * max(1, row.get("ratio", 1)) for row in rows)
    drawn, y = [f'<text x="10" y="22" font-weight="bold">{html.escape(title)}</text>'], 40
    for row in rows:
        label = row["label"] + (f", against {row['other']}" if "ratio" in row else "")
        drawn.append(f'<text x="10" y="{y + 12}">{html.escape(label)}</text>')
        for name, length in (("ours", row["encoders"]), (row["other"], row["encoders"] * row.get("ratio", 0))):
            if length:
                colour = "#1c7ed6" if name == "ours" else "#adb5bd"
                text = f"{length:.2f}" + (f" ({row['ratio']:.2f} ×)" if name != "ours" else "")
                drawn.append(f'<rect x="10" y="{y + 18}" width="{scale * length:.1f}" height="9" fill="{colour}"/>')
                drawn.append(f'<text x="{16 + scale * length:.1f}" y="{y + 27}" font-size="11">{text}</text>')
                y += 11
        y += 28
    drawn.append(f'<text x="10" y="{y + 8}">passes of the encoder over a pair; blue: ours</text>')
    look = 'font-family="sans-serif" font-size="13" fill="#888"'
    size = f'viewBox="0 0 660 {y + 20}"'
    return "\n".join((f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>', *drawn, "</svg>\n"))


def machine(setup: Setup) -> str:
    if setup.device != "cpu":
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpus.read_text()) if cpus.exists() else None
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{found[1] if found else platform.processor()}, {widest}, {setup.threads} thread(s)"


def compare(arguments):
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            print(f"bench.py: writing a random model of size {arguments.size} …", file=sys.stderr)
            model = write(Path(folder), *SIZES[arguments.size])
        setup = Setup(str(model), device_of(arguments), arguments.threads, f"{folder}/given.pt")
        given = give(Libra.from_pretrained(model, device=setup.device), Path(setup.given))
        peak = peaks(setup, given["dtype"])
        rows = table(arguments.what, setup, given, arguments.runs, peak, progress("measuring", "runs"))
    unit = "CPU seconds" if setup.device == "cpu" and setup.threads == 1 else "seconds"
    facts = dict(machine=machine(setup), torch=torch.__version__, dtype=str(given["dtype"]).removeprefix("torch."),
                 model=arguments.model or arguments.size, unit=unit, runs=arguments.runs,
                 flops_per_second=peak[0], bytes_per_second=peak[1])  # fmt: skip
    if arguments.plot:
        with atomic(arguments.plot) as file:
            file.write(bars(rows, f"{facts['model']}, {facts['machine']}"))
    if arguments.json:
        return print(json.dumps(facts | {"rows": rows}))
    print(f"{facts['machine']}; torch {facts['torch']}, {facts['dtype']}; model {facts['model']}")
    measured = f"matrix product {peak[0] / 1e9:,.0f} GFLOP/s, copy {peak[1] / 1e9:.1f} GB/s"
    print(f"{measured}; {unit}, medians of {arguments.runs}\n")
    head = ["work", "ours", "encoders", "GiB", "against", "its", "ratio", "GiB", "what limits ours"]
    print_table([head, *map(cells, rows)])
    for row in rows:
        if "note" in row:
            print(f"{row['label']}, {row['other']}: {row['note']}")
    print("\nencoders: in passes of our encoder over a pair; ratio: the other's time over ours; GiB: peak memory of "
          "each side's own process")  # fmt: skip


# ------------------------------------------------------------------------------------------ attention


def compare_attention(arguments):
    """Forward and backward of one attention, its kernels side by side."""
    setup = Setup("", device_of(arguments), arguments.threads, "")
    torch.set_num_threads(setup.threads)
    prefix, text, count = 1431, 150, 4  # what an image pair and its prompt take, and a question with its answer
    length = prefix + count * text
    segments = torch.tensor([[0] * prefix + [n for n in range(1, count + 1) for _ in range(text)]], device=setup.device)
    clock = clock_of(setup)

    def seconds(rows: int, positions: int, heads: int, dtype, **mask) -> float:
        q, k, v = torch.randn(3, rows, heads, positions, 128, device=setup.device, dtype=dtype).unbind()
        inputs, times = [x.requires_grad_(True) for x in (q, k, v)], []
        for _ in range(1 + arguments.runs):  # the first is for warming up
            begin = clock()
            torch.autograd.grad(attention(*inputs, **mask).sum(), inputs)
            times.append(clock() - begin)
        return statistics.median(times[1:])

    shared, separate = dict(segments=segments), dict(causal=True)
    if setup.device == "cpu":
        work = f"{count} questions of {text} behind {prefix:,} positions"
        rows = [dict(mask=f"{work}, one row against rows of their own", seconds=seconds(1, length, 2, None, **shared),
                     other_seconds=seconds(count, prefix + text, 2, None, **separate))]  # fmt: skip
        note = "no GPU here: the fused kernel cannot be timed; PyTorch's attention, 2 heads of 128, float32:"
    else:
        masks = {
            "causal, 2,048 positions": (2048, separate), f"{count} × {text} behind {prefix:,}": (length, shared),
            "causal, 4,096 positions, window 1,024": (4096, separate | dict(window=1024)),
        }  # fmt: skip
        time_of = lambda impl, positions, mask: seconds(1, positions, 32, torch.bfloat16, impl=impl, **mask)
        rows = [dict(mask=name, seconds=time_of("triton", *mask), other_seconds=time_of("torch", *mask))
                for name, mask in masks.items()]  # fmt: skip
        note = "the fused kernel against PyTorch's attention, 32 heads of 128, bfloat16:"
    rows = [row | dict(ratio=row["other_seconds"] / row["seconds"]) for row in rows]
    if arguments.json:
        return print(json.dumps(dict(machine=machine(setup), rows=rows)))
    print(f"{machine(setup)}, forward and backward; {note}")
    print_table([["", "ms", "its ms", "ratio"], *([row["mask"], *(f"{1e3 * row[name]:.2f}" for name in
                 ("seconds", "other_seconds")), f"{row['ratio']:.2f}"] for row in rows)])  # fmt: skip


# ------------------------------------------------------------------------------------------ plans


def show_plan(arguments):
    name = arguments.model or "7b"
    if name not in costs.MODELS and not Path(name, "config.json").is_file():
        raise ValueError(f"--model {name} is neither a folder with a config.json nor one of {', '.join(costs.MODELS)}")
    if arguments.gpu not in costs.GPUS:
        raise ValueError(f"--gpu {arguments.gpu} is not one of {', '.join(costs.GPUS)}")
    fields = costs.MODELS.get(name) or read_json(Path(name, "config.json"))
    sizes = encoder_config(RAD_DINO, "RAD-DINO", {}), decoder_config(fields, name)
    counts = (arguments.gpus, arguments.rows, arguments.questions, arguments.records)
    found = costs.plan(*sizes, arguments.gpu, *counts)
    if arguments.json:
        named = lambda term, value, unit, how: dict(term=term, value=value / unit[1], unit=unit[0], how=how)
        return print(json.dumps({part: [named(*term) for term in terms] for part, terms in found.items()}))
    print(f"{name} on {arguments.gpus} × {arguments.gpu}: an estimate on paper, nothing here is measured")
    for part, terms in found.items():
        print(f"\n{part}")
        for term, value, (unit, scale), how in terms:
            print(f"  {term:<24} {value / scale:>10,.2f} {unit:<6} {how}".rstrip())


def run(arguments):
    {"attention": compare_attention, "plan": show_plan}.get(arguments.what, compare)(arguments)


def main(arguments) -> int:
    return guard("bench.py", run, arguments)


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
