"""Files and folders that are complete or absent, one writer at a time, JSON objects."""

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path, mode: str = "w"):
    """Opens a file for writing that replaces `path` at the end, when it is complete and on the disk.

    If the block fails or the process is killed, `path` stays as it was.
    """
    path = Path(path)
    # always the same name, so that killed processes leave one such file, not many
    partial = path.with_name(f".{path.name}.partial")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with resumable(path), open(partial, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        # after a failure; after a success it has the name `path`
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path):
    """Yields a new folder to fill; it replaces `folder` at the end, when all its files are on the disk.

    If the block fails or the process is killed, `folder` stays as it was. (A kill between the two renames at the end
    leaves it as .NAME.old.) FileExistsError if `folder` has files and is not a checkpoint.
    """
    folder = Path(folder)
    # never delete what somebody else put there
    is_checkpoint = (folder / "config.json").exists()
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not (is_checkpoint or is_empty):
        raise FileExistsError(f"{folder} holds something that is not a checkpoint: give another folder")

    # a killed process may have left a partial folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        # what is renamed must be on the disk, or a power cut leaves empty files
        for file in [*partial.rglob("*"), partial]:
            _sync(file)
        # a folder cannot replace one that has files, so the old one moves aside first
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def only_writer(file, name):
    """Locks an open file for the block; ValueError, which calls it `name`, if another process has locked it.

    The system releases the lock when the process ends, however it ends. Windows has no such locks (fcntl).
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{name} is being written by another process: wait for it") from None
    try:
        yield
    finally:
        # a later block in the same process may lock the file again
        fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def resumable(name):
    """Wraps work that writes to `name` and keeps what is done, so that it can be run again after a full disk.

    The system's error for a failed write names no file; here it gets `name`. `cli.guard` adds the advice.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(name)
        raise


def read_json(path: Path) -> dict:
    """Reads a JSON object; ValueError if the file holds something else, FileNotFoundError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: is {path.parent} a model folder?") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object: fetch it again")
    return value


def write_json(path: Path, value: dict):
    """Writes a JSON object, indented, to a file. Inside `atomic_folder` the file is complete or absent."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_supported(settings: dict, supported: dict[str, tuple], where):
    """Check the fields of a parsed JSON file against the values that this program computes with.

    supported: name of a field -> its allowed values. A field that is absent passes. where: the file, for the message.
    Raises a ValueError that names the first field with another value.
    """
    for name, allowed in supported.items():
        if name in settings and settings[name] not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise ValueError(f"{where}: {name} {settings[name]!r} is not supported, only {choices}")
