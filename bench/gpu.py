"""Checks and measures everything that needs a GPU: `python -m bench gpu --minutes 8 --out FILE`.

A GPU is often at hand for minutes only. So CHECKS is in order of worth, one that can no longer finish is not begun, and
each is a line of FILE (JSON) as soon as it is done:

    {"name": "machine", "device": "NVIDIA H100 80GB HBM3", "gpu": "H100", "torch": …}
    {"name": "decode_ms", "dtype": "int8", …, "ok": true, "step_ms": …, "seconds": …}

ok is false where a result is wrong or the check raised (`error`, `traceback`), null where it did not run (`skipped`).
Without a GPU the same code runs on toy sizes: then "device" is "cpu", and no figure says anything about a GPU.
"""

import contextlib
import gc
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, field

import torch

from bench import checks, costs
from bench.checks import Card, Missing
from plumbing.cli import follow_parent


@dataclass(frozen=True)
class Check:
    function: Callable  # (card, **arguments) -> figures
    seconds: float  # that it may take on a GPU, a guess: with less time left it is not begun
    arguments: dict = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " ".join([self.function.__name__, *(f"{name}={value}" for name, value in self.arguments.items())])


def decoding(dtype: str, studies: int, beams: int, mode: str = "eager") -> Check:
    return Check(checks.decode_ms, 30, dict(dtype=dtype, studies=studies, beams=beams, mode=mode))


# head sizes of the 7B model and of RAD-DINO, and all others that are in use; compiling takes the time
COMMON, OTHERS = [128, 64], [80, 72, 96, 256, 24, 16]
CHECKS = [
    Check(checks.golden_ids, 20),
    Check(checks.attention_numerics, 45, dict(dtype="bfloat16", sizes=COMMON)),
    Check(checks.attention_speed, 15),
    decoding("bfloat16", 1, 1),
    decoding("bfloat16", 1, 10),
    decoding("bfloat16", 16, 10),
    decoding("bfloat16", costs.BATCH, 1),
    decoding("bfloat16", costs.BATCH, 10),
    Check(checks.first_token, 10),
    decoding("bfloat16", 1, 1, "graph"),
    decoding("bfloat16", 1, 10, "graph"),
    decoding("bfloat16", 1, 10, "compiled"),
    Check(checks.training_step, 30, dict(work="questions")),
    Check(checks.training_step, 20, dict(work="questions", shared=False)),
    Check(checks.training_step, 20, dict(work="step")),
    Check(checks.training_step, 20, dict(work="step", checkpointing=True)),
    Check(checks.training_step, 30, dict(work="lora")),
    Check(checks.training_step, 20, dict(work="lora", checkpointing=True)),
    Check(checks.losses_equal_the_cpus, 20),
    Check(checks.golden_batch, 5),
    Check(checks.golden_bfloat16, 10),
    Check(checks.int8_layer, 15),
    decoding("int8", 1, 1),
    decoding("int8", 1, 10),
    decoding("int8", 16, 10),
    decoding("bfloat16", 16, 10, "graph"),
    Check(checks.sharding, 20, dict(processes=1)),
    Check(checks.sharding, 25, dict(processes=2)),
    Check(checks.resuming, 15),
    Check(checks.attention_numerics, 100, dict(dtype="bfloat16", sizes=OTHERS)),
    Check(checks.attention_numerics, 60, dict(dtype="float32", sizes=COMMON)),
    Check(checks.attention_numerics, 45, dict(dtype="float16", sizes=COMMON)),
    Check(checks.attention_numerics, 150, dict(dtype="float32", sizes=OTHERS)),
]


# ------------------------------------------------------------------------------------------ running them

BROKEN = ("CUDA error", "HIP error", "AcceleratorError", "Triton Error", "NCCL")


def perform(function: Callable, device: str, arguments: dict) -> dict:
    """Runs one check, in the process of the checks. Returns its figures, with `ok`."""
    # products and convolutions in float32 are to have its precision
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        figures = {"ok": True} | function(Card(device), **arguments)
    except Missing as error:
        figures = dict(ok=None, skipped=str(error))
    except torch.OutOfMemoryError as error:
        checks.unload()
        figures = dict(ok=None, skipped=f"the memory is too small: {str(error)[:200]}")
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        figures = dict(ok=False, error=text[:2000], traceback=traceback.format_tb(error.__traceback__)[-4:])
    gc.collect()
    if device != "cpu":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    return figures


@dataclass
class Worker:
    """The process of the checks. A check that hangs or dies takes only this process with it, and not the others."""

    device: str
    pool: futures.ProcessPoolExecutor | None = None

    def run(self, check: Check, seconds: float) -> dict:
        """The figures of a check, which gets some seconds."""
        if self.pool is None:
            self.pool = futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), follow_parent)
        try:
            figures = self.pool.submit(perform, check.function, self.device, check.arguments).result(seconds)
        except futures.TimeoutError:
            self.kill()
            return dict(ok=False, error=f"it did not end within {seconds:.0f} s")
        except futures.BrokenExecutor:
            self.kill()
            return dict(ok=False, error="its process died")
        # after an error on the card a process can compute nothing more there
        if any(sign in figures.get("error", "") for sign in BROKEN):
            self.kill()
        return figures

    def kill(self):
        for process in multiprocessing.active_children():
            process.kill()
        self.end()

    def end(self):
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None


def run(options, todo: list[Check] = CHECKS):
    """Runs the checks in order until the minutes are over, and writes their lines; options: device, minutes, out."""
    end = time.monotonic() + 60 * options.minutes
    worker, failed, count = Worker(options.device), [], 0
    # lines are added: a second run must not cost the figures of the first
    with open(options.out, "a", encoding="utf-8") as file:
        try:
            for check in [Check(checks.machine, 60), *todo]:
                begin = time.monotonic()
                left = end - begin
                # on a CPU every check is short
                needed = 0 if options.device == "cpu" else check.seconds
                if left > needed:
                    # one that hangs must not take the time of all others
                    figures = worker.run(check, seconds=min(left, 60 + 2 * check.seconds))
                else:
                    figures = dict(ok=None, skipped=f"{max(left, 0):.0f} s are left, it may take {check.seconds} s")
                figures["seconds"] = round(time.monotonic() - begin, 2)
                line = dict(name=check.function.__name__) | check.arguments | figures
                print(json.dumps(line), file=file, flush=True)
                print(f"{check.label}: {verdict(figures)}", file=sys.stderr, flush=True)
                count += figures["ok"] is not None
                if figures["ok"] is False:
                    failed.append(check.label)
            worker.end()
        finally:
            # after Ctrl-C, a check could take minutes to end by itself
            if worker.pool is not None:
                worker.kill()
    print(f"{options.out}: {count} of {len(todo) + 1} checks ran on {options.device}, {len(failed)} failed")
    for label in failed:
        print(f"failed: {label}")


def verdict(figures: dict) -> str:
    if figures["ok"] is None:
        return f"skipped: {figures['skipped']}"
    if figures["ok"]:
        return f"ok ({figures['seconds']:.1f} s)"
    return f"FAILED: {figures.get('error', 'the result is wrong')}"
