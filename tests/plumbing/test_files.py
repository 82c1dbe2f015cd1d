"""Files are complete or absent, compared byte by byte after a failure, a full disk, a killed process."""

import json
import os
import re
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
    for number in (1, 2):
        content = json.dumps({"model_type": "libra", "number": number})
        with files.atomic_folder(folder) as partial:
            (partial / "config.json").write_text(content)
        assert (folder / "config.json").read_text() == content

    with pytest.raises(KeyboardInterrupt), files.atomic_folder(folder) as partial:
        (partial / "config.json").write_text("third")
        raise KeyboardInterrupt
    assert (folder / "config.json").read_text() == content
    assert list(tmp_path.iterdir()) == [folder]


OURS = re.compile(r"(model.*|config)\.(safetensors|json)")
FILES = {"config.json": "{}", "model.safetensors": "new", "encoder/config.json": "new"}


def fill(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(content)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def project(tmp_path):
    """A checkpoint beside which somebody keeps their own files."""
    folder = tmp_path / "project"
    old = {"config.json": '{"model_type": "libra"}', "model-2.safetensors": "old", "encoder/notes.txt": "mine"}
    fill(folder, old | {"src/config.json": "mine", "README.md": "mine"})
    return folder


AFTER = FILES | {"encoder/notes.txt": "mine", "src/config.json": "mine", "README.md": "mine"}


def test_files_of_others_stay_and_old_files_of_ours_go(project):
    with files.atomic_folder(project, OURS) as partial:
        fill(partial, FILES)
    assert contents(project) == AFTER
    assert list(project.parent.iterdir()) == [project]


@pytest.mark.parametrize("calls", range(12))
def test_a_kill_while_files_are_replaced_is_made_good_by_the_next_reader(project, calls, monkeypatch):
    class Killed(BaseException):
        pass

    def die_in_time(real):
        def call(*arguments, **options):
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise Killed
            return real(*arguments, **options)

        return call

    # 1) killed before its n-th change of the disk
    with monkeypatch.context() as patch:
        for place, name in ((os, "replace"), (type(project), "unlink"), (type(project), "rmdir")):
            patch.setattr(place, name, die_in_time(getattr(place, name)))
        try:
            with files.atomic_folder(project, OURS) as partial:
                fill(partial, FILES)
        except Killed:
            pass
    # 2) whoever comes next
    files.finish_folder(project, OURS)
    assert contents(project) == AFTER
    assert list(project.parent.iterdir()) == [project]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    for place in (tmp_path, thesis):
        with pytest.raises(OSError, match=str(place)), files.atomic_folder(place):
            pass
    assert thesis.read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [thesis]


def test_a_link_stays_a_link_and_a_pipe_a_pipe(old, tmp_path):
    link, pipe = tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(old)
    with files.atomic(link) as file:
        file.write("new")
    assert link.is_symlink() and old.read_text() == "new"

    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with files.atomic(pipe) as file:
        file.write("through")
    assert pipe.is_fifo() and os.read(reader, 100) == b"through"
    os.close(reader)


def test_what_never_ends_is_not_read(tmp_path):
    pipe = tmp_path / "model.json"
    os.mkfifo(pipe)
    for read in (files.read_json, files.read_text, files.check_readable):
        with pytest.raises(ValueError, match=f"{pipe} is a pipe or a device"):
            read(pipe)


BAD_JSON = [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 10**5, b'{"a":' * 10**5]


@pytest.mark.parametrize("data", BAD_JSON, ids=range(len(BAD_JSON)))
def test_bad_json_is_one_line(tmp_path, data):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{path} .*: fetch it again$"):
        files.read_json(path)


def test_two_writers_of_one_path(old):
    with files.atomic(old) as one:
        one.write("one")
        with pytest.raises(ValueError, match=r"records.json is being written by another process"), files.atomic(old):
            pass
    assert old.read_text() == "one" and list(old.parent.iterdir()) == [old]


def test_two_writers_of_one_folder(tmp_path):
    for writer in (files.only_writer_in, files.atomic_folder):
        with writer(tmp_path / "out"), pytest.raises(ValueError, match="another process"), writer(tmp_path / "out"):
            pass
