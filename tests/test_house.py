"""The rules of the house: imports go down only, programs load what they need, and the README's commands run."""

import ast
import re
import shlex
import subprocess
import sys
from collections import Counter
from glob import glob

import numpy as np
import pyarrow
import pytest
from conftest import GOLDEN, ROOT, picture
from PIL import Image
from pyarrow import parquet

import eval as eval_program
import model
import prepare
import sample
import train
from evaluation.prior import Cell
from evaluation.tables import write_prior_csv

FOLDERS = ("plumbing", "sources", "phantom", "evaluation", "page", "bench")
FLOORS = [  # a module imports only from the lines above its own
    {"plumbing.start", "plumbing.fields", "plumbing.distributed", "page.safety", "phantom.radiograph", "kernel"},
    {"plumbing.files", "plumbing.dicom", "plumbing.download", "plumbing.int8_kernel"},
    {"plumbing.quantised"},
    {"plumbing.cli", "plumbing.settings", "plumbing.checkpoint", "plumbing.image", "plumbing.pixels", "plumbing.log",
     "plumbing.resume", "plumbing.sentencepiece", "attention", "phantom.history"},
    {"tokenizer", "encoder", "tac", "decoder"},
    {"data", "contrast", "phantom.reports", "evaluation.metrics", "plumbing.families"},
    {"lora", "plumbing.fresh", "phantom.hospital", "evaluation.pairs", "bench.costs"},
    {"plumbing.layout", "sources.records", "evaluation.truth", "evaluation.page"},
    {"model", "sources.mimic", "sources.rrg", "sources.cache"},
    {"sample", "sources.vqa"},
    {"train", "prepare", "evaluation.answering", "page.work"},
    {"evaluation.prior", "evaluation.merging"},
    {"evaluation.tables"},
    {"eval", "app"},
    {"bench.sides", "bench.kernel_proofs"},
    {"bench.measure", "bench.checks"},
    {"bench.gpu"},
    {"bench.__main__"},
]  # fmt: skip
RUNTIME = {"torch", "triton", "safetensors", "tokenizers", "huggingface_hub", "numpy", "PIL", "tqdm"}
APP = {"starlette", "uvicorn", "anyio"}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {module_name(path): path for path in ROOT.glob("*.py")}
FILES |= {module_name(path): path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}


def imports(module, everywhere):
    """Names of the modules that a module imports: anywhere, or only when it is imported itself."""
    tree = ast.parse(FILES[module].read_text())
    for node in ast.walk(tree) if everywhere else outside_functions(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            if node.module in FOLDERS:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def outside_functions(node):
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from outside_functions(child)


# ------------------------------------------------------------------------------------------ imports


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_only_down_the_floors(module):
    below = set()
    for floor in FLOORS:
        if module in floor:
            break
        below |= floor
    else:
        raise AssertionError(f"{module} is on no floor")
    assert {name for name in imports(module, everywhere=True) if name in FILES} <= below


def test_the_floors_name_only_what_exists():
    assert {name for floor in FLOORS for name in floor} == set(FILES)


@pytest.mark.parametrize("module", sorted(FILES))
def test_only_the_runtime_packages_are_imported_at_import_time(module):
    names = {name.split(".")[0] for name in imports(module, everywhere=False)}
    ours = {name.split(".")[0] for name in FILES}
    allowed = RUNTIME | APP if module == "app" or module.startswith("page.") else RUNTIME
    assert names - ours - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize("program", ["train", "sample"])
def test_a_program_loads_only_the_folders_it_needs(program):
    unneeded = ("phantom", "bench", "sources", "evaluation", "page")
    code = f"import {program}, sys; print(*(name for name in sys.modules if name.split('.')[0] in {unneeded}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ------------------------------------------------------------------------------------------ README and docs

TEXTS = [(ROOT / "README.md").read_text(), *(file.read_text() for file in sorted((ROOT / "docs").glob("*.md")))]
STAND_INS = {  # what the README downloads or leaves to its reader -> what a test has
    "tests/golden": str(GOLDEN),
    "X-iZhang/libra-v1.0-7b": str(GOLDEN / "libra-7b" / "model"),
    "X-iZhang/libra-v1.0-3b": str(GOLDEN / "libra-3b" / "model"),
    "epfl-llm/meditron-7b": str(GOLDEN / "libra-7b" / "model"),
    "microsoft/rad-dino": str(GOLDEN / "libra-7b" / "encoder-dinov2"),
    "my-lora": str(GOLDEN / "adapters" / "lora"),
    "mm_tac_projector.bin": str(GOLDEN / "adapters" / "projector" / "mm_projector.bin"),
    "current.jpg": str(GOLDEN / "images" / "0.png"),
    "scores.json": str(ROOT / "tests" / "golden" / "ccd" / "scores.json"),
    "prior.jpg": str(GOLDEN / "images" / "1.png"),
    '"cuda"': '"cpu"',
    "--patients 200": "--patients 12",
    "rrg --out": "rrg --source set --out",
}


def blocks(language, texts=TEXTS):
    """The code blocks of a language in README and docs, with stand-ins."""
    code = [block for text in texts for block in re.findall(rf"```{language}\n(.*?)```", text, re.S)]
    for name, stand_in in STAND_INS.items():
        code = [block.replace(name, stand_in) for block in code]
    return code


def commands(program, texts=TEXTS):
    """The commands that call a program, without its name."""
    lines = [line for block in blocks("bash", texts) for line in block.replace("\\\n", " ").splitlines()]
    return [line.split(program, 1)[1] for line in lines if f"python {program}" in line]


@pytest.mark.parametrize("command", dict.fromkeys(commands("sample.py")))
def test_the_sampling_commands_run(command, monkeypatch, capsys):
    arguments = shlex.split(command, comments=True)
    if "--model" not in arguments:
        arguments += ["--model", STAND_INS["X-iZhang/libra-v1.0-7b"]]
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    assert sample.main(sample.parse([*arguments, "--max-new-tokens", "3"])) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() or "--chat" in arguments
    assert not printed.err


@pytest.mark.parametrize("command", commands("model.py"))
def test_the_conversions_run(command, tmp_path):
    arguments = [sys.executable, str(ROOT / "model.py"), *shlex.split(command, comments=True)]
    subprocess.run(arguments, cwd=tmp_path, check=True, capture_output=True)
    assert list(tmp_path.glob("*/config.json"))


def test_the_preparations_run_in_order_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = {"main_image": [picture(1)], "prior_image": [picture(2)], "default_prompt": ["What?"]}
    (tmp_path / "set").mkdir()
    parquet.write_table(pyarrow.table(rows), tmp_path / "set" / "test.parquet")
    used = set()
    for text in TEXTS:
        for command in commands("prepare.py", [text]):
            words = shlex.split(command, comments=True)
            arguments = [name for word in words for name in sorted(glob(word)) or [word]]  # as a shell would
            assert prepare.main(prepare.parse(arguments)) == 0, capsys.readouterr().err
            assert capsys.readouterr().out
            used.add(words[0])
    assert used == prepare.COMMANDS.keys()
    made = np.asarray(Image.open("hospital/preview.png").convert("RGB"), dtype=float)
    shown = np.asarray(Image.open(ROOT / "assets" / "phantom.png").convert("RGB"), dtype=float)
    assert made.shape == shown.shape and abs(made - shown).mean() < 1  # of 255


def test_the_trainings_run_in_order(tmp_path):
    places = {
        "--records=train.jsonl": f"--records={GOLDEN / 'training' / 'records.json'}",
        "--image_folder=images": f"--image_folder={GOLDEN / 'images'}",
    }
    stage_1, stage_2 = commands("train.py", TEXTS[:1])
    for command in (stage_1, stage_2):
        config, *given = shlex.split(command, comments=True)
        given = [places.get(argument, argument) for argument in given]
        given += ["--device=cpu", "--workers=0", "--batch_size=2", "--max_steps=1"]
        if command == stage_1:
            given.append(f"--decoder={STAND_INS['epfl-llm/meditron-7b']}")
            given.append(f"--encoder={STAND_INS['microsoft/rad-dino']}")
        command = [sys.executable, str(ROOT / "train.py"), str(ROOT / config), *given]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "runs" / "finetune_lora" / "last" / "adapter_config.json").exists()


