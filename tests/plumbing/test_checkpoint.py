"""The oracles: the tensors that were written, and a hub of a few files that counts what is asked of it."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from conftest import GOLDEN, ROOT, change
from safetensors.torch import save_file
from torch import nn

import sample
from plumbing import checkpoint
from plumbing.checkpoint import Source
from plumbing.files import read_json, write_json

SEED = torch.Generator().manual_seed(0)
FIRST = {
    "f16": torch.randn(3, 5, generator=SEED).half(),
    "bf16": torch.randn(3, 5, generator=SEED).bfloat16(),
    "single": torch.randn(2, 3, 4, generator=SEED),
    "f64": torch.randn(7, generator=SEED).double(),
}
SECOND = {
    "scalar": torch.tensor(0.1),
    "empty": torch.empty(0, 4),
    "counts": torch.arange(9),
    "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
}
TENSORS = FIRST | SECOND
WEIGHTS = {name: tensor for name, tensor in TENSORS.items() if name not in ("counts", "special")}
LAYOUTS = {  # the four published layouts -> their files
    "model.safetensors": {"model.safetensors": TENSORS},
    "shards of model.safetensors": {"model-1-of-2.safetensors": FIRST, "model-2-of-2.safetensors": SECOND},
    "pytorch_model.bin": {"pytorch_model.bin": TENSORS},
    "shards of pytorch_model.bin": {"pytorch_model-1-of-2.bin": FIRST, "pytorch_model-2-of-2.bin": SECOND},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def write_layout(folder, layout):
    files = LAYOUTS[layout]
    for file, tensors in files.items():
        write = save_file if file.endswith(".safetensors") else torch.save
        write(tensors, folder / file)
    if len(files) > 1:
        write_index(folder, layout.removeprefix("shards of "), files)


def write_index(folder, name, files):
    weight_map = {}
    for file, tensors in files.items():
        weight_map |= dict.fromkeys(tensors, file)
    write_json(folder / f"{name}.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map})


def same_bits(a, b):
    as_bytes = lambda tensor: tensor.contiguous().flatten().view(torch.uint8)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(as_bytes(a), as_bytes(b))


def fill(module, stored):
    """Copy tensors into a module, by its parameters' names."""
    parameters = dict(module.named_parameters())
    checkpoint.check_fit(parameters, stored, "")
    checkpoint.load_tensors(parameters, stored)


# --------------------------------------------------------------------------------------------- layouts


@every_layout
def test_every_layout_gives_names_shapes_and_values(tmp_path, layout):
    write_layout(tmp_path, layout)
    stored = checkpoint.list_tensors(checkpoint.locate(tmp_path))
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert stored[name].shape == tensor.shape
        assert same_bits(checkpoint.read_tensor(stored[name]), tensor), name


@every_layout
def test_a_module_is_filled_in_its_own_type_with_progress_in_bytes(tmp_path, layout):
    write_layout(tmp_path, layout)
    stored = checkpoint.list_tensors(Source(tmp_path))
    stored = {name: stored[name] for name in WEIGHTS}
    parameters = {name: torch.empty(tensor.shape) for name, tensor in WEIGHTS.items()}  # float32
    checkpoint.check_fit(parameters, stored, "")
    progress = []
    checkpoint.load_tensors(parameters, stored, lambda *state: progress.append(state))
    for name, tensor in WEIGHTS.items():
        assert same_bits(parameters[name], tensor.float()), name
    assert progress == sorted(progress) and len(progress) == len(WEIGHTS)
    assert progress[-1] == (4 * 62, 4 * 62)  # 15 + 15 + 24 + 7 + 1 + 0 numbers


@every_layout
def test_other_weights_beside_the_checkpoint_are_not_read(tmp_path, layout):
    write_layout(tmp_path, layout)
    for name in ("aaa.safetensors", "model-00001-of-00009.safetensors", "dino_head.safetensors"):
        save_file({"single": torch.zeros(1), "other": torch.zeros(1)}, tmp_path / name)
    torch.save({"other": torch.zeros(1)}, tmp_path / "training_args.bin")
    assert checkpoint.list_tensors(Source(tmp_path)).keys() == TENSORS.keys()


def test_safetensors_win_over_bin_and_an_index_over_a_single_file(tmp_path):
    write_layout(tmp_path, "shards of model.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert checkpoint.list_tensors(Source(tmp_path)).keys() == TENSORS.keys()


# -------------------------------------------------------------------------------------------- mistakes


def refused(kinds, culprit, function, *arguments):
    """The call fails with one line that names the culprit."""
    with pytest.raises(kinds) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value) and culprit in str(caught.value), caught.value


class Malice:
    def __reduce__(self):
        return os.system, ("touch malice",)


def bin_with(content):
    return lambda folder: torch.save(content, folder / "pytorch_model.bin")


