"""A fuzzer: bad files, bad flags and broken states of all kinds for every program. Run by `make test-fuzz`.

    python tests/fuzz.py                                         2,000 inputs
    python tests/fuzz.py --kind images --inputs 300 --seed 7     other images than those
    python tests/fuzz.py --kind images --seed 7 --number 12      one of them again; its folder is kept

A kind is a function that puts a good input into an empty folder and says how to run a program on it and how to damage
it. Each input runs in a fork of this process, which has imported everything. Whatever the damage, a program must

- end with status 0, or with status 2 and one line on stderr that begins with its name; never with a traceback,
- within SECONDS and MEMORY,
- without a change to what it read, a partial file, or a file outside the input's folder; with status 2, without any
  new file but those with which a rerun goes on,
- with status 0, give what it gives for the good input, or warn, if the damage is one that no author can have meant
  (a text in place of a number, an HTML page in place of weights). Numbers that are not finite are never right.
"""

import argparse
import atexit
import faulthandler
import fnmatch
import gc
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
HOME = Path(tempfile.mkdtemp(prefix="nanolibra-fuzz-")).resolve()  # everything that is written is in here
# before the programs are imported: no network, one thread, and a place for the caches of other packages
CACHES = HOME / "caches"
CACHES.mkdir()
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(CACHES), "OMP_NUM_THREADS": "1", "TMPDIR": str(CACHES)}
tempfile.tempdir = str(CACHES)
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

import torch  # noqa: E402
from fuzzing.damage import Damage  # noqa: E402
from fuzzing.kinds import KINDS, Input, Store  # noqa: E402

import eval as evaluate  # noqa: E402
import model  # noqa: E402
import prepare  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from plumbing.cli import Parser, progress  # noqa: E402

SECONDS = 30  # a good input takes less than one
MEMORY = 4 * 2**30  # bytes
PROGRAMS = {
    "sample": lambda arguments: sample.main(sample.parse(arguments)),
    "eval": lambda arguments: evaluate.main(evaluate.parse(arguments)),
    "prepare": lambda arguments: prepare.main(prepare.parse(arguments)),
    "model": model.main,
    "train": train.main,
}


# ------------------------------------------------------------------------------------------ running


class Run(NamedTuple):
    status: int
    out: str
    err: str
    trace: str  # where the program was when the time was over
    strays: str  # what it would have written outside its folder
    memory: int  # bytes beyond those of this process


def execute(input: Input, folder: Path) -> Run:
    """Runs a program on an input in a fork of this process. (A child that hangs or dies must not end the fuzzer.)"""
    names = ("out", "err", "trace", "strays")
    streams = {name: tempfile.TemporaryFile(buffering=0) for name in names}  # noqa: SIM115
    before = sum(memory_of(os.getpid(), "RssAnon", "RssShmem"))
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        _run_child(input, folder, streams)
    # the peak is of the child and of its workers; pages of mapped files do not count, the system takes them back
    ended, mapped = 0, 0
    while not ended:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        mapped = max([mapped, *memory_of(child, "RssFile")])
        time.sleep(0 if ended else 0.005)
    # worker processes that may be left
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    texts = []
    for stream in streams.values():
        stream.seek(0)
        # of endless output the beginning will do
        texts.append(stream.read(10**6).decode(errors="replace"))
        stream.close()
    return Run(os.waitstatus_to_exitcode(status), *texts, 1024 * usage.ru_maxrss - mapped - before)


