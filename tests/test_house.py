"""The rules of the house: floors, imports, and a README whose commands run."""

import ast
import re
import shlex
import subprocess
import sys
from glob import glob

import numpy as np
import pyarrow
import pytest
from conftest import GOLDEN, ROOT, picture
from PIL import Image
from pyarrow import parquet

import prepare
import sample

FLOORS = [
    {"plumbing.cli", "plumbing.files", "plumbing.distributed", "kernel"},
    {"attention", "plumbing.checkpoint", "tokenizer", "plumbing.image", "plumbing.pixels",
     "phantom.radiograph"},
    {"encoder", "tac", "decoder", "phantom.hospital"},
    {"lora"},
    {"model", "data", "plumbing.fresh", "evaluation.metrics", "evaluation.truth", "bench.costs", "plumbing.log"},
    {"sample", "sources.records", "sources.cache", "evaluation.page"},
    {"evaluation.answering", "sources.mimic", "sources.rrg"},
    {"eval", "sources.vqa"},
    {"train", "prepare"},
    {"bench.__main__", "bench.kernel_compile"},
]
RUNTIME = {"torch", "triton", "safetensors", "tokenizers", "huggingface_hub", "numpy", "PIL"}
FOLDERS = ("plumbing", "sources", "phantom", "evaluation", "bench")
ROOMS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))]
}


def imports(tree, everywhere):
    """Names of the modules that a file imports: anywhere, or when it is imported itself."""
    nodes = ast.walk(tree) if everywhere else walk_outside_functions(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            if node.module in FOLDERS:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def walk_outside_functions(node):
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from walk_outside_functions(child)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_only_down_the_floors(room):
    below = set()
    for floor in FLOORS:
        if room in floor:
            break
        below |= floor
    else:
        raise AssertionError(f"{room} is on no floor")
    own = {name for name in imports(ast.parse(ROOMS[room].read_text()), everywhere=True) if name in ROOMS}
    assert own <= below


@pytest.mark.parametrize("room", ROOMS)
def test_only_the_runtime_packages_are_imported_at_import_time(room):
    names = {name.split(".")[0] for name in imports(ast.parse(ROOMS[room].read_text()), everywhere=False)}
    own = {name.split(".")[0] for name in ROOMS}
    assert names - own - set(sys.stdlib_module_names) <= RUNTIME


README = (ROOT / "README.md").read_text()
STAND_INS = {  # what the README downloads or leaves to its reader -> what a test has
    "tests/golden": str(GOLDEN),
    "X-iZhang/libra-v1.0-7b": str(GOLDEN / "libra-7b" / "model"),
    "X-iZhang/libra-v1.0-3b": str(GOLDEN / "libra-3b" / "model"),
    "epfl-llm/meditron-7b": str(GOLDEN / "libra-7b" / "model"),
    "microsoft/rad-dino": str(GOLDEN / "libra-7b" / "encoder-dinov2"),
    "my-lora": str(GOLDEN / "adapters" / "lora"),
    "mm_tac_projector.bin": str(GOLDEN / "adapters" / "projector" / "mm_projector.bin"),
    "current.jpg": str(GOLDEN / "images" / "0.png"),
    "prior.jpg": str(GOLDEN / "images" / "1.png"),
    '"cuda"': '"cpu"',
    "--patients 200": "--patients 12",
    "rrg --out": "rrg --source set --out",
}


def blocks(language):
    found = re.findall(rf"```{language}\n(.*?)```", README, re.S)
    for name, stand_in in STAND_INS.items():
        found = [block.replace(name, stand_in) for block in found]
    return found


def commands(program):
    """The README's commands that call a program, less its name."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split(program, 1)[1] for line in lines if f"python {program}" in line]


@pytest.mark.parametrize("command", commands("sample.py"))
def test_the_readme_s_sampling_commands_run(command, monkeypatch, capsys):
    arguments = shlex.split(command, comments=True)
    if "--model" not in arguments:
        arguments += ["--model", STAND_INS["X-iZhang/libra-v1.0-7b"]]
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    assert sample.main(sample.parse([*arguments, "--max-new-tokens", "3"])) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() or "--chat" in arguments
    assert not printed.err


@pytest.mark.parametrize("command", commands("model.py"))
def test_the_readme_s_conversions_run(command, tmp_path):
    arguments = [sys.executable, str(ROOT / "model.py"), *shlex.split(command, comments=True)]
    subprocess.run(arguments, cwd=tmp_path, check=True, capture_output=True)
    assert list(tmp_path.glob("*/config.json"))


def test_the_readme_s_preparations_run_in_order_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = {"main_image": [picture(1)], "prior_image": [picture(2)], "default_prompt": ["What?"]}
    (tmp_path / "set").mkdir()
    parquet.write_table(pyarrow.table(rows), tmp_path / "set" / "test.parquet")
    used = set()
    for command in commands("prepare.py"):
        words = shlex.split(command, comments=True)
        arguments = [name for word in words for name in sorted(glob(word)) or [word]]  # as a shell would
        assert prepare.main(prepare.parse(arguments)) == 0, capsys.readouterr().err
        assert capsys.readouterr().out
        used.add(words[0])
    assert used == prepare.COMMANDS.keys()
    made, shown = (np.asarray(Image.open(path).convert("RGB"), dtype=float)
                   for path in ("hospital/preview.png", ROOT / "assets" / "phantom.png"))  # fmt: skip
    assert made.shape == shown.shape and abs(made - shown).mean() < 1  # of 255


def test_the_readme_s_training_runs_in_order(tmp_path):
    places = {"--records=train.jsonl": f"--records={GOLDEN / 'training' / 'records.json'}",
              "--image_folder=images": f"--image_folder={GOLDEN / 'images'}"}  # fmt: skip
    assert len(commands("train.py")) == 2
    for command in commands("train.py"):
        more = ["--device=cpu", "--workers=0", "--batch_size=2", "--max_steps=1"]
        config, *given = shlex.split(command, comments=True)
        if config == "configs/align.py":
            more += [f"--{part}={STAND_INS[name]}" for part, name in
                     (("decoder", "epfl-llm/meditron-7b"), ("encoder", "microsoft/rad-dino"))]  # fmt: skip
        arguments = [str(ROOT / config), *(places.get(argument, argument) for argument in given), *more]
        subprocess.run([sys.executable, ROOT / "train.py", *arguments], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "runs" / "finetune_lora" / "last" / "adapter_config.json").exists()


def test_the_readme_s_python_runs(capsys, tmp_path, monkeypatch):
    assert len(blocks("python")) >= 2
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python"):
        exec(block.replace("num_beams=10", "num_beams=2, max_new_tokens=4"), namespace)
    assert capsys.readouterr().out.strip()


def test_the_readme_s_command_for_the_tests_is_the_makefile_s():
    assert "make test" in README and "\ntest:" in (ROOT / "Makefile").read_text()