def index_to(file):
    return lambda folder: write_index(folder, "model.safetensors", {file: ["weight"]})


def truncated(layout, share):
    def write(folder):
        write_layout(folder, layout)
        file = folder / layout
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return write


BAD_FOLDERS = [  # what is written into a folder -> the file that the message names
    (lambda folder: None, "model.safetensors"),
    (index_to("model-2-of-2.safetensors"), "model-2-of-2.safetensors"),
    (index_to("../outside.safetensors"), "../outside.safetensors"),
    (index_to("/etc/outside.safetensors"), "/etc/outside.safetensors"),
    *((truncated("model.safetensors", share), "model.safetensors") for share in (0, 0.01, 0.99)),
    *((truncated("pytorch_model.bin", share), "pytorch_model.bin") for share in (0, 0.01, 0.99)),
    *((bin_with(content), "pytorch_model.bin") for content in ([torch.ones(1)], {"epoch": 3}, torch.ones(2))),
    (bin_with({"weight": torch.ones(1), "more": Malice()}), "pytorch_model.bin"),
]


@pytest.mark.parametrize(("write", "culprit"), BAD_FOLDERS)
def test_bad_weights_are_refused_by_name_and_no_code_runs(tmp_path, monkeypatch, write, culprit):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    refused((ValueError, OSError), culprit, checkpoint.list_tensors, checkpoint.locate(tmp_path))
    assert not (tmp_path / "malice").exists()


@pytest.mark.parametrize("place", ["no/where/at-all", "nowhere", __file__])
def test_a_place_without_a_checkpoint_is_refused(place):
    refused(OSError, place, checkpoint.locate, place)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", None])
def test_config_json_must_be_a_json_object(tmp_path, content):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    refused((ValueError, OSError), str(file), read_json, file)


LEFT_BY_A_DOWNLOAD = {  # first bytes of a file -> what the message calls it
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976576152\n": "Git LFS pointer",
    b"\xef\xbb\xbf\n<!DOCTYPE html><html><head>": "web page",
    b'{"error": "Invalid username or password."}': "text",
    b"Entry not found": "text",
}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("start", LEFT_BY_A_DOWNLOAD)
def test_what_a_download_left_instead_of_weights_is_named(tmp_path, file, start):
    (tmp_path / file).write_bytes(start)
    for words in (LEFT_BY_A_DOWNLOAD[start], str(tmp_path / file), "fetch it again"):
        refused(ValueError, words, checkpoint.list_tensors, Source(tmp_path))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_numbers_of_8_bits_are_refused_by_name(tmp_path, file, kind):
    write = save_file if file.endswith(".safetensors") else torch.save
    write({"a.weight": torch.ones(2, 2).to(kind)}, tmp_path / file)
    refused(ValueError, "a.weight holds", checkpoint.list_tensors, Source(tmp_path))


@pytest.mark.parametrize("weight", [torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 3).to_sparse(),
                                    torch.ones(2, 3, device="meta"), torch.ones(2, 3).cfloat()])  # fmt: skip
def test_numbers_that_are_no_weights_do_not_fit(tmp_path, weight):
    torch.save({"weight": weight, "bias": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    refused(ValueError, "1 not floating-point", fill, nn.Linear(3, 2), checkpoint.list_tensors(Source(tmp_path)))


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (float("nan"), torch.float32, "a.weight holds NaN or infinity"),
        (float("-inf"), torch.bfloat16, "a.weight holds NaN or infinity"),
        (1e5, torch.float16, "a.weight exceeds the range of torch.float16"),
    ],
)
def test_one_number_that_is_not_finite_is_refused(tmp_path, value, dtype, words):
    weight = torch.zeros(300, 300)
    weight[299, 7] = value
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    module = nn.ModuleDict({"a": nn.Linear(300, 300, bias=False, dtype=dtype)})
    refused(ValueError, words, fill, module, checkpoint.list_tensors(Source(tmp_path)))


