"""Files that are whole or absent, JSON objects, and one writer at a time."""

import errno
import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path, mode: str = "w"):
    """A file to write that takes the place of `path` when it is whole and on the disk, and leaves nothing otherwise."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")  # one name, so that a killed process leaves one file at most
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(partial, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say where
            error.filename = str(path)
        raise


@contextmanager
def atomic_folder(folder: Path):
    """A new folder to fill, which takes the place of `folder` when it is whole and on the disk.

    A reader sees the old folder or the new one; whatever fails leaves the old one as it was.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} holds something that is not a checkpoint: give another folder")
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        yield partial
        for file in [*partial.iterdir(), partial]:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def only_writer(file, name):
    """Hold the lock of an open file; ValueError, naming `name`, where another process holds it.

    The lock goes with the process, however that ends. (Windows has no fcntl; we support Linux and macOS.)
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{name} is being written by another process: wait for it") from None
    yield


@contextmanager
def resumable(name):
    """Around work that keeps what it has done: a full disk says so, and that running it again continues."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(f"{name}: {error.strerror}: make room and run this again, what is done is kept") from None


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError where it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: is {path.parent} a model folder?") from None
    except ValueError as error:  # covers wrong JSON and wrong UTF-8
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object: fetch it again")
    return value


def write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
