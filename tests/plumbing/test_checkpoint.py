import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from conftest import GOLDEN, ROOT
from safetensors.torch import save_file
from torch import nn

import sample
from plumbing import checkpoint
from plumbing.checkpoint import Source
from plumbing.files import atomic_folder, read_json, write_json

CPU = torch.device("cpu")
SEED = torch.Generator().manual_seed(0)
TENSORS = {
    "f16": torch.randn(3, 5, generator=SEED).half(),
    "bf16": torch.randn(3, 5, generator=SEED).bfloat16(),
    "single": torch.randn(2, 3, 4, generator=SEED),
    "f64": torch.randn(7, generator=SEED).double(),
    "scalar": torch.tensor(0.1),
    "empty": torch.empty(0, 4),
    "counts": torch.arange(9),
    "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
}
HALVES = [dict(list(TENSORS.items())[:4]), dict(list(TENSORS.items())[4:])]


def write_index(folder, name, shards):
    """The index file of shards {file name: tensors}."""
    places = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))


def one_safetensors(folder):
    save_file(TENSORS, folder / "model.safetensors")


def shards_of_safetensors(folder):
    shards = {f"model-0000{number}-of-00002.safetensors": half for number, half in enumerate(HALVES, 1)}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    write_index(folder, "model.safetensors", shards)


def one_bin(folder):
    torch.save(OrderedDict(TENSORS), folder / "pytorch_model.bin")


def shards_of_bin(folder):
    shards = {f"pytorch_model-0000{number}-of-00002.bin": half for number, half in enumerate(HALVES, 1)}
    for file, tensors in shards.items():
        torch.save(tensors, folder / file)
    write_index(folder, "pytorch_model.bin", shards)


LAYOUTS = [one_safetensors, shards_of_safetensors, one_bin, shards_of_bin]


def same_bits(a, b):
    view = lambda tensor: tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor[None].view(torch.uint8)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(view(a), view(b))


@contextmanager
def refusal(kinds, *words):
    """The block raises one line that holds the words."""
    with pytest.raises(kinds) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_gives_names_shapes_types_and_values(tmp_path, write):
    write(tmp_path)
    stored = checkpoint.list_tensors(checkpoint.locate(tmp_path))
    assert {name: (s.shape, s.dtype) for name, s in stored.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
    }
    for name, tensor in TENSORS.items():
        assert same_bits(checkpoint.read_tensor(stored[name]), tensor), name


@pytest.mark.parametrize("write", LAYOUTS)
def test_a_module_is_filled_in_the_type_that_is_asked_for(tmp_path, write):
    write(tmp_path)
    names = ["f16", "bf16", "single", "f64", "scalar", "empty", "special"]
    module = nn.ParameterDict({name: nn.Parameter(torch.empty_like(TENSORS[name], device="meta")) for name in names})
    stored = {name: s for name, s in checkpoint.list_tensors(Source(tmp_path)).items() if name in names}
    parameters = dict(module.float().to_empty(device="cpu").named_parameters())
    checkpoint.check_fit(parameters, stored, "")
    progress = []
    checkpoint.load_tensors(parameters, stored, lambda *state: progress.append(state))
    for name in names:
        assert same_bits(module[name].detach(), TENSORS[name].float()), name
    assert progress == sorted(progress) and len(progress) == len(names)
    assert progress[-1] == (4 * 66, 4 * 66)  # 15 + 15 + 24 + 7 + 1 + 0 + 4 numbers in float32


@pytest.mark.parametrize("write", LAYOUTS)
def test_other_weights_beside_the_checkpoint_are_not_read(tmp_path, write):
    write(tmp_path)
    for name in ("aaa.safetensors", "model-00001-of-00009.safetensors", "dino_head.safetensors"):
        save_file({"single": torch.zeros(1), "other": torch.zeros(1)}, tmp_path / name)
    torch.save({"other": torch.zeros(1)}, tmp_path / "training_args.bin")
    stored = checkpoint.list_tensors(Source(tmp_path))
    assert set(stored) == set(TENSORS)
    assert same_bits(checkpoint.read_tensor(stored["single"]), TENSORS["single"])


def test_safetensors_go_before_bin_and_an_index_before_a_single_file(tmp_path):
    shards_of_safetensors(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert set(checkpoint.list_tensors(Source(tmp_path))) == set(TENSORS)


# --------------------------------------------------------------------------------------------- refusals


def refused(folder, *words):
    """Reading the names of a folder's tensors is refused with one line that holds the words."""
    with refusal((ValueError, OSError), *words):
        checkpoint.list_tensors(checkpoint.locate(folder))


def test_no_weights_and_missing_shards_are_named(tmp_path):
    refused(tmp_path, "holds no weights", "fetch it again")
    shards_of_safetensors(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors", "one of 1 missing", "fetch it again")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "a/b.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, name):
    write_index(tmp_path, "model.safetensors", {name: {"weight": None}})
    refused(tmp_path, name, "refused")


@pytest.mark.parametrize("write", [one_safetensors, one_bin])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, write, share):
    write(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refused(tmp_path, str(file), "fetch it again")


class Malice:
    def __reduce__(self):
        return os.system, ("touch malice",)


def test_a_bin_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(1), "more": Malice()}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "could run code")
    assert not (tmp_path / "malice").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"epoch": 3}, torch.ones(2)])