def test_a_compressed_archive_is_refused(tmp_path):
    """torch maps compressed numbers as if they were plain."""
    torch.save({"weight": torch.ones(64, 64)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for entry in plain.namelist():
            archive.writestr(entry, plain.read(entry))
    refused(ValueError, "compressed archive", checkpoint.list_tensors, Source(tmp_path))


@pytest.mark.parametrize(
    "index",
    [
        {"metadata": {"total_size": 0}}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": "a"},
        {"weight_map": {"a": 1}}, {"weight_map": {"a": None}}, {"weight_map": {"a": ""}}, {"weight_map": {"a": ".."}},
        {"weight_map": {"a": "."}}, {"weight_map": {"a": "config.json"}}, {"weight_map": {"a": "b\0.bin"}},
        {"weight_map": {"a": ["model.safetensors"]}}, {"weight_map": {}},
    ],
)  # fmt: skip
def test_an_index_that_names_no_files_is_refused(tmp_path, index):
    write_json(tmp_path / "model.safetensors.index.json", index)
    refused(ValueError, "model.safetensors.index.json", checkpoint.list_tensors, Source(tmp_path))


def test_what_does_not_fit_is_counted_and_named_before_data_is_read(tmp_path):
    extra = {f"extra.{n}": torch.ones(1) for n in range(7)}
    save_file(extra | {"weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    stored = checkpoint.list_tensors(Source(tmp_path))
    parameters = dict(nn.Linear(3, 2, device="meta").named_parameters())
    for words in ("1 missing, 7 unexpected, 1 wrongly shaped", "bias", "extra.4, …", "weight [3, 2] instead of [2, 3]"):
        refused(ValueError, words, checkpoint.check_fit, parameters, stored, "it does not fit")


def test_a_model_that_exceeds_the_memory_is_refused_with_its_size():
    refused(MemoryError, "65536.0 GiB", checkpoint.check_memory, 2**46, torch.device("cpu"), "float32")


# ----------------------------------------------------------------------------------------------- memory

LOAD = """
import re, sys, torch
from pathlib import Path
from torch import nn
from plumbing import checkpoint
status = lambda field: int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
before = status("VmRSS")
with torch.device("meta"):
    part = lambda: nn.ModuleDict({name: nn.Linear(1024, 1024, bias=False) for name in "abcd"})
    module = nn.ModuleDict({f"layer{n}": part() for n in range(16)})
stored = checkpoint.list_tensors(checkpoint.Source(Path(sys.argv[1])))
stored = checkpoint.rename_tensors(stored, checkpoint.NameMap(fused={"abcd": tuple("abcd")}), module)
parameters = dict(module.to_empty(device="cpu").named_parameters())
checkpoint.check_fit(parameters, stored, "")
checkpoint.load_tensors(parameters, stored)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of resident memory is Linux's to tell")
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_loading_takes_the_memory_of_one_tensor_beside_the_model(tmp_path, shards, fused):
    parts = {"abcd": 4096} if fused else dict.fromkeys("abcd", 1024)  # 16 MiB a layer
    names = {f"layer{n}.{part}.weight": rows for n in range(16) for part, rows in parts.items()}
    tensors = {name: torch.ones(rows, 1024) for name, rows in names.items()}
    files = {f"model-{n}.safetensors": dict(list(tensors.items())[n::shards]) for n in range(shards)}
    for file, shard in files.items():
        save_file(shard, tmp_path / file)
    write_index(tmp_path, "model.safetensors", files)
    run = subprocess.run([sys.executable, "-c", LOAD, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 256 <= int(run.stdout) < 256 + 64  # MiB


# ------------------------------------------------------------------------------------- names and saving

NAMES = checkpoint.NameMap(keys=((r"^model\.", ""),), dropped=r"^text\.", fused={"qkv": ("q", "k")})


@pytest.mark.parametrize("file", ["trainer.pt", "weights.safetensors"])
def test_names_are_translated_and_fused_rows_are_split(tmp_path, file):
    weights = {
        "model.layer.qkv.weight": torch.randn(7, 3), "model.layer.qkv.bias": torch.randn(7),
        "model.layer.qkv.lora_A.weight": torch.randn(5, 3), "model.scale": torch.randn(1, 1, 4),
        "text.x": torch.ones(1),
    }  # fmt: skip
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "trainer.pt")
    save_file(weights, tmp_path / "weights.safetensors")
    # q has four rows and k three; both share one matrix A
    module = nn.ModuleDict({"layer": nn.ModuleDict({"q": nn.Linear(3, 4), "k": nn.Linear(3, 3)})})
    for part in module.layer.values():
        part.lora_A = nn.Linear(3, 5, bias=False)
    module.scale = nn.Parameter(torch.ones(4))
    fill(module, checkpoint.rename_tensors(checkpoint.file_tensors(tmp_path / file), NAMES, module))
    for name, rows in (("q", slice(0, 4)), ("k", slice(4, 7))):
        part = module.layer[name]
        assert torch.equal(part.weight, weights["model.layer.qkv.weight"][rows])
        assert torch.equal(part.bias, weights["model.layer.qkv.bias"][rows])
        assert torch.equal(part.lora_A.weight, weights["model.layer.qkv.lora_A.weight"])
    assert torch.equal(module.scale, weights["model.scale"].flatten())


def test_a_fused_tensor_of_too_few_rows_does_not_fit(tmp_path):
    save_file({"l.qkv.weight": torch.randn(6, 3)}, tmp_path / "model.safetensors")
    module = nn.ModuleDict({"l": nn.ModuleDict({"q": nn.Linear(3, 4, bias=False), "k": nn.Linear(3, 3, bias=False)})})
    stored = checkpoint.rename_tensors(checkpoint.list_tensors(Source(tmp_path)), NAMES, module)
    refused(ValueError, "l.k.weight [2, 3] instead of [3, 3]", fill, module, stored)


@pytest.mark.parametrize(("size", "files"), [(10**9, 1), (130, 4), (1, 8)])
def test_what_is_written_reads_back_bit_for_bit_whatever_the_shards(tmp_path, size, files):
    checkpoint.write_tensors(tmp_path, iter(TENSORS.items()), size)
    stored = checkpoint.list_tensors(Source(tmp_path))
    assert len({tensor.file for tensor in stored.values()}) == files == len(list(tmp_path.glob("*.safetensors")))
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert same_bits(checkpoint.read_tensor(stored[name]), tensor), name


def test_whoever_can_read_the_config_can_read_the_weights(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "config.json", {})
    checkpoint.write_safetensors(folder / "model.safetensors", {"a": torch.zeros(2)})
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


# -------------------------------------------------------------------------------------------------- hub


class Hub(http.server.BaseHTTPRequestHandler):
    """What a download asks of the hub: a repository's commit, the files in it, and each file."""

    def do_HEAD(self):
        path = urlsplit(self.path).path
        request = re.fullmatch(r"(?:/api/models)?/(\w+/\w+)/(revision|tree|resolve)/\w+/?(.*)", path)
        folder = self.server.repositories.get(request[1]) if request else None
        headers, body = {}, b"{}"
        if not folder:
            headers = {"X-Error-Code": "RepoNotFound"}
        elif request[2] == "revision":
            body = json.dumps({"id": request[1], "sha": "0" * 40}).encode()
        elif request[2] == "tree":
            entry = lambda f: {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
            body = json.dumps([entry(file) for file in folder.iterdir()]).encode()
        else:
            self.server.asked.append(request[3])
            body = (folder / request[3]).read_bytes()
            headers = {"ETag": f'"{request[3]}"', "X-Repo-Commit": "0" * 40}
        self.send_response(200 if folder else 404)
        for header in (headers | {"Content-Type": "application/json", "Content-Length": str(len(body))}).items():
            self.send_header(*header)
        self.end_headers()
        return body

    def do_GET(self):
        self.wfile.write(self.do_HEAD())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """A small hub that has libra-7b and its encoder, and what is beside them in a repository."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.asked = {}, []
    for name, source in (("model", "libra-7b/model"), ("encoder", "libra-7b/encoder-dinov2")):
        folder = server.repositories[f"owner/{name}"] = tmp_path / name
        shutil.copytree(GOLDEN / source, folder)
        (folder / "README.md").write_text("not needed")
        (folder / "dino_head.safetensors").write_bytes(bytes(99))
    change(tmp_path / "model" / "config.json", mm_vision_tower="owner/encoder")
    server.cache = tmp_path / "cache"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def sample_from(hub, model, **variables):
    """Run sample.py with a model of the hub."""
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(hub.cache)} | variables
    image = str(GOLDEN / "images" / "0.png")
    command = [sys.executable, "sample.py", "--model", model, "--images", image, "--max-new-tokens=2", "--json"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9"}


def test_a_hub_id_is_downloaded_once_with_only_the_files_needed(hub):
    first = sample_from(hub, "owner/model")
    assert first.returncode == 0, first.stderr
    assert "README.md" not in hub.asked and "dino_head.safetensors" not in hub.asked
    hub.asked.clear()
    offline = sample_from(hub, "owner/model", HF_HUB_OFFLINE="1", **NO_NETWORK)
    assert json.loads(offline.stdout)["outputs"] == json.loads(first.stdout)["outputs"]
    assert not hub.asked


@pytest.mark.parametrize(
    ("model", "variables"),
    [
        ("owner/nothing", {}), ("owner/model", NO_NETWORK), ("owner/model", {"HF_HUB_OFFLINE": "1"}),
        (sample.DEFAULT_MODEL, {"HF_HUB_OFFLINE": "1"}), ("owner/model", {"HF_ENDPOINT": "hub.example"}),
    ],
)  # fmt: skip
def test_a_hub_that_lacks_the_repository_or_cannot_be_reached_is_one_line(hub, model, variables):
    failed = sample_from(hub, model, **variables)
    assert failed.returncode == 2 and not failed.stdout
    assert model in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr
    assert ("assets/phantom" in failed.stderr) == (model == sample.DEFAULT_MODEL)


def test_an_unsupported_config_is_refused_before_weights_are_downloaded(hub):
    change(hub.repositories["owner/model"] / "config.json", hidden_act="relu")
    failed = sample_from(hub, "owner/model")
    assert failed.returncode == 2 and "hidden_act" in failed.stderr
    assert hub.asked and not any(name.endswith((".safetensors", ".bin")) for name in hub.asked)