def memory_of(process: int, *kinds: str) -> list[int]:
    """Bytes of memory of these kinds (as Linux names them) that a process takes now; empty where that is not known."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return []
    return [1024 * int(kilobytes) for kind in kinds for kilobytes in re.findall(rf"{kind}:\s+(\d+)", text)]


def _run_child(input: Input, folder: Path, streams: dict):
    """Runs a program in this process and ends it."""
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ["PWD"] = str(folder)
        # 1) streams, of C libraries too
        for number, stream in ((1, streams["out"]), (2, streams["err"])):
            os.dup2(stream.fileno(), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")

        # 2) limits: of time, with a report where the program is; of memory, above what is a failure; of places to write
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=streams["trace"])
        signal.alarm(SECONDS + 10)
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
        if pages:
            limit = pages * resource.getpagesize() + 2 * MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if input.open_files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (input.open_files, input.open_files))
        keep_inside((folder, CACHES), streams["strays"].fileno())

        # 3) the program
        status = PROGRAMS[input.program](list(input.arguments))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status or 0)


def keep_inside(folders, report: int):
    """From now on this process can change files in these folders only; what it tries is written to `report`."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    roots = [os.path.realpath(folder) for folder in folders]

    def check(path):
        # a number is a file that is open already
        if isinstance(path, int) or os.fsdecode(path) == os.devnull:
            return
        path = os.path.realpath(os.fsdecode(path))
        if not any(Path(path).is_relative_to(root) for root in roots):
            os.write(report, f"{path!r}\n".encode(errors="replace"))
            raise PermissionError(f"{path!r} is outside of the fuzzer's folder")

    def hook(event: str, arguments: tuple):
        if event == "open" and arguments[2] & writing:
            check(arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            check(arguments[1])
            if event == "os.rename":
                check(arguments[0])
        elif event in ("os.remove", "os.rmdir", "os.mkdir"):
            # relative to an open folder: shutil.rmtree has been checked
            if arguments[-1] == -1:
                check(arguments[0])
        elif event in ("shutil.rmtree", "os.truncate", "os.chmod"):
            check(arguments[0])

    sys.addaudithook(hook)


# ------------------------------------------------------------------------------------------ the contract

RANKS = ("wrote outside", "lost", "silent", "hang", "memory", "traceback", "left behind", "lines")  # worst first

# lines beside a mistake's: warnings, and what was left out before it
NOTE = re.compile(r"^\w+\.py: warning: | left out|^skipped |: trying the one before$")


class Problem(NamedTuple):
    rank: str
    place: str  # in the program, or what was lost or left
    detail: str = ""


def problems_of(input: Input, run: Run, before: dict, after: dict) -> list[Problem]:
    """What breaks the contract. before, after: `snapshot`s of the input's folder."""
    problems = []
    add = lambda *parts: problems.append(Problem(*parts))
    place, error = locate(run)
    if run.strays:
        add("wrote outside", run.strays.splitlines()[0])

    # 1) how it ended
    if run.trace:
        add("hang", place)
    elif "Traceback (most recent call last)" in run.err:
        add("memory" if re.search(r"MemoryError|allocate", error) else "traceback", place, error)
    elif run.status not in (0, 2):
        add("traceback", f"status {run.status}", run.err[-200:])
    elif run.memory > MEMORY or re.search(r"MemoryError|[Uu]nable to allocate|can't allocate|Cannot allocate", run.err):
        add("memory", general(run.err.strip()[-100:]), f"{run.memory / 2**30:.1f} GB")

    # 2) what it printed
    lines = run.err.splitlines()
    program = f"{input.program}.py"
    foreign = [line for line in lines if re.search(r"Warning: |Exception ignored|^\[[EW]|libtiff|TIFF\w+: ", line)]
    errors = [line for line in lines if not NOTE.search(line)]
    is_mistake = run.status == 2 and not run.trace
    if is_mistake and (len(errors) != 1 or not re.match(rf"{program}( [a-z-]+)?: .*[a-z]{{2}}", errors[0])):
        add("lines", f"{len(errors)} lines: {general(errors[-1] if errors else '')}")
    elif run.status == 0 and foreign:
        add("lines", general(foreign[0]))
    if is_mistake and run.out.startswith("{"):
        add("lines", "an object on stdout with status 2")

    # 3) what is there now; of a program that was stopped nothing is expected
    if run.trace:
        return problems
    allowed = input.outputs if run.status == 0 else input.resumable
    is_allowed = lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in allowed)
    for name in before:
        if name not in after and not is_allowed(name):
            add("lost", f"{input.program}.py removed {general(name)}")
        elif before[name] != after.get(name) and not is_allowed(name):
            add("lost", f"{input.program}.py changed {general(name)}", f"status {run.status}")
    for name in after:
        if name in before:
            continue
        is_part = re.search(r"\.(partial|ready|moving)(/|$)", name)
        if is_part or not is_allowed(name):
            add("left behind", f"{input.program}.py: {general(name)} with status {run.status}")
            break
    return problems


def locate(run: Run) -> tuple[str, str]:
    """The innermost line of the program in a traceback, and the exception."""
    text = run.trace or run.err
    frames = re.findall(rf'File "{re.escape(str(ROOT))}/([^"]+)", line (\d+) in (\w+)', text)
    # faulthandler lists the innermost frame first, Python last
    if not run.trace:
        frames = re.findall(rf'File "{re.escape(str(ROOT))}/([^"]+)", line (\d+), in (\S+)', text)[::-1]
    frames = [frame for frame in frames if not frame[0].startswith(("tests/", ".venv/"))]
    place = "{}:{} {}".format(*frames[0]) if frames else "outside the program"
    lines = text.strip().splitlines()
    return place, (lines[-1] if lines else "")[:300]


def general(text: str) -> str:
    """A message without what differs between inputs."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", text.replace(str(HOME), ""))
    return re.sub(r"\b[0-9a-f-]{8,}\b|\d+", "0", text)[:160]


def snapshot(folder: Path) -> dict[str, object]:
    """{name: content} of all that is in a folder."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(parent, name)
            status = path.lstat()
            content: object = status.st_mode
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                # of huge files the time will do
                small = status.st_size < 2**26
                content = hashlib.md5(path.read_bytes()).digest() if small else (status.st_size, status.st_mtime_ns)
            found[str(path.relative_to(folder))] = content
    return found


# ------------------------------------------------------------------------------------------ the fuzzer


