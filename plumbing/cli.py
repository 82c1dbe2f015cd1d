"""What every command line shares: flags, mistakes in one line, progress, worker processes, tables."""

import argparse
import difflib
import errno
import io
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice

from tqdm import tqdm

from plumbing.fields import printable


class Parser(argparse.ArgumentParser):
    """A mistake is one line on stderr and exit status 2; an unknown flag names the nearest known one."""

    def error(self, message):
        sys.exit(fail(self.prog, message))

    def exit(self, status=0, message=None):
        # the reader of --help may have ended, as `head` does
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            forget(sys.stdout)
        super().exit(status, message)

    def parse_known_args(self, arguments=None, namespace=None):
        self.allow_abbrev = False
        # argparse would take it for a list without values
        for argument in sys.argv[1:] if arguments is None else arguments:
            if argument == "--" or argument.endswith("=--"):
                self.error(f"unknown argument {argument}; see --help")
        known, unknown = super().parse_known_args(arguments, namespace)
        # argparse calls this for a subcommand too, which looks among its own flags
        for argument in unknown:
            nearest = difflib.get_close_matches(argument.split("=")[0], self._option_string_actions, n=1)
            advice = f"did you mean {nearest[0]}?" if nearest else "see --help"
            self.error(f"unknown argument {argument}; {advice}")
        return known, unknown


def add_model_flags(add):
    """The flags of every program that reads a model, beside --model; add is a parser's add_argument."""
    add("--base", metavar="ID_OR_DIR", help="model below an adapter or a connector; default: the one that it records")
    add("--encoder", metavar="ID_OR_DIR", help="image encoder; default: the one that the checkpoint names")
    add("--template", metavar="NAME", help="conversation template; default: the checkpoint's own")
    text = "show DICOM as the file says, or as MIMIC-CXR-JPG did; default: as the checkpoint was trained, else standard"
    add("--dicom-display", choices=("standard", "jpg"), help=text)
    text = "auto: float32 on a CPU; int8, int4: the decoder's weights in so many bits, the rest as with auto"
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16", "int8", "int4"), help=text)
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--compile", action="store_true", help="compile the decoding step: a slow first report, then faster ones")


def auto_or_int(text):
    return text if text == "auto" else int(text)


def add_decoding_flags(add):
    """How a report is decoded: the fields of `sample.Options` that concern a single report."""
    add("--max-new-tokens", type=int, default=512, metavar="N", help="limit of the report's length, in tokens")
    add("--temperature", type=float, default=0.0, metavar="T", help="above 0: sampling; 0: greedy or beam search")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that sum to P")
    add("--top-k", type=int, default=50, metavar="K", help="sample from the K likeliest tokens; 0: from all")
    add("--num-beams", type=int, default=1, metavar="B", help="beams of the beam search; 1: no beam search")
    add("--length-penalty", type=float, default=1.0, metavar="L", help="a beam's score is log-probability / length^L")
    add("--no-repeat-ngram", type=auto_or_int, default="auto", metavar="N", help="ban repeats of N; auto: 3 with beams")
    add("--seed", type=int, default=0, help="seed of the random numbers")


def add_expert_flags(add, kind):
    """Contrastive decoding (contrast.py). kind: what the file of scores holds."""
    add("--expert", metavar="FILE", help=f"let a classifier's scores guide the report; {kind}")
    # None, so that one that is given without --expert is seen
    add("--alpha", type=float, metavar="A", help="share of the expert's guided prompt; with --expert 0.5 by default")
    add("--beta", type=float, metavar="B", help="share of the tokens that it pushes; with --expert 0.5 by default")
    add("--gamma", type=float, metavar="G", help="the odds that no push exceeds; with --expert 10 by default")


def fail(program, message):
    """Prints a mistake as one line on stderr, in place of a progress bar. Returns the exit status, 2."""
    tqdm.write(f"{program}: {printable(message)}", file=sys.stderr)
    return 2


