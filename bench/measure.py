"""Runs two sides of a comparison in turns, each in a process of its own, so that its peak memory is its own."""

import multiprocessing
import os
import re
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from plumbing.cli import follow_parent

# glibc keeps freed blocks of up to 32 MB, and the holes between them would count as memory in use
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**24))
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["bench.sides"])


class Run(NamedTuple):
    seconds: float
    memory: int  # peak of the process, or of its part of the GPU, in bytes
    result: list


class Peak(NamedTuple):
    memory: int  # the most that a function had beyond the start of its process, in bytes
    result: int


def prepare(side):
    """In a side's process: makes the function that `run` calls."""
    global function
    torch.set_grad_enabled(False)
    function = side()


def run(device: str, threads: int) -> Run:
    torch.set_num_threads(threads)
    # other programs may interrupt a single thread: its CPU seconds do not count that
    clock = time.process_time if threads == 1 else time.perf_counter
    memory = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device != "cpu":
        clock = lambda: torch.cuda.synchronize() or time.perf_counter()
        memory = torch.cuda.max_memory_allocated
    begin = clock()
    result = function()
    return Run(clock() - begin, memory(), result)


def measure(sides: list, device: str, threads: int, runs: int) -> list[Run]:
    """Returns one run of each side, with the median of all its seconds.

    A side is a function that returns the function to measure. An error of a side is raised here. RuntimeError if a
    side is killed, or if they compute different results.
    """
    # one process for each side, which keeps its model between the runs
    pools = [ProcessPoolExecutor(1, context, follow_parent) for _ in sides]
    rounds = []
    try:
        for pool, side in zip(pools, sides, strict=True):
            pool.submit(prepare, side).result()
        for _ in range(runs):
            rounds.append([pool.submit(run, device, threads).result() for pool in pools])
    finally:
        # after Ctrl-C, a run could take minutes to end by itself
        for process in multiprocessing.active_children():
            process.kill()

    for ours, peer in rounds:
        if not agree(ours.result, peer.result, device):
            raise RuntimeError("it computed something else")
    return [its[0]._replace(seconds=median(run.seconds for run in its)) for its in zip(*rounds, strict=True)]


def agree(ours: list, others: list, device: str) -> bool:
    """On a CPU ids agree exactly and float32 to 1e-4; on a GPU ids may differ, and 16 bits agree to 3e-2."""
    if len(ours) != len(others):
        return False
    if isinstance(ours[0], int):
        return ours == others or device != "cpu"
    tolerance = 1e-4 if device == "cpu" else 3e-2
    return bool(np.linalg.norm(np.subtract(ours, others)) <= tolerance * np.linalg.norm(ours))


def measure_peak(function) -> Peak:
    """Runs a function in a process of its own, on Linux. It returns what it has made, and a number to compare with.

    Anonymous memory counts (RssAnon), every millisecond and at the end. Pages of mapped files do not: the system can
    drop them.
    """
    with ProcessPoolExecutor(1, context, follow_parent) as pool:
        pid = pool.submit(os.getpid).result()
        begin = peak = anonymous_memory(pid)
        running = pool.submit(run_to_the_end, function)
        while not running.done():
            peak = max(peak, anonymous_memory(pid))
            time.sleep(0.001)
        end, result = running.result()
        return Peak(max(peak, end) - begin, result)


def run_to_the_end(function) -> tuple[int, int]:
    """The memory when a function has ended, which nobody may have looked at in time, and the function's number."""
    _made, number = function()  # `_made` stays in memory until this returns
    return anonymous_memory(os.getpid()), number


def anonymous_memory(pid: int) -> int:
    """Bytes of a process that are in memory and come from no file."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])
