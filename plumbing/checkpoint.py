"""Hugging Face folders and hub ids <-> a config dict and a stream of named tensors.

A checkpoint is a folder (or a hub repository that is downloaded into one) with `config.json` and weights in
`model.safetensors`, in shards named by `model.safetensors.index.json`, or in the older `pytorch_model*.bin`.
Names, shapes and types are read first, so that a wrong checkpoint is refused before any data is; then the
tensors stream one at a time from memory-mapped files into a model that was built without memory.

A user's mistake raises ValueError, OSError or MemoryError with one line: what, where, what to do.
"""

import io
import itertools
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing.files import read_json, write_json

CONFIG_FILES = ("*.json", "tokenizer.model")  # small; the index files of the weights are among them
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in this order; FILE.index.json lists its shards


class StoredTensor(NamedTuple):
    """A tensor on disk, or some of its rows: nothing of it is in memory."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: slice | None = None


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


def list_tensors(source: Source) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its name; no data is read."""
    return {name: stored for file in weight_files(source) for name, stored in file_tensors(file).items()}


def has_weights(source: Source) -> bool:
    """Whether a folder or a repository is a whole checkpoint; of one in shards nothing but the index is downloaded."""
    indices = (source.folder / f"{name}.index.json" for name in WEIGHT_FILES)
    return any(index.exists() for index in indices) or find_file(source, WEIGHT_FILES) is not None


def find_file(source: Source, names: Iterable[str]) -> Path | None:
    """The first of some files that a checkpoint has, downloaded if need be."""
    source.fetch(names)
    return next((source.folder / name for name in names if (source.folder / name).exists()), None)


# ---------------------------------------------------------------------------------------------- what


def file_tensors(file: Path) -> dict[str, StoredTensor]:
    """Names, shapes and types of the tensors in a .safetensors or .bin file; no data is read."""
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: StoredTensor(file, name, tuple(part.get_shape()), _DTYPES[part.get_dtype()])
                for name, part in slices.items()
            }
    return {name: StoredTensor(file, name, tuple(t.shape), t.dtype) for name, t in _open_pickle(file).items()}


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """The tensor itself, memory-mapped; the mapping goes when the tensor does.

    The file is opened anew for every tensor: pages that were read count as resident memory until they are
    unmapped, so a file held open would cost its whole size beside the model's (measured in test_checkpoint).
    """
    if stored.file.suffix != ".safetensors":
        tensor = _open_pickle(stored.file)[stored.name]
        return tensor if stored.rows is None else tensor[stored.rows]
    with _open_safetensors(stored.file) as tensors:
        return tensors.get_tensor(stored.name) if stored.rows is None else tensors.get_slice(stored.name)[stored.rows]


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
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):  # as open_clip's trainer saves them
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{file} is not a dictionary of named tensors: give a file of weights")
    return tensors


# ---------------------------------------------------------------------------------------------- load


@dataclass(frozen=True)
class NameMap:
    """How a family names its parameters on disk."""

    keys: tuple = ()  # (regular expression, replacement), in this order: names on disk -> ours
    dropped: str = "(?!)"  # a regular expression: tensors on disk that take no part
    fused: dict = field(default_factory=dict)  # a module on disk that stacks the rows of several of ours -> their names


