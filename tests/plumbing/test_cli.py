"""How every command line behaves, compared with a few examples: mistakes, progress, worker processes, tables."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from plumbing import cli


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [(["--im=x"], "--images"), (["score", "--reference=x"], "--references"), (["--zzz"], "--help")],
)
def test_an_unknown_flag_names_the_nearest_known_one(arguments, advice, capsys):
    parser = cli.Parser(prog="tool.py")
    parser.add_argument("--images")
    parser.add_subparsers().add_parser("score").add_argument("--references")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1
    assert line.startswith("tool.py") and arguments[-1] in line and advice in line


def raising(error):
    def run(_):
        raise error

    return run


@pytest.mark.parametrize("error", [ValueError("a\n  b"), FileNotFoundError("a b"), MemoryError("a b")])
def test_a_mistake_is_one_line_and_status_2(error, capsys):
    assert cli.guard("tool.py", raising(error), None) == 2
    assert capsys.readouterr() == ("", "tool.py: a b\n")


def test_a_defect_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError):
        cli.guard("tool.py", raising(KeyError("x")), None)


def test_ctrl_c_is_status_130():
    assert cli.guard("tool.py", raising(KeyboardInterrupt()), None) == 130


def test_progress_off_a_terminal_is_a_line_every_thirty_seconds(monkeypatch, capsys):
    clock = [0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    show = cli.progress("cache", "images")
    for seconds in (1, 31, 40, 100):
        clock[0] = seconds
        show(2 * seconds, 200)
    first, last = capsys.readouterr().err.splitlines()
    assert "cache" in first and "62/200" in first and "images" in first
    assert "100%" in last


def test_short_work_off_a_terminal_prints_nothing(capsys):
    show = cli.progress("loading", "GiB", 2**30)
    show(2**30, 2**31)
    show(2**31, 2**31)
    assert capsys.readouterr() == ("", "")


def test_parallel_keeps_the_order():
    assert list(cli.parallel(abs, range(-300, 0), workers=2)) == list(range(300, 0, -1))


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error():
    with pytest.raises(ChildProcessError, match="--workers"):
        list(cli.parallel(kill, [0], workers=1))


ENDLESS = """
import time
from plumbing import cli

def work(number):
    print("started", flush=True)
    time.sleep(10**6)

list(cli.parallel(work, [0], workers=1))
"""


def test_the_workers_end_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", ENDLESS], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"started\n"
    parent.kill()
    parent.communicate()  # returns when the worker, which has the same stdout, has ended


def test_a_table_is_aligned_and_has_commas(capsys):
    cli.print_table([["name", "count"], ["images", 12345], ["none", ""]])
    assert capsys.readouterr().out.splitlines() == ["name     count", "images  12,345", "none"]
