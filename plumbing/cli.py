"""How every command line here behaves: a mistake is one line, long work shows progress, a file is whole or absent.

Nothing heavy is imported, so that `--help` and mistakes answer at once.
"""

import argparse
import difflib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait


class Parser(argparse.ArgumentParser):
    """A mistake is one line on stderr and exit status 2; an unknown flag names the nearest known one."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        sys.exit(fail(self.prog, message))

    def parse_args(self, arguments=None):
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._flags(), 1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        return known

    def _flags(self):
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._flags()


def add_model_flags(add):
    """Beside --model, what every program that reads one takes; add is a parser's add_argument."""
    add("--base", metavar="ID_OR_DIR", help="model under an adapter or a connector, instead of the one it records")
    add("--encoder", metavar="ID_OR_DIR", help="image encoder, instead of the one that the checkpoint names")
    add("--template", metavar="NAME", help="conversation template; without it the checkpoint's own")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="type of the weights; auto: float32 on the CPU, else the checkpoint's 16-bit type")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda or mps")


def add_decoding_flags(add):
    """How a report is decoded: the fields of `sample.Options` that make one report."""
    add("--max-new-tokens", type=int, default=512, metavar="N", help="length limit in tokens")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: greedy or beam search; above: sampling")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that reach P together")
    add("--top-k", type=int, default=50, metavar="K", help="sample from the K likeliest tokens; 0: from all")
    add("--num-beams", type=int, default=1, metavar="B", help="beams of beam search; 1: none")
    add("--length-penalty", type=float, default=1.0, metavar="L",
        help="beams are scored by their log-probability / length^L")  # fmt: skip
    add("--no-repeat-ngram", type=_auto_int, default="auto", metavar="N",
        help="no N tokens in a row come twice, the prompt's too; 0: off; auto: 3 with beams, else off")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="seed of all that is drawn")


def _auto_int(text: str):
    return text if text == "auto" else int(text)


def fail(program: str, message) -> int:
    """Print a mistake as one line; the exit status that goes with it."""
    print(f"{program}: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def guard(program: str, run, arguments) -> int:
    """run(arguments), a user's mistakes as one line; the exit status."""
    try:
        run(arguments)
    except BrokenPipeError:  # the reader of our output has left
        sys.stderr.close()
        return 0
    except (ValueError, OSError, MemoryError) as error:
        return fail(program, error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def progress(label: str, unit: str = "", scale: int = 1):
    """A callback (done, total) that shows a share, a rate and the time left on stderr.

    Counts are shown in `unit`s of `scale` each. On a terminal one line is rewritten; elsewhere a line comes every 30 s.
    """
    terminal = sys.stderr.isatty()
    begin = last = time.monotonic()
    digits = 0 if scale == 1 else 1

    def show(done: int, total: int):
        nonlocal last
        now = time.monotonic()
        finished = done == total
        if now - last < (0.2 if terminal else 30) and not (finished and terminal):
            return
        last, rate = now, done / max(now - begin, 1e-9)
        line = f"{label}: {done / max(total, 1):4.0%} of {total / scale:.{digits}f} {unit}".rstrip()
        line += f", {rate / scale:.{digits + 1 + 2 * (rate < 0.1 * scale)}f}/s"
        line += f", {_duration((total - done) / rate)} left" if rate and not finished else ""
        end = "\n" if finished or not terminal else ""
        print(f"\r{line:<78}" if terminal else line, end=end, file=sys.stderr, flush=True)

    return show


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if seconds > 90 else f"{seconds:.0f} s"


def parallel(function: Callable, items: Iterable, workers: int) -> Iterator:
    """function(item) of every item, in their order, from worker processes that run a little ahead.

    The workers end with this process, even where it is killed. OSError where one of them dies.
    """
    # forked where that is safe, which is at once; elsewhere each worker imports everything anew
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _follow_parent)
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process was killed (out of memory?): run again with fewer --workers, what is done is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent():
    def end_with(parent):
        wait([parent.sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends in order
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def print_table(rows: Iterable[Iterable]):
    """Print rows of cells in columns: the first is flush left, the others flush right; counts with commas."""
    rows = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip())
