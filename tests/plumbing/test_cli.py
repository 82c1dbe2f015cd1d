import resource
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from plumbing import cli, files


def test_an_unknown_flag_names_the_nearest_and_ends_with_status_2(capsys):
    parser = cli.Parser(prog="tool.py")
    parser.add_argument("--images")
    commands = parser.add_subparsers()
    commands.add_parser("score").add_argument("--references")
    for arguments, near in (
        (["--image=x"], "--images"),
        (["score", "--reference=x"], "--references"),
        (["--zzz"], "--help"),
    ):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(arguments)
        assert ended.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith(f"tool.py: unknown argument {arguments[-1]}") and near in line
        assert line.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a\n  b"), FileNotFoundError("a b"), MemoryError("a b")])
def test_a_mistake_is_one_line_and_status_2(capsys, error):
    def run(_):
        raise error

    assert cli.guard("tool.py", run, None) == 2
    assert capsys.readouterr() == ("", "tool.py: a b\n")


def test_a_defect_is_no_mistake_and_keeps_its_traceback():
    with pytest.raises(KeyError):
        cli.guard("tool.py", lambda _: {}["x"], None)


def test_progress_off_a_terminal_is_a_line_every_thirty_seconds(capsys, monkeypatch):
    now = iter([0, 1, 31, 40, 100])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    show = cli.progress("cache", "images")
    for done in (1, 31, 40, 200):
        show(done, 200)
    assert capsys.readouterr().err.splitlines() == [
        "cache:  16% of 200 images, 1.0/s, 3 min left",
        "cache: 100% of 200 images, 2.0/s",
    ]


# ---------------------------------------------------------------------------------------- whole files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "records.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.atomic(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with files.atomic(path) as file:
        file.write("new ä\n")
        assert path.read_text() == "old"
    assert path.read_bytes() == "new ä\n".encode()
    with files.atomic(path, "wb") as file:
        file.write(b"\r\n")
    assert path.read_bytes() == b"\r\n"
    assert list(tmp_path.iterdir()) == [path]


WRITE = """
import sys
from plumbing import files
with files.atomic(sys.argv[1]) as file:
    file.write("x" * 10**6)
    file.flush()
    print("written", flush=True)
    input()
"""


def test_a_killed_process_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "records.json"
    path.write_text("old")
    command = [sys.executable, "-c", WRITE, path]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.read_text() == "old"
    subprocess.run(command, cwd=ROOT, input=b"\n", check=True, capture_output=True)
    assert len(path.read_text()) == 10**6
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "records.json"
    path.write_text("old")
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
    command = [sys.executable, "-c", WRITE, path]
    run = subprocess.run(command, cwd=ROOT, preexec_fn=small, capture_output=True, text=True)
    assert "OSError" in run.stderr and run.returncode == 1
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"
