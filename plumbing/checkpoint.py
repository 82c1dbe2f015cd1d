"""Hugging Face folders and hub repositories <-> named tensors.

Loading takes two passes. The first reads names and shapes alone, so that a wrong checkpoint is refused early. The
second copies one tensor at a time, from memory-mapped files into a model that was built without memory.

Errors are ValueError, OSError or MemoryError with one line: what is wrong, where, and what to do.
"""

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType
from typing import Annotated, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing.fields import Range, check_value, shorten
from plumbing.files import check_readable, finish_folder, read_json, write_json
from plumbing.quantised import quantise_into

CONFIG_FILES = ("*.json", "tokenizer.model")  # small files, among them the indices of the weights
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that exists counts
WeightMap = Annotated[dict[str, str], Range(1, 10**7)]  # name of a tensor -> file
INDEX_FILES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)  # each lists the shards of one of them
# names that the layouts give to files: a new checkpoint in the same folder replaces or removes them
LAYOUT_FILE = re.compile(
    r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|mm_\w*projector\w*\.(safetensors|bin)"
    r"|adapter_(config\.json|model\.safetensors|model\.bin)|non_lora_trainables\.bin"
    r"|((generation_|tokenizer_)?config|tokenizer|special_tokens_map|added_tokens)\.json|tokenizer\.model"
)
ENCODER_FILE = re.compile(rf"{LAYOUT_FILE.pattern}|(pre)?processor_config\.json")  # the same of an image encoder


# ------------------------------------------------------------------------------------------ where a checkpoint is


class Source(NamedTuple):
    """A checkpoint's folder, and the hub repository that was downloaded into it, if any."""

    folder: Path
    repository: str | None = None

    def __str__(self):
        return self.repository or str(self.folder)

    def fetch(self, patterns: Iterable[str]) -> Path:
        """Downloads files of a hub repository into the hub's cache; its variables, such as HF_HUB_OFFLINE, count."""
        if not self.repository:
            return self.folder
        try:
            # imported here: a wrong environment variable of the hub is an error of the import
            import huggingface_hub

            return Path(huggingface_hub.snapshot_download(self.repository, allow_patterns=list(patterns)))
        except Exception as error:  # the hub's client, httpx and ssl raise errors of their own
            if type(error).__name__ == "RepositoryNotFoundError":
                raise FileNotFoundError(f"no folder {self}, and the hub shows no such repository: check it") from None
            reason = str(error).strip().split("\n")[0]
            advice = "connect to the network, or download it elsewhere and give its folder"
            raise OSError(f"{self} is not cached and could not be downloaded ({reason}): {advice}") from None


def locate(place, relative_to: Path | None = None) -> Source:
    """Finds a checkpoint by its path, first relative to a folder, or by its hub id. Its config files are downloaded."""
    # unlike Path's, this leaves the ~ of an unknown user in place
    candidates = [Path(os.path.expanduser(place))]
    if relative_to:
        candidates.insert(0, Path(relative_to, place))
    for folder in candidates:
        # a killed process may have been replacing its files
        finish_folder(folder, LAYOUT_FILE)
        if folder.is_dir():
            return Source(folder)
        if folder.exists():
            raise NotADirectoryError(f"{folder} is a file: give the model folder that holds its config.json")
    # owner/name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(place)):
        raise FileNotFoundError(f"no model folder {place} (and it is not a hub id like owner/name): check the path")
    folder = Source(Path(), str(place)).fetch(CONFIG_FILES)
    return Source(folder, str(place))


def find_file(source: Source, names: Iterable[str]) -> Path | None:
    """Returns the first of these files that a checkpoint has. All of a hub repository's are downloaded."""
    source.fetch(names)
    files = [source.folder / name for name in names if (source.folder / name).is_file()]
    return files[0] if files else None


def has_weights(source: Source) -> bool:
    """Tells whether this is a whole checkpoint. Only the index of a sharded one is downloaded."""
    return bool(find_file(source, INDEX_FILES) or find_file(source, WEIGHT_FILES))


