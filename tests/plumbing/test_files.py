"""Files are complete or absent, compared byte by byte after a failure, a full disk, a killed process."""

import resource
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from plumbing import files

WRITE = """
import sys
from plumbing import cli, files

def run(path):
    with files.atomic(path) as file:
        file.write("x" * 10**6)
        file.flush()
        print("written", flush=True)
        input()

sys.exit(cli.guard("tool.py", run, sys.argv[1]))
"""


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "records.json"
    path.write_text("old")
    return path


def test_a_file_is_replaced_when_it_is_complete(old):
    with files.atomic(old) as file:
        file.write("new ä\n")
        assert old.read_text() == "old"
    assert old.read_bytes() == "new ä\n".encode()
    assert list(old.parent.iterdir()) == [old]


def test_a_failure_leaves_the_old_file_and_keeps_its_message(old):
    with pytest.raises(FileNotFoundError, match=r"^no image x$"), files.atomic(old) as file:
        file.write("half")
        raise FileNotFoundError("no image x")
    assert old.read_text() == "old" and list(old.parent.iterdir()) == [old]


def test_a_killed_process_leaves_the_old_file(old):
    command = [sys.executable, "-c", WRITE, old]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert old.read_text() == "old"

    # the next run is not disturbed by what the killed one left
    subprocess.run(command, cwd=ROOT, input=b"\n", check=True, capture_output=True)
    assert len(old.read_text()) == 10**6 and list(old.parent.iterdir()) == [old]


def test_a_full_disk_leaves_the_old_file_and_says_so(old):
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
    command = [sys.executable, "-c", WRITE, old]
    run = subprocess.run(command, cwd=ROOT, preexec_fn=small, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert str(old) in run.stderr and "make room" in run.stderr
    assert list(old.parent.iterdir()) == [old] and old.read_text() == "old"


def test_a_second_writer_is_refused(old):
    refusal = pytest.raises(ValueError, match="answers")
    with open(old) as one, open(old) as other:
        with files.only_writer(one, "answers"), refusal, files.only_writer(other, "answers"):
            pass
        with files.only_writer(other, "answers"):
            pass


def test_a_folder_changes_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    for content in ("first", "second"):
        with files.atomic_folder(folder) as partial:
            (partial / "config.json").write_text(content)
        assert (folder / "config.json").read_text() == content

    with pytest.raises(KeyboardInterrupt), files.atomic_folder(folder) as partial:
        (partial / "config.json").write_text("third")
        raise KeyboardInterrupt
    assert (folder / "config.json").read_text() == "second"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    for place in (tmp_path, thesis):
        with pytest.raises(OSError, match=str(place)), files.atomic_folder(place):
            pass
    assert thesis.read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [thesis]
