"""How every command line behaves, by example: mistakes, progress, worker processes, tables."""

import resource
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import GOLDEN, ROOT

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


def test_a_warning_is_told_once_in_one_line(capsys):
    def run(_):
        for text in ("a\n  b", "c", "a\n  b"):
            warnings.warn(text, stacklevel=1)
            with warnings.catch_warnings():  # Python forgets here what it has told
                warnings.simplefilter("ignore")

    assert cli.guard("tool.py", run, None) == 0
    assert capsys.readouterr() == ("", "tool.py: warning: a b\ntool.py: warning: c\n")


def test_ctrl_c_is_status_130():
    assert cli.guard("tool.py", raising(KeyboardInterrupt()), None) == 130


def test_progress_off_a_terminal_is_a_line_every_thirty_seconds_at_most(monkeypatch, capsys):
    clock = [0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    show = cli.progress("cache", "images")
    for seconds in (1, 31, 40, 50):
        clock[0] = seconds
        show(2 * seconds, 100)
    (line,) = capsys.readouterr().err.splitlines()
    assert "cache" in line and "62/100" in line and "images" in line


def test_parallel_keeps_the_order():
    assert list(cli.parallel(abs, range(-300, 0), workers=2)) == list(range(300, 0, -1))


def test_a_table_is_aligned_and_has_commas(capsys):
    cli.print_table([["name", "count"], ["images", 12345], ["none", ""]])
    assert capsys.readouterr().out.splitlines() == ["name     count", "images  12,345", "none"]


def test_a_wrong_number_of_the_ngram_ban_is_named(capsys):
    parser = cli.Parser(prog="tool.py")
    cli.add_decoding_flags(parser.add_argument)
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-repeat-ngram", "x"])
    assert "auto_or_int" in capsys.readouterr().err
    assert parser.parse_args(["--no-repeat-ngram", "3"]).no_repeat_ngram == 3


def test_there_are_no_more_workers_than_items(monkeypatch):
    counts = []
    pool = lambda workers, *_, **__: counts.append(workers) or ThreadPoolExecutor(1)
    monkeypatch.setattr(cli, "ProcessPoolExecutor", pool)
    assert list(cli.parallel(abs, range(4), workers=10**9)) == [0, 1, 2, 3]
    assert list(cli.parallel(abs, [], workers=3)) == []
    assert counts == [4, 1]


# none for the pool itself, one for it, some workers
@pytest.mark.parametrize("limit", [6, 9, 64])
def test_more_workers_than_files_may_be_open_end_in_one_line(limit):
    command = "import sys; from plumbing import cli; run = lambda _: list(cli.parallel(abs, range(300), 300)); "
    command += "sys.exit(cli.guard('tool.py', run, None))"
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    options = dict(cwd=ROOT, preexec_fn=few, capture_output=True, text=True, timeout=60)
    run = subprocess.run([sys.executable, "-c", command], **options)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "--workers" in run.stderr, run.stderr


def test_an_interrupt_while_workers_start_ends_them_before_the_program():
    command = "import os, signal, sys, threading; from plumbing import cli\n"
    command += "run = lambda _: list(cli.parallel(abs, [1], 2))\n"
    # the block in which the workers start holds it back, too
    command += "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); os.kill(os.getpid(), signal.SIGINT)\n"
    command += "sys.exit(cli.guard('tool.py', run, None) + threading.active_count() - 1)"
    run = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (130, "\n")


# -------------------------------------------------------------------------------- streams


SAMPLE = f"{sys.executable} {ROOT}/sample.py --model {GOLDEN}/libra-7b/model --images {GOLDEN}/images/0.png"
SAMPLE += " --max-new-tokens 3"


def shell(command, **options):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def report():
    return shell(SAMPLE).stdout


@pytest.mark.parametrize("redirection", ["2>&-", "<&-", "2> >(true)", "--verbose <&- 2>&-"])
def test_a_stream_that_is_closed_does_not_change_the_report(report, redirection):
    run = shell(f"{SAMPLE} {redirection}")
    assert (run.returncode, run.stdout, run.stderr) == (0, report, "") and report


@pytest.mark.parametrize("arguments", ["--help | true", "| true", "--chat --query Why? <&- | true"])
def test_a_reader_that_ends_early_ends_the_program_silently(arguments):
    run = shell(f"set -o pipefail; {SAMPLE} {arguments}")
    assert run.stderr == "" and run.returncode == 0


def test_ctrl_c_during_the_imports_is_silent():
    process = subprocess.Popen(SAMPLE.split(), stderr=subprocess.PIPE, text=True)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode != 0


def test_a_message_cannot_command_the_terminal(capsys):
    cli.fail("tool.py", "no image \x1b[31mred\x07\udcff ä")
    assert capsys.readouterr().err == "tool.py: no image ?[31mred?? ä\n"