def weight_files(source: Source) -> list[Path]:
    """Returns the files of a checkpoint's weights, downloaded if need be."""
    for name, index_name in zip(WEIGHT_FILES, INDEX_FILES, strict=True):
        # the index names them, never a pattern: RAD-DINO's repository has three safetensors files, and one is the model
        index, names = source.folder / index_name, [name]
        if index.exists():
            weight_map = check_value(read_json(index).get("weight_map"), WeightMap, "weight_map", index)
            names = sorted(set(weight_map.values()))
        for name in names:
            # a damaged or malicious index must not reach other folders
            if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name):
                raise ValueError(f"{index} names {shorten(name)}, which is no file of weights beside it: refused")

        # are they complete? Without an index, the older kind of file is next
        source.fetch(names)
        missing = [name for name in names if not (source.folder / name).exists()]
        if not missing:
            return [source.folder / name for name in names]
        if index.exists():
            raise FileNotFoundError(f"{index} lists {missing[0]}, one of {len(missing)} missing shards: fetch it again")
    raise FileNotFoundError(f"{source.folder} holds no weights ({' or '.join(WEIGHT_FILES)}): fetch it again")


# ------------------------------------------------------------------------------------------ tensors on disk


class StoredTensor(NamedTuple):
    """A tensor on disk, or some of its rows. Its data is not in memory."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as its file names the type
    rows: slice | EllipsisType = ...  # all of them


# the types of weights, as safetensors and as torch name them
FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
BYTES = {torch.int8: ("I8", "int8"), torch.uint8: ("U8", "uint8")}  # rounded weights of ours
SMALLER = {  # what to try where memory is short
    "float32": "--dtype bfloat16, int8 or int4, or ",
    "bfloat16": "--dtype int8 or int4, or ",
    "float16": "--dtype int8 or int4, or ",
    "int8": "--dtype int4 or ",
}


def list_tensors(source: Source) -> dict[str, StoredTensor]:
    """Lists all tensors of a checkpoint by their names. No data is read."""
    tensors = {}
    for file in weight_files(source):
        tensors |= file_tensors(file)
    return tensors


def file_tensors(file: Path) -> dict[str, StoredTensor]:
    """Lists all tensors of one .safetensors or .bin file by their names. No data is read.

    ValueError if it is no such file, or if its numbers need more than themselves to become weights (8 bits and fewer).
    """
    check_readable(file)
    tensors = {}
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                entry = opened.get_slice(name)
                tensors[name] = StoredTensor(file, name, tuple(entry.get_shape()), entry.get_dtype())
    else:
        _check_archive(file)
        for name, tensor in _open_pickle(file).items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            # what has no numbers of its own is no weight either
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                dtype = f"{tensor.layout} on {tensor.device}"
            tensors[name] = StoredTensor(file, name, tuple(tensor.shape), dtype)

    for tensor in tensors.values():
        # F8_E4M3, float8_e4m3fn, F4, …
        if re.match(r"f(loat)?[468](_|$)", tensor.dtype, re.IGNORECASE):
            problem = f"{tensor.name} holds {tensor.dtype} numbers, which are no weights without their scales"
            raise ValueError(f"{file}: {problem}: use the model's 16-bit version")
    return tensors


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Returns the tensor itself, memory-mapped, in its type on disk."""
    # Open the file anew: pages that were read count as resident memory until they are unmapped, so a file that stays
    # open would cost its whole size (measured in test_checkpoint).
    if stored.file.suffix != ".safetensors":
        return _open_pickle(stored.file)[stored.name][stored.rows]
    with _open_safetensors(stored.file) as opened:
        return opened.get_slice(stored.name)[stored.rows]


def _open_safetensors(file: Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise _damage(file, error) from None


def _check_archive(file: Path):
    # torch maps the numbers of a zip archive as they are in the file: they must not be compressed
    try:
        if zipfile.is_zipfile(file):
            compressed = [entry for entry in zipfile.ZipFile(file).infolist() if entry.compress_type]
            if compressed:
                raise ValueError(f"{file} is a compressed archive, not one of torch.save: unpack it, or fetch it again")
    except zipfile.BadZipFile as error:
        raise _damage(file, error) from None


def _open_pickle(file: Path) -> dict[str, torch.Tensor]:
    try:
        # files from before PyTorch 1.6 are no zip archives and cannot be mapped
        tensors = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damage shows in many ways
        # "Unsupported global" or "class": the file names a function
        if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
            raise ValueError(f"{file} holds more than tensors and could run code on loading: refused") from None
        raise _damage(file, (str(error) or "it ends early").splitlines()[0]) from None

    # open_clip's trainer puts the tensors one level down
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    is_weights = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not is_weights or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} is not a dictionary of named tensors: give a file of weights")
    return tensors


