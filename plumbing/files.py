"""Files and folders that are complete or absent, one writer at a time, JSON objects."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plumbing.fields import shorten

TEXT_BYTES = 2**28  # the longest text that is read whole: a tokenizer.json has some 20 MB


# ------------------------------------------------------------------------------------------ reading


def check_readable(path):
    """ValueError if a path is a pipe, a device or a socket: reading it may never end."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a pipe or a device, not a file: save its content as a file")


def read_text(path, limit: int = TEXT_BYTES) -> str:
    """Reads a whole UTF-8 file of at most `limit` bytes; ValueError or OSError with one line."""
    path = Path(path)
    check_readable(path)
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} is larger than {limit:,} bytes: is it the right file?")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): fetch it again") from None


def read_json(path: Path) -> dict:
    """Reads a JSON object; ValueError if the file holds something else, FileNotFoundError if there is none."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: is {path.parent} a model folder?") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object: fetch it again")
    return value


def read_json_if_present(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def check_supported(settings: dict, supported: dict[str, tuple], where):
    """Raises ValueError if a field of a JSON file, named `where`, has a value that this program does not compute with.

    supported: name of a field -> its allowed values. A field that is absent passes.
    """
    for name, allowed in supported.items():
        if name in settings and settings[name] not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise ValueError(f"{where}: {name} {shorten(settings[name])} is not supported, only {choices}")


# ------------------------------------------------------------------------------------------ writing files


@contextmanager
def atomic(path, mode: str = "w"):
    """Opens a file that replaces `path` at the end; after a failure or a kill, `path` is as it was.

    A link is followed. A pipe or a device is written directly. ValueError if another process writes the same file.
    """
    path = _resolve(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if path.exists() and not (path.is_file() or path.is_dir()):
        with resumable(path), open(path, mode, **text) as file:
            yield file
        return

    # always the same name, so that killed processes leave one such file, not many
    partial = path.with_name(f".{path.name}.partial")
    with resumable(path), _locked(partial, os.O_RDWR | os.O_CREAT, path) as descriptor:
        try:
            # a killed process may have left its part
            os.ftruncate(descriptor, 0)
            with open(descriptor, mode, closefd=False, **text) as file:
                yield file
                file.flush()
                os.fsync(descriptor)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _resolve(path) -> Path:
    """The file behind a link."""
    path = Path(os.path.realpath(path))
    if path.is_symlink():
        raise OSError(f"{path} is a link that leads back to itself: give another path")
    return path


def check_writable(path):
    """OSError if a file cannot be written later: there is no folder for it, it is a folder, or it is not ours."""
    path = _resolve(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give a file")
    if not path.parent.is_dir():
        raise NotADirectoryError(f"no folder {path.parent} for {path.name}: make it, or check the path")
    place = path if path.exists() else path.parent
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{place} may not be written: give another path")


def write_json(path: Path, value: dict):
    """Writes a JSON object, indented, to a file. Inside `atomic_folder` the file is complete or absent."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def resumable(name):
    """Gives `name` to the system's error for a failed write, which names no file; `cli.guard` adds the advice."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(name)
        raise


# ------------------------------------------------------------------------------------------ one writer at a time


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
def only_writer_in(folder):
    """Makes a folder and locks it until the block or the process ends; no file is left in it. Errors as `only_writer`.

    The folder itself is locked, so that readers and writers that do not ask are not kept out.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with only_writer(descriptor, folder):
            yield
    finally:
        os.close(descriptor)
        # a mistake leaves no empty folder
        if is_new and not os.listdir(folder):
            folder.rmdir()


@contextmanager
def _locked(path: Path, flags: int, name) -> Iterator[int]:
    """Opens `path` and locks it; yields its descriptor."""
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            with only_writer(descriptor, name):
                # between open and lock its last writer may have renamed it; then it is nobody's part any more
                if _is_same_file(descriptor, path):
                    yield descriptor
                    return
        finally:
            os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------------------------ writing folders


NO_NAME = re.compile("(?!)")


@contextmanager
def atomic_folder(folder: Path, ours: re.Pattern = NO_NAME):
    """Yields a new folder to fill. At the end its files replace those of the same names in `folder`.

    ours: the names that a writer of this kind of folder gives; old files with such a name that the new folder lacks are
    removed. Everything else in `folder` stays. If the block fails or the process is killed in it, `folder` is as it
    was. A kill while files are replaced leaves the rest in .NAME.ready, and `finish_folder` completes it: the next
    writer and the next reader call it. FileExistsError if `folder` has files and is not a checkpoint.
    """
    folder = Path(os.path.realpath(folder))
    finish_folder(folder, ours)
    _check_is_checkpoint(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial, os.O_RDONLY, folder):
        try:
            # a killed process may have left its part
            for path in partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            yield partial
            # what is renamed must be on the disk, or a power cut leaves empty files
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            # a new folder appears at once; from this name on, another one will be completed even after a kill
            is_new = not folder.exists() or not os.listdir(folder)
            partial.rename(folder if is_new else _ready(folder))
            _sync(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finish_folder(folder, ours)


def finish_folder(folder: Path, ours: re.Pattern):
    """Completes what `atomic_folder` began, if a kill came between."""
    folder = Path(os.path.realpath(folder))
    ready = _ready(folder)
    if not ready.exists():
        return
    descriptor = os.open(ready, os.O_RDONLY)
    try:
        # the process that writes it needs only a moment
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if ready.exists():
            _replace_files(ready, folder, ours)
    finally:
        os.close(descriptor)


def _ready(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.ready")


def _replace_files(source: Path, target: Path, ours: re.Pattern):
    """Moves the files of one folder into another and removes it. Can be killed at any line, and called again."""
    target.mkdir(exist_ok=True)
    new = os.listdir(source)
    # 1) remove old files that are `ours`; the mark says that this was done, so that what has been moved stays
    mark = source / ".moving"
    if new and not mark.exists():
        for path in target.iterdir():
            if path.is_file() and path.name not in new and ours.fullmatch(path.name):
                path.unlink()
        mark.touch()

    # 2) move the new files
    for path in source.iterdir():
        if path.is_dir():
            _replace_files(path, target / path.name, ours)
        elif path != mark:
            os.replace(path, target / path.name)
    _sync(target)
    mark.unlink(missing_ok=True)
    source.rmdir()


def _check_is_checkpoint(folder: Path):
    """FileExistsError if a folder has files that this program must not mix with its own."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder")
    if not folder.exists() or not os.listdir(folder):
        return
    try:
        is_checkpoint = "model_type" in read_json(folder / "config.json")
    except (ValueError, OSError):
        is_checkpoint = False
    if not is_checkpoint:
        raise FileExistsError(f"{folder} holds something that is not a checkpoint: give another folder")


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
