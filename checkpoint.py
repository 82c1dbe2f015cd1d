"""Hugging Face folders and hub ids <-> a config dict and a stream of named tensors.

A checkpoint is a folder (or a hub repository that is downloaded into one) with `config.json` and weights in
`model.safetensors`, in shards named by `model.safetensors.index.json`, or in the older `pytorch_model*.bin`.
Names, shapes and types are read first, so that a wrong checkpoint is refused before any data is; then the
tensors stream one at a time from memory-mapped files into a model that was built without memory.

A user's mistake raises ValueError, OSError or MemoryError with one line: what, where, what to do.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

CONFIG_FILES = ("*.json", "tokenizer.model")  # small; the index files of the weights are among them
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in this order; FILE.index.json lists its shards


class Stored(NamedTuple):
    """A tensor on disk: nothing of it is in memory."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


# ---------------------------------------------------------------------------------------------- where


class Source(NamedTuple):
    """Where a checkpoint lies: a folder, and the hub repository that it is a download of, if any."""

    folder: Path
    repository: str | None = None

    def __str__(self):
        return self.repository or str(self.folder)

    def fetch(self, names: Iterable[str]):
        """Download the files that match the names, if this is a hub repository; into the hub's cache.

        HF_HUB_OFFLINE and the hub's other variables are respected. Returns the folder.
        """
        if not self.repository:
            return self.folder
        try:
            return Path(snapshot_download(self.repository, allow_patterns=list(names)))
        except RepositoryNotFoundError:
            raise FileNotFoundError(
                f"no folder {self.repository}, and the hub has no such repository (or it needs a login): check the name"
            ) from None
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise OSError(
                f"{self.repository} is not in the local hub cache and could not be downloaded ({reason}): connect to "
                "the network, or download it elsewhere and give its folder"
            ) from None


def locate(place, relative_to: Path | None = None) -> Source:
    """A checkpoint by its path, its path relative to another checkpoint, or its hub id (config files are fetched)."""
    for folder in ([Path(relative_to, place)] if relative_to else []) + [Path(place).expanduser()]:
        if folder.is_dir():
            return Source(folder)
        if folder.exists():
            raise NotADirectoryError(f"{folder} is a file: give the model folder that holds its config.json")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(place)):
        raise FileNotFoundError(f"no model folder {place} (and it is not a hub id like owner/name): check the path")
    return Source(Source(Path(), str(place)).fetch(CONFIG_FILES), str(place))


def weight_files(source: Source) -> list[Path]:
    """The files that hold a checkpoint's weights.

    Never a glob: RAD-DINO's repository holds three safetensors files, of which one is the model.
    """
    folder = source.folder
    for single in WEIGHT_FILES:
        index = folder / f"{single}.index.json"
        names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else [single]
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names a file outside its folder ({outside[0]}): refused")
        source.fetch(names)
        missing = [name for name in names if not (folder / name).exists()]
        if not missing:
            return [folder / name for name in names]
        if index.exists():
            raise FileNotFoundError(
                f"{folder} lacks {missing[0]}, one of {len(missing)} missing of the {len(names)} shards that "
                f"{index.name} lists: fetch it again"
            )
    raise FileNotFoundError(f"{folder} holds no weights ({' or '.join(WEIGHT_FILES)}, or their index): fetch it again")


def stored_tensors(source: Source) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its name; no data is read."""
    return {name: stored for file in weight_files(source) for name, stored in index(file).items()}


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


# ---------------------------------------------------------------------------------------------- what


def index(file: Path) -> dict[str, Stored]:
    """Names, shapes and types of the tensors in a .safetensors or .bin file; no data is read."""
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: Stored(file, name, tuple(part.get_shape()), _DTYPES[part.get_dtype()])
                for name, part in slices.items()
            }
    return {name: Stored(file, name, tuple(t.shape), t.dtype) for name, t in _open_pickle(file).items()}


def read(stored: Stored) -> torch.Tensor:
    """The tensor itself, memory-mapped; the mapping goes when the tensor does.

    The file is opened anew for every tensor: pages that were read count as resident memory until they are
    unmapped, so a file held open would cost its whole size beside the model's (measured in test_checkpoint).
    """
    if stored.file.suffix == ".safetensors":
        with _open_safetensors(stored.file) as tensors:
            return tensors.get_tensor(stored.name)
    return _open_pickle(stored.file)[stored.name]


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool}  # fmt: skip


def _open_safetensors(file: Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): fetch it again") from None


def _open_pickle(file: Path) -> dict[str, torch.Tensor]:
    try:
        # files of before PyTorch 1.6 are no zip archives and cannot be mapped
        tensors = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{file} holds more than tensors and could run code on loading: refused") from None
    except (RuntimeError, EOFError) as error:
        reason = (str(error) or "it ends early").splitlines()[0]
        raise ValueError(f"{file} is truncated or damaged ({reason}): fetch it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{file} is not a dictionary of named tensors: give a file of weights")
    return tensors


# ---------------------------------------------------------------------------------------------- load


def match(module: torch.nn.Module, tensors: dict[str, Stored], source: Path):
    """Check that `tensors` (parameter name -> where it lies) are a module's parameters, all of them and no more.

    ValueError with counts and the first five names of each kind otherwise; no data is read.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "wrongly shaped": [
            f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    if any(problems.values()):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in problems.items() if names)
        examples = "; ".join(
            f"{kind}: {', '.join(names[:5])}{', …' * (len(names) > 5)}" for kind, names in problems.items() if names
        )
        raise ValueError(
            f"the weights in {source} do not fit their config.json: {counts} tensors ({examples}); "
            "check that config and weights belong together, or fetch both again"
        )


def load(
    module: torch.nn.Module,
    tensors: dict[str, Stored],
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
):
    """Fill a module that was built on the meta device with the tensors that `match` has found to fit.

    progress(bytes done, bytes in all) is called after each tensor. MemoryError, before any data is read,
    where the memory does not suffice.
    """
    total = sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize
    _check_memory(total, device, dtype)
    module.to(dtype).to_empty(device=device)
    done = 0
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(read(tensors[name]))
            done += parameter.numel() * dtype.itemsize
            progress(done, total)


def _check_memory(needed: int, device: torch.device, dtype: torch.dtype):
    free = free_memory(device)
    if needed > free:
        smaller = "--dtype bfloat16, " if dtype.itemsize > 2 else ""
        raise MemoryError(
            f"the weights need {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and {free / 2**30:.1f} "
            f"GiB are free on {device}: try {smaller}a smaller model, or a machine with more memory"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; for the CPU within the container's limit, if any."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not os.path.exists("/proc/meminfo"):  # macOS tells its size only
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        cached = re.findall(r"^(?:in)?active_file (\d+)", Path("/sys/fs/cgroup/memory.stat").read_text(), re.M)
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        return free
    return min(free, limit - used + sum(map(int, cached)))  # cached files give way