def _damage(file: Path, reason) -> ValueError:
    """The error for a file of weights that cannot be opened. It says what a failed download left in its place."""
    with open(file, "rb") as opened:
        start = opened.read(200).decode("utf-8", errors="replace").strip("\ufeff\ufffd \r\n\t")
    if start.startswith("version https://git-lfs"):
        return ValueError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`, or fetch it again")
    is_text = start and all(character.isprintable() or character.isspace() for character in start)
    if is_text:
        kind = "a web page" if start.startswith("<") else "text"
        return ValueError(f"{file} is {kind}, not weights ({shorten(start)}): fetch it again")
    return ValueError(f"{file} is truncated or damaged ({reason}): fetch it again")


# ------------------------------------------------------------------------------------------ names on disk -> ours


@dataclass(frozen=True)
class NameMap:
    """How a family names its parameters on disk."""

    keys: tuple = ()  # (regular expression, replacement): names on disk -> ours, applied in this order
    dropped: str = "(?!)"  # a regular expression: tensors on disk that the model does not use
    fused: dict = field(default_factory=dict)  # a module on disk that stacks the rows of several of ours -> their names


def rename_tensors(
    stored: dict[str, StoredTensor], names: NameMap, module: torch.nn.Module
) -> dict[str, StoredTensor]:
    """Tensors by their names on disk -> by the names of a module's parameters.

    A fused tensor becomes one entry for each part, with the part's rows. Only these rows are read later:

        qkv_proj.weight [12, C]  ->  q_proj.weight rows 0-7, k_proj.weight rows 8-9, v_proj.weight rows 10-11
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    renamed = {}
    for name, tensor in stored.items():
        # 1) our name, and those of the parts if it is fused
        if re.search(names.dropped, name):
            continue
        for pattern, replacement in names.keys:
            name = re.sub(pattern, replacement, name)
        parts = []
        for fused, projections in names.fused.items():
            if f".{fused}." in name:
                parts = [name.replace(f".{fused}.", f".{projection}.") for projection in projections]

        # 2) not fused; or as many rows as in each part: LoRA's matrix A, which all parts share
        counts = [len(parameters.get(part, ())) for part in parts]
        if not parts or set(counts) == set(tensor.shape[:1]) or not tensor.shape:
            renamed |= dict.fromkeys(parts or [name], tensor)
            continue

        # 3) the parts one below the other; check_fit reports those that have too few rows, or no parameter
        start = 0
        for part, count in zip(parts, counts, strict=True):
            rows = slice(start, start + count)
            height = len(range(tensor.shape[0])[rows])
            renamed[part] = tensor._replace(shape=(height, *tensor.shape[1:]), rows=rows)
            start += count
    return renamed


def check_fit(parameters: dict[str, torch.Tensor], tensors: dict[str, StoredTensor], complaint: str):
    """Checks that `tensors` fill exactly these parameters, by names, shapes and kind of number. No data is read.

    ValueError: the complaint, counts, and the first five names of each kind of problem.
    """
    # dimensions of 1 do not count, since families differ in them
    sizes = lambda shape: [size for size in shape if size != 1]
    wrong_shapes, wrong_types, wrong_bytes = [], [], []
    for name, parameter in parameters.items():
        if name not in tensors:
            continue
        stored, shape = tensors[name], list(parameter.shape)
        if sizes(stored.shape) != sizes(shape):
            wrong_shapes.append(f"{name} {list(stored.shape)} instead of {shape}")
        # whole numbers are packed weights, or something else, except in a model of ours that has them
        if parameter.dtype in BYTES:
            if stored.dtype not in BYTES[parameter.dtype]:
                wrong_bytes.append(f"{name} {stored.dtype}")
        elif stored.dtype not in FLOATS:
            wrong_types.append(f"{name} {stored.dtype}")
    problems = {
        "missing": [name for name in parameters if name not in tensors],
        "unexpected": [name for name in tensors if name not in parameters],
        "wrongly shaped": wrong_shapes,
        "not floating-point": wrong_types,
        "not int8 or uint8": wrong_bytes,
    }

    counts, examples = [], []
    for kind, names in problems.items():
        if names:
            more = ", …" if len(names) > 5 else ""
            counts.append(f"{len(names)} {kind}")
            examples.append(f"{kind}: {', '.join(names[:5])}{more}")
    if counts:
        problem = f"{', '.join(counts)} tensors ({'; '.join(examples)})"
        raise ValueError(f"{complaint}: {problem}; check that they belong together, or fetch them again")


@torch.no_grad()
def load_tensors(
    parameters: dict[str, torch.nn.Parameter],
    tensors: dict[str, StoredTensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
):
    """Copies tensors into the parameters of the same names, whatever their type and device. Call `check_fit` first.

    A parameter X of type int8 or uint8 takes the numbers of a floating-point tensor rounded, X_scale their scales.
    progress(bytes done, bytes in all) is called after each tensor. ValueError names a tensor with NaN or infinity.
    """
    total, done = sum(parameter.nbytes for parameter in parameters.values()), 0
    for name, stored in tensors.items():
        parameter = parameters[name]
        tensor = read_tensor(stored)
        if parameter.dtype in BYTES and tensor.is_floating_point():
            numbers = parameters[f"{name}_scale"]  # they show NaN and infinity
            quantise_into(tensor.flatten(1), parameter, numbers)
            done += numbers.nbytes
        else:
            numbers = parameter
            parameter.copy_(tensor.view_as(parameter))
        if not _is_finite(numbers):
            where = f"{stored.file}: {stored.name}"
            if _is_finite(tensor):
                raise ValueError(f"{where} exceeds the range of {numbers.dtype}: use --dtype bfloat16 or float32")
            raise ValueError(f"{where} holds NaN or infinity: fetch it again, or train it again more slowly")
        done += parameter.nbytes
        progress(done, total)


def _is_finite(tensor: torch.Tensor) -> bool:
    # The least and the greatest number show NaN and infinity. On one core that takes 0.05 s per GB of bfloat16 and
    # 0.1 s of float32, as long as copying a GB out of the page cache; isfinite() takes 1 to 2 s.
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def check_memory(needed: int, device: torch.device, dtype: str):
    """MemoryError if a device has fewer than `needed` bytes free, which weights of this type take."""
    free = free_memory(device)
    if needed > free:
        smaller = SMALLER.get(dtype, "")
        figures = f"{needed / 2**30:.1f} GiB in {dtype}, and {free / 2**30:.1f} GiB are free on {device}"
        raise MemoryError(f"the weights need {figures}: try {smaller}a smaller model")


def free_memory(device: torch.device) -> int:
    """Returns the bytes that can still be allocated on a device; on the CPU within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]

    # the machine: macOS reports only its size
    if not os.path.exists("/proc/meminfo"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])

    # the container: cached files make room when memory is needed
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = re.findall(r"^(?:in)?active_file (\d+)", (group / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):
        # no container, or no limit ("max")
        return free
    return min(free, limit - used + sum(map(int, cached)))


# ------------------------------------------------------------------------------------------ saving


def write_tensors(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_size: int = 5 * 10**9):
    """Writes `model.safetensors`, or shards of at most `shard_size` bytes (or one tensor) and their index.

    tensors: pairs of a published name and a tensor. No more than one shard's tensors are kept in memory.
    """
    # 1) write shards under numbers, since their count is not known yet
    shards: list[list[str]] = []  # the names in each
    shard: dict[str, torch.Tensor] = {}
    total = filled = 0

    def close_shard():
        write_safetensors(folder / f"{len(shards)}.safetensors", shard)
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > shard_size:
            close_shard()
            filled = 0
        shard[name] = tensor
        filled += tensor.nbytes
        total += tensor.nbytes
    close_shard()

    # 2) a single one needs no index; several get their published names and one
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / WEIGHT_FILES[0])
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX_FILES[0], {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_safetensors(file: Path, tensors: dict[str, torch.Tensor]):
    """Writes one .safetensors file. OSError if that fails, as on a full disk."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        # `transformers` requires the format in the metadata
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file.parent} could not be written ({error}): is the disk full?") from None
    # safetensors lets only the owner read its files: let those read them who may read the folder
    file.chmod(file.parent.stat().st_mode & 0o666)


def write_bin(file: Path, tensors: dict[str, torch.Tensor]):
    """Writes one pickled .bin file, as older programs read it."""
    data = io.BytesIO()
    torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, data)
    # not straight to the file: torch's own writer raises no OSError when the disk is full
    file.write_bytes(data.getvalue())
