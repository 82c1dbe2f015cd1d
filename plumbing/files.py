"""Files and folders that are complete or absent, one writer at a time, JSON objects."""

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path, mode: str = "w"):
    """Opens a file that replaces `path` at the end; after a failure or a kill, `path` is as it was."""
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
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path):
    """Yields a new folder to fill; it replaces `folder` at the end, when all its files are on the disk.

    If the block fails or the process is killed, `folder` stays as it was. (A kill between the two renames at the end
    leaves it as .NAME.old.) FileExistsError if `folder` has files and is not a checkpoint.
    """
    folder = Path(folder)
    # never delete what somebody else put there
    if folder.exists() and os.listdir(folder) and not (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds something that is not a checkpoint: give another folder")

    # a killed process may have left a partial folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        # what is renamed must be on the disk, or a power cut leaves empty files
        for path in [*partial.rglob("*"), partial]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        # a folder cannot replace one that has files, so the old one moves aside first
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def only_writer(file, name):
    """Locks an open file until the block or the process ends. ValueError, which calls it `name`, if it is locked."""
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
    """Gives `name` to the system's error for a failed write, which names no file; `cli.guard` adds the advice."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(name)
        raise


def check_readable(path: Path):
    """ValueError if a path is a FIFO, device or socket, so that reading could never end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file")


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


def read_json_if_present(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def write_json(path: Path, value: dict):
    """Writes a JSON object, indented, to a file. Inside `atomic_folder` the file is complete or absent."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_supported(settings: dict, supported: dict[str, tuple], where):
    """Raises ValueError if a field of a JSON file, named `where`, has a value that this program does not compute with.

    supported: name of a field -> its allowed values. A field that is absent passes.
    """
    for name, allowed in supported.items():
        if name in settings and settings[name] not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise ValueError(f"{where}: {name} {settings[name]!r} is not supported, only {choices}")