def rename_tensors(stored: dict[str, StoredTensor], names: NameMap, module: torch.nn.Module) -> dict[str, StoredTensor]:
    """Tensors by their names on disk -> by the names of a module's parameters.

    Of a fused tensor each part gets its rows, and only these are read: splitting costs no memory. One that has as many
    rows as each part (a LoRA's first matrix) is every part's.
    """
    parameters, renamed = dict(module.named_parameters(remove_duplicate=False)), {}
    for name, tensor in stored.items():
        if re.search(names.dropped, name):
            continue
        for pattern, replacement in names.keys:
            name = re.sub(pattern, replacement, name)
        fused = next((fused for fused in names.fused if f".{fused}." in name), None)
        parts = [name.replace(f".{fused}.", f".{part}.") for part in names.fused.get(fused, ())]
        rows = [len(parameters[part]) for part in parts if part in parameters]
        if not parts or len(rows) < len(parts):
            renamed[name] = tensor
        elif set(rows) == {tensor.shape[0]}:
            renamed |= dict.fromkeys(parts, tensor)
        else:
            for part, count, last in zip(parts, rows, itertools.accumulate(rows), strict=True):
                held = min(last, tensor.shape[0]) - (last - count)  # less than count where the shapes do not fit
                renamed[part] = tensor._replace(shape=(held, *tensor.shape[1:]), rows=slice(last - count, last))
    return renamed


def check_fit(parameters: dict[str, torch.Tensor], tensors: dict[str, StoredTensor], complaint: str):
    """Check that `tensors` (parameter name -> where it lies) fill the parameters, all of them and no more.

    Leading dimensions of 1 do not count: families differ in them. ValueError otherwise, with the complaint, counts and
    the first five names of each kind; no data is read.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "wrongly shaped": [
            f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and _without_leading_ones(tensors[name].shape) != _without_leading_ones(shape)
        ],
    }
    if any(problems.values()):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in problems.items() if names)
        examples = "; ".join(
            f"{kind}: {', '.join(names[:5])}{', …' * (len(names) > 5)}" for kind, names in problems.items() if names
        )
        raise ValueError(
            f"{complaint}: {counts} tensors ({examples}); check that they belong together, or fetch them again"
        )


def _without_leading_ones(shape):
    return tuple(shape[next((i for i, size in enumerate(shape) if size != 1), len(shape)) :])


def load_tensors(
    parameters: dict[str, torch.nn.Parameter],
    tensors: dict[str, StoredTensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
):
    """Fill parameters, in their type and on their device, with the tensors that `match` has found to fit.

    progress(bytes done, bytes in all) is called after each tensor.
    """
    total, done = sum(parameter.nbytes for parameter in parameters.values()), 0
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(read_tensor(tensors[name]).view_as(parameter))
            done += parameter.nbytes
            progress(done, total)


def check_memory(needed: int, device: torch.device, dtype: torch.dtype):
    """MemoryError where a device has not that many bytes free for weights, with both figures."""
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


# ---------------------------------------------------------------------------------------------- save


def write_tensors(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_size: int = 5 * 10**9):
    """Write `model.safetensors`, or shards of at most `shard_size` bytes (or one tensor) and their index.

    tensors: (published name, tensor), of which no more than a shard's are in memory here.
    """
    shards: list[dict[str, int]] = []  # of each shard: name -> bytes
    held: dict[str, torch.Tensor] = {}

    def close():
        write_safetensors(folder / f"{len(shards)}.safetensors", held)
        shards.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in tensors:
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > shard_size:
            close()
        held[name] = tensor
    close()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / WEIGHT_FILES[0])
        return
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for number, file in enumerate(files):
        (folder / f"{number}.safetensors").rename(folder / file)
    places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    size = sum(sum(names.values()) for names in shards)
    write_json(folder / f"{WEIGHT_FILES[0]}.index.json", {"metadata": {"total_size": size}, "weight_map": places})


def write_safetensors(file: Path, tensors: dict[str, torch.Tensor]):
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})  # `transformers` wants the format named
        os.umask(mask := os.umask(0))  # there is no other way to read it
        file.chmod(0o666 & ~mask)  # as other files: safetensors leaves its own to the owner alone
    except SafetensorError as error:
        raise OSError(f"{file.parent} could not be written ({error}): is the disk full?") from None


def write_bin(file: Path, tensors: dict[str, torch.Tensor]):
    data = io.BytesIO()
    torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, data)
    file.write_bytes(data.getvalue())  # so that a full disk is an OSError, which torch's own writing does not raise