class Fuzzer:
    """Runs inputs and collects what is wrong."""

    def __init__(self, seed: int):
        self.seed = seed
        self.good: dict[str, object] = {}  # {command: outcome of the good input}
        self.failures: dict[tuple, list[str]] = defaultdict(list)  # {(rank, place): descriptions of inputs}

    def try_input(self, kind, number: int) -> Path:
        """Makes and runs one input of a kind. Returns its folder."""
        name = f"--seed {self.seed} --kind {kind.__name__} --number {number}"
        folder = HOME / f"{kind.__name__}-{number}"
        folder.mkdir()
        input = kind(random.Random(name), folder)
        # 1) the good input must be accepted; inputs of the same command share it
        key = f"{kind.__name__} {input.arguments}"
        if input.outcome and key not in self.good:
            self.good[key] = self.run_good(kind, name)

        # 2) the bad one
        damage = input.damage()
        before = snapshot(folder)
        run = execute(input, folder)
        problems = problems_of(input, run, before, snapshot(folder))
        if not problems and run.status == 0 and input.outcome:
            problems = compare(input, damage, run, self.good[key], folder)
        for problem in problems:
            command = " ".join(map(repr, input.arguments))[:600]
            lines = [name, f"    {input.program}.py {command}", f"    input: {damage.text}", f"    {problem.detail}"]
            self.failures[problem.rank, problem.place].append("\n".join(lines))
        return folder

    def run_good(self, kind, name: str):
        """The outcome of the good input, which must be accepted."""
        folder = HOME / "good"
        folder.mkdir()
        input = kind(random.Random(name), folder)
        outcome = input.outcome(succeed(*input[:2], folder), folder)
        shutil.rmtree(folder)
        return outcome

    def report(self):
        """Prints the failures, worst first."""
        for rank, place in sorted(self.failures, key=lambda key: (RANKS.index(key[0]), key[1])):
            inputs = self.failures[rank, place]
            print(f"{rank}: {place} ({len(inputs)} inputs)\n  {inputs[0]}")
        counts = [f"{sum(key[0] == rank for key in self.failures)} × {rank}" for rank in RANKS]
        print(f"{len(self.failures)} different failures: {', '.join(counts)}" if self.failures else "no failure")


def compare(input: Input, damage: Damage, run: Run, expected, folder: Path) -> list[Problem]:
    """Whether an accepted input silently gave something else than the good one."""
    try:
        outcome = input.outcome(run.out, folder)
    except (ValueError, OSError) as error:
        return [Problem("silent", f"{input.program}.py: {general(str(error))}: {general(damage.text)}")]
    warns = f"{input.program}.py: warning: " in run.err
    if outcome == expected or not (input.always or (damage.never_fits and not warns)):
        return []
    return [Problem("silent", f"{input.program}.py accepts {general(damage.text)}", f"{outcome} not {expected}"[:600])]


def succeed(program: str, arguments: list[str], folder: Path) -> str:
    """Runs a program on what is right. Returns what it printed."""
    run = execute(Input(program, arguments), folder)
    if run.status or run.trace:
        raise RuntimeError(f"{program}.py {arguments} fails in {folder} with status {run.status}: {run.err}{run.trace}")
    return run.out


def parse(arguments=None):
    parser = Parser(prog="fuzz.py", description="Run the programs on bad inputs.")
    kinds = {kind.__name__: kind for kind in KINDS}
    parser.add_argument("--inputs", type=int, default=2000, metavar="N", help="number of inputs (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="other inputs (default: 0)")
    help = f"kinds of inputs (default: all): {', '.join(kinds)}"
    parser.add_argument("--kind", nargs="+", default=list(kinds), choices=kinds, metavar="NAME", help=help)
    parser.add_argument("--number", type=int, metavar="N", help="run one input of a kind, and keep its folder")
    parsed = parser.parse_args(arguments)
    parsed.kinds = [kinds[name] for name in parsed.kind]
    return parsed


def main(arguments: argparse.Namespace) -> int:
    # 1) what all inputs share
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    (HOME / "store").mkdir()
    Store.fill(HOME / "store", succeed)
    # a fork that collects garbage would copy the memory of this process
    gc.freeze()

    # 2) the inputs are shared among the kinds by their weights
    fuzzer, total = Fuzzer(arguments.seed), sum(KINDS[kind] for kind in arguments.kinds)
    plan = []
    for kind in arguments.kinds:
        plan += [(kind, number) for number in range(max(1, round(arguments.inputs * KINDS[kind] / total)))]
    if arguments.number is not None:
        folder = fuzzer.try_input(arguments.kinds[0], arguments.number)
        atexit.unregister(shutil.rmtree)
        print(f"{folder} is kept", file=sys.stderr)
        fuzzer.report()
        return int(bool(fuzzer.failures))

    # 3) run them; what has been found is printed after Ctrl-C, too
    show, seconds = progress("fuzzing", "inputs"), defaultdict(float)
    try:
        for done, (kind, number) in enumerate(plan, 1):
            start = time.monotonic()
            shutil.rmtree(fuzzer.try_input(kind, number))
            seconds[kind.__name__] += time.monotonic() - start
            show(done, len(plan))
    finally:
        fuzzer.report()
        times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
        print(f"{sum(seconds.values()):.0f} s: {times}", file=sys.stderr)
    return int(bool(fuzzer.failures))


if __name__ == "__main__":
    sys.exit(main(parse()))