def test_the_python_blocks_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in TEXTS:
        namespace = {}
        for block in blocks("python", [text]):
            exec(block.replace("num_beams=10", "num_beams=2, max_new_tokens=4"), namespace)
    assert capsys.readouterr().out.strip()


def test_every_file_that_readme_and_docs_name_exists():
    for file, text in zip([ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], TEXTS, strict=True):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (file.parent / target).exists(), (file.name, target)
    tree = blocks("", TEXTS[:1])[0]
    for name in re.findall(r"^(\w+(?:\.py|/))", tree, re.M):
        assert (ROOT / name).exists(), name


def test_the_commands_of_the_readme_are_in_the_makefile():
    for target in ("test", "demo", "app"):
        assert f"make {target}" in TEXTS[0] and f"\n{target}:" in (ROOT / "Makefile").read_text()


PHANTOMS = [("phantom", 3, 1), ("phantom-pair", 2, 1), ("ablation", 14, 7)]


@pytest.mark.parametrize(("target", "trainings", "models"), PHANTOMS)
def test_the_commands_that_train_phantoms_fit_their_programs(target, trainings, models):
    """Ablation: seven connectors with the same two stages and the same scores."""
    dry = ["make", "--dry-run", "--always-make", target, "HOSPITAL=aligned"]
    printed = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    programs = {"train.py": train, "eval.py": eval_program, "model.py": model, "prepare.py": prepare}
    counts = Counter()
    for line in printed.replace("\\\n", " ").splitlines():
        name, _, flags = line.partition(".py ")
        name = f"{name.split()[-1].split('/')[-1]}.py"
        if name in programs:
            settings = programs[name].parse(shlex.split(flags))
            counts[name] += 1
        if name == "train.py":
            train.check_config(settings[0])
    assert (counts["train.py"], counts["eval.py"], counts["prepare.py"]) == (trainings, models, 6)


def test_the_table_of_make_ablation(tmp_path):
    keys = {"Temporal_entity_score": ("true", "dummy"), "direction of change": ("true",), "findings F1": ("true",)}
    keys["severity changes turned round"] = ("reversed",)
    scores = {key: {name: Cell(50.0, 25.0, 75.0) for name in names} for key, names in keys.items()}
    file = tmp_path / "ablation_hospital_tac_without_extractor.csv"
    write_prior_csv(file, "x", scores)
    command = [sys.executable, ROOT / "assets" / "ablation_table.py", file]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[2] == "| hospital tac without extractor |" + 5 * " 50.0 [25.0, 75.0] |"
    assert {line.count("|") for line in lines} == {7}