def warn(program, message):
    tqdm.write(f"{program}: warning: {printable(message)}", file=sys.stderr)


def forget(stream):
    """What is written to this stream from now on, its buffer included, goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def guard(program, run, arguments):
    """Calls run(arguments). Returns the exit status: 0, 2 after a mistake of the user, 130 after Ctrl-C.

    A warning is one line on stderr, as a mistake is, and is told once.
    """
    told = set()

    def show_once(message, *_, **__):
        # Python itself starts again whenever a filter of warnings changes, as for every image that is read
        if str(message) not in told:
            told.add(str(message))
            warn(program, message)

    warnings.showwarning = show_once
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader of our output has ended, as `head` does
        forget(sys.stdout)
    except (ValueError, OSError, MemoryError) as error:
        # the one place with advice on a full disk; `files.resumable` has added the name of the file
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            error = f"{error.filename}: {error.strerror}: make room and run this again, what is done is kept"
        elif isinstance(error, MemoryError) and not str(error):
            error = "the memory is full: give smaller files or settings"
        return fail(program, error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


@contextmanager
def interrupts_wait():
    """A Ctrl-C that comes in this block is raised at its end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def progress(label, unit="", scale=1):
    """Returns show(done, total), which draws a progress bar on stderr; with a scale above 1 it counts bytes."""
    # no thread of its own, because `parallel` forks this process
    tqdm.monitor_interval = 0
    is_terminal = sys.stderr.isatty()
    # where nothing can be redrawn, a line is printed at most every 30 seconds
    target = dict(file=sys.stderr) if is_terminal else dict(file=io.StringIO(), mininterval=30)
    unit = "B" if scale > 1 else unit
    # a half-made bar would complain when it is deleted
    with interrupts_wait():
        bar = tqdm(desc=label, unit=unit, unit_scale=scale > 1, miniters=0, leave=False, **target)

    def show(done, total):
        bar.total = total
        if bar.update(done - bar.n) and not is_terminal:
            print(bar, file=sys.stderr)
        if done == total:
            bar.close()

    return show


def parallel(function, items, workers):
    """Yields function(item) for each item of a sequence, in order, from at most `workers` worker processes.

    ChildProcessError if they cannot be started, or one is killed.
    """
    pool = None
    try:
        # a Ctrl-C before the workers ignore it would be theirs, too
        with interrupts_wait():
            # all are forked at once, also those that would find nothing to do
            pool = start_workers(max(1, min(workers, len(items))))
        # in batches, because the results must not fill the memory
        items = iter(items)
        while batch := list(islice(items, 32 * workers)):
            yield from pool.map(function, batch)
    except BrokenExecutor:
        raise ChildProcessError("a worker process was killed (no memory?): run again with fewer --workers") from None
    finally:
        # a pool that has not ended when Python does may print a traceback
        if pool is not None:
            with interrupts_wait():
                pool.shutdown(cancel_futures=True)


def start_workers(count):
    # a forked worker starts at once; where forking is not safe, each one imports everything anew
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    others = multiprocessing.active_children()
    try:
        pool = ProcessPoolExecutor(count, context, initializer=follow_parent)
        # the first task forks the workers
        pool.submit(int)
    except OSError as error:
        # those that were started would wait for ever
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        problem = f"{count} worker processes cannot be started ({error.strerror})"
        raise ChildProcessError(f"{problem}: run again with fewer --workers") from None
    return pool


def follow_parent():
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    # Ctrl-C is for the parent, which ends its workers; a parent that is killed cannot
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def print_table(rows):
    """Prints rows in columns, the first flush left, the others flush right; integers get commas."""
    show = lambda cell: f"{cell:,}" if isinstance(cell, int) else str(cell)
    rows = [list(map(show, row)) for row in rows]
    first_width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = map(str.rjust, others, widths)
        print("  ".join([first.ljust(first_width), *cells]).rstrip())