def test_a_bin_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "named tensors")


def test_what_does_not_fit_is_counted_and_named_before_data_is_read(tmp_path):
    extra = {f"extra.{n}": torch.ones(1) for n in range(7)}
    save_file(extra | {"weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    stored = checkpoint.list_tensors(Source(tmp_path))
    counts = "it does not fit: 1 missing, 7 unexpected, 1 wrongly shaped"
    with refusal(ValueError, counts, "bias", "extra.4, …", "weight [3, 2] instead of [2, 3]"):
        checkpoint.check_fit(dict(nn.Linear(3, 2, device="meta").named_parameters()), stored, "it does not fit")


def test_a_model_that_cannot_fit_is_refused_with_both_figures():
    with refusal(MemoryError, "65536.0 GiB in float32", "free on cpu", "--dtype bfloat16"):
        checkpoint.check_memory(2**46, CPU, torch.float32)


@pytest.mark.parametrize(
    ("place", "words"), [("no/where/at-all", "check the path"), ("nowhere", "check the path"), (__file__, "is a file")]
)
def test_a_place_that_is_none_is_refused(place, words):
    with refusal(OSError, place, words):
        checkpoint.locate(place)


def test_config_json_must_be_a_json_object(tmp_path):
    file = tmp_path / "config.json"
    for content, words in ((b"{", "is not JSON"), (b"[]", "holds a list"), (b"\xff", "is not JSON")):
        file.write_bytes(content)
        with refusal(ValueError, str(file), words, "fetch it again"):
            read_json(file)
    file.unlink()
    with refusal(OSError, str(file), "is missing"):
        read_json(file)


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
def test_loading_holds_one_tensor_beside_the_model(tmp_path, shards, fused):
    parts = {"abcd": 4096} if fused else dict.fromkeys("abcd", 1024)  # 16 MiB a layer
    names = {f"layer{n}.{part}.weight": rows for n in range(16) for part, rows in parts.items()}
    tensors = {name: torch.ones(rows, 1024) for name, rows in names.items()}
    files = {f"model-{n}.safetensors": dict(list(tensors.items())[n::shards]) for n in range(shards)}
    for file, held in files.items():
        save_file(held, tmp_path / file)
    write_index(tmp_path, "model.safetensors", files)
    run = subprocess.run([sys.executable, "-c", LOAD, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 256 <= int(run.stdout) < 256 + 64  # MiB


# ------------------------------------------------------------------------------------------- names and saving


def test_names_are_translated_and_fused_rows_are_split(tmp_path):
    weights = {
        "model.layer.qkv.weight": torch.randn(7, 3), "model.layer.qkv.bias": torch.randn(7),
        "model.layer.qkv.lora_A.weight": torch.randn(5, 3), "model.scale": torch.randn(1, 1, 4),
        "text.x": torch.ones(1),
    }  # fmt: skip
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "trainer.pt")
    save_file(weights, tmp_path / "weights.safetensors")
    names = checkpoint.NameMap(keys=((r"^model\.", ""),), dropped=r"^text\.", fused={"qkv": ("q", "k")})
    module = nn.ModuleDict({"layer": nn.ModuleDict({"q": nn.Linear(3, 4), "k": nn.Linear(3, 3)})})
    for part in module.layer.values():
        part.lora_A = nn.Linear(3, 5, bias=False)
    module.scale = nn.Parameter(torch.ones(4))
    for file in ("trainer.pt", "weights.safetensors"):
        stored = checkpoint.rename_tensors(checkpoint.file_tensors(tmp_path / file), names, module)
        checkpoint.check_fit(dict(module.named_parameters()), stored, "")
        checkpoint.load_tensors(dict(module.named_parameters()), stored)
        for name, rows in (("q", slice(0, 4)), ("k", slice(4, 7))):
            part = module.layer[name]
            assert torch.equal(part.weight, weights["model.layer.qkv.weight"][rows])
            assert torch.equal(part.bias, weights["model.layer.qkv.bias"][rows])
            assert torch.equal(part.lora_A.weight, weights["model.layer.qkv.lora_A.weight"])
        assert torch.equal(module.scale, weights["model.scale"].flatten())


def test_a_fused_tensor_of_too_few_rows_does_not_fit(tmp_path):
    save_file({"l.qkv.weight": torch.randn(6, 3)}, tmp_path / "model.safetensors")
    module = nn.ModuleDict({"l": nn.ModuleDict({"q": nn.Linear(3, 4, bias=False), "k": nn.Linear(3, 3, bias=False)})})
    names = checkpoint.NameMap(fused={"qkv": ("q", "k")})
    stored = checkpoint.rename_tensors(checkpoint.file_tensors(tmp_path / "model.safetensors"), names, module)
    with refusal(ValueError, "l.k.weight [2, 3] instead of [3, 3]"):
        checkpoint.check_fit(dict(module.named_parameters()), stored, "")


@pytest.mark.parametrize(("size", "files"), [(10**9, 1), (130, 4), (1, 8)])
def test_what_is_written_reads_back_bit_for_bit_whatever_the_shards(tmp_path, size, files):
    checkpoint.write_tensors(tmp_path, iter(TENSORS.items()), size)
    stored = checkpoint.list_tensors(Source(tmp_path))
    assert len({tensor.file for tensor in stored.values()}) == files == len(list(tmp_path.glob("*.safetensors")))
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert same_bits(checkpoint.read_tensor(stored[name]), tensor), name


def test_weights_can_be_read_by_whom_the_files_beside_them_can(tmp_path):
    write_json(tmp_path / "config.json", {})
    checkpoint.write_safetensors(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1 and modes.pop() & 0o444 != 0o400


def test_a_folder_changes_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_folder(folder) as partial:
            (partial / "config.json").write_text(content)
        assert (folder / "config.json").read_text() == content
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as partial:
        (partial / "config.json").write_text("third")
        raise KeyboardInterrupt
    assert (folder / "config.json").read_text() == "second"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with refusal(OSError, str(tmp_path), "not a checkpoint"), atomic_folder(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").exists()


# -------------------------------------------------------------------------------------------------- hub


class Hub(http.server.BaseHTTPRequestHandler):
    """What a download asks of the hub: a repository's commit, the files in it, and each file."""

    def do_HEAD(self):
        path = urlsplit(self.path).path
        found = re.fullmatch(r"(?:/api/models)?/(\w+/\w+)/(revision|tree|resolve)/\w+/?(.*)", path)
        folder = self.server.repositories.get(found[1]) if found else None
        headers, body = {}, b"{}"
        if not folder:
            headers = {"X-Error-Code": "RepoNotFound"}
        elif found[2] == "revision":
            body = json.dumps({"id": found[1], "sha": "0" * 40}).encode()
        elif found[2] == "tree":
            entry = lambda f: {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
            body = json.dumps([entry(file) for file in folder.iterdir()]).encode()
        else:
            self.server.asked.append(found[3])
            body = (folder / found[3]).read_bytes()
            headers = {"ETag": f'"{found[3]}"', "X-Repo-Commit": "0" * 40}
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
    """(run sample.py against a small hub that holds libra-7b and its encoder, the names of files asked for)."""
    model, encoder = tmp_path / "model", tmp_path / "encoder"
    for folder, place in ((model, "libra-7b/model"), (encoder, "libra-7b/encoder-dinov2")):
        folder.mkdir()
        for file in (GOLDEN / place).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "README.md").write_text("not needed")
        (folder / "dino_head.safetensors").write_bytes(bytes(99))
    config = json.loads((model / "config.json").read_text()) | {"mm_vision_tower": "owner/encoder"}
    (model / "config.json").write_text(json.dumps(config))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.asked = {"owner/model": model, "owner/encoder": encoder}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def run(model, **changes):
        image = str(GOLDEN / "images" / "0.png")
        command = [sys.executable, "sample.py", "--model", model, "--images", image, "--max-new-tokens=2", "--json"]
        return subprocess.run(command, cwd=ROOT, env=environment | changes, capture_output=True, text=True)

    run.model = model
    yield run, server.asked
    server.shutdown()


def test_a_hub_id_is_downloaded_once_with_only_the_files_needed(hub):
    run, asked = hub
    first = run("owner/model")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["outputs"]
    assert "README.md" not in asked and "dino_head.safetensors" not in asked
    asked.clear()
    offline = run("owner/model", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert json.loads(offline.stdout)["outputs"] == json.loads(first.stdout)["outputs"]
    assert not asked


def test_a_hub_that_lacks_the_repository_or_cannot_be_reached_is_one_line(hub):
    run, _ = hub
    for model, changes, words in (
        ("owner/nothing", {}, "no such repository"),
        ("owner/model", {"HF_HUB_OFFLINE": "1"}, "could not be downloaded"),
        ("owner/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "could not be downloaded"),
        (sample.DEFAULT_MODEL, {"HF_HUB_OFFLINE": "1"}, "--model assets/phantom"),
    ):
        failed = run(model, **changes)
        assert failed.returncode == 2 and not failed.stdout
        assert words in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr


def test_a_config_that_we_do_not_compute_is_refused_before_weights_are_downloaded(hub):
    run, asked = hub
    config = json.loads((run.model / "config.json").read_text())
    (run.model / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    failed = run("owner/model")
    assert failed.returncode == 2 and "hidden_act" in failed.stderr
    assert asked and not any(name.endswith((".safetensors", ".bin")) for name in asked)
