"""The kinds of inputs that `fuzz.py` draws, and the store of good files that they are made of.

A kind is a function (draw, folder) -> Input: it puts a good input into an empty folder, says how to run a program on
it, and how to damage it. The name of a kind draws the same input from the same `draw`.
"""

import gzip
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pyarrow
import torch
from fuzzing.damage import Damage, damage
from fuzzing.images import break_image
from PIL import Image
from pyarrow import parquet as parquet_files
from safetensors.torch import load_file

import eval as evaluate
import model
import prepare
import sample
import train
from plumbing.cli import Parser

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


class Input(NamedTuple):
    """An input in a folder, which is the current one while the program runs."""

    program: str
    arguments: list[str]
    damage: Callable[[], Damage] = lambda: Damage("as it is")
    # patterns of what the program may write (and write over): if it succeeds, and after a mistake, for a rerun to go on
    outputs: tuple[str, ...] = ()
    resumable: tuple[str, ...] = ()
    # (stdout, folder) -> what is as for the good input, if the damage never fits or `always`. ValueError if it is wrong
    outcome: Callable[[str, Path], object] | None = None
    always: bool = False
    open_files: int = 0  # the most files that may be open, if not 0


def words(command: str) -> list[str]:
    return command.split()


# ------------------------------------------------------------------------------------------ the store

SHORT = words("--max-new-tokens 2 --device cpu")
SAMPLE = [*words("--images 0.png 1.png --json --num-beams 2"), *SHORT]
QUESTIONS = words("--questions hospital/questions.jsonl --image-folder hospital")
ANSWER = [*words("answer --model libra-7b/model --answers answers.jsonl --limit 2 --batch-size 1"), *QUESTIONS, *SHORT]
PRIOR = [*words("prior --model libra-7b/model --out priors --limit 1 --conditions dummy"), *QUESTIONS, *SHORT]
SCORE = words("score --references hospital/questions.jsonl --predictions hospital/answers.jsonl")
CACHE = words("cache --records hospital/records.jsonl --image-folder hospital --out cache --workers 1")
CACHE += words("--model libra-7b/encoder-dinov2")
PHANTOM = words("phantom --out hospital --patients 3 --size 32 --workers 1")
PAIRS = words("diff-vqa --root hospital --questions hospital/mimic_pair_questions.csv --out data")
TRAINING = dict(
    model="libra-7b/model", records="hospital/records.jsonl", image_folder="hospital", out_dir="run", device="cpu",
    workers=0, batch_size=2, epochs=2.0, max_steps=4, max_length=300, save_every=1, log_every=1, keep=3, warmup=0.0,
    lr=1e-3,
)  # fmt: skip


class Store:
    """A folder with tiny models, a drawn hospital, its records, questions and answers, a cache and a training run."""

    folder: Path

    @classmethod
    def fill(cls, folder: Path, run: Callable):
        """run(program, arguments, folder) must succeed."""
        cls.folder = folder
        for name in ("libra-7b", "libra-3b", "med-cxrgen"):
            shutil.copytree(GOLDEN / name, folder / name, ignore=shutil.ignore_patterns("case*"))
        shutil.copytree(GOLDEN / "adapters", folder / "adapters")
        for image in ("0.png", "1.png"):
            shutil.copy(GOLDEN / "images" / image, folder)
        run("prepare", PHANTOM, folder)
        run("prepare", words("mimic-cxr --root hospital --section findings --out data"), folder)

        # every training record is a question with a reference, too
        lines = (folder / "data" / "findings_train.jsonl").read_text().splitlines()
        records, questions, answers = list(map(json.loads, lines[:6])), [], []
        for record in records:
            question, answer = (message["value"] for message in record["conversations"])
            asked = {"question_id": record["id"], "image": record["image"], "text": question.removeprefix("<image>\n")}
            questions.append(asked | {"reference": answer})
            answers.append({"question_id": record["id"], "text": answer.upper(), "model_id": "m"})
        for name, values in (("records", records), ("questions", questions), ("answers", answers)):
            text = "".join(json.dumps(value) + "\n" for value in values)
            (folder / "hospital" / f"{name}.jsonl").write_text(text)

        run("prepare", CACHE, folder)
        run("eval", ANSWER, folder)
        (folder / "config.py").write_text("".join(f"{name} = {value!r}\n" for name, value in TRAINING.items()))
        run("train", ["config.py"], folder)
        # the last step is to be done again
        (folder / "run" / "checkpoints" / "step-0000004.pt").unlink()

    @classmethod
    def copy(cls, folder: Path, *names: str):
        """Copies files and folders of the store into an input's folder."""
        for name in names:
            source, target = cls.folder / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)


def files_in(folder: Path, pattern: str = "*") -> list[Path]:
    """The files below a folder, in an order that does not depend on the disk."""
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


def computed(out: str, folder: Path):
    """An outcome: what sample.py --json or eval.py --json printed. ValueError if a number is not finite."""

    def refuse(name):
        raise ValueError(f"{name} in the output")

    result = json.loads(out, parse_constant=refuse)
    result.pop("seconds", None)
    # another order of sums changes the last digits
    for output in result.get("outputs", ()):
        output["score"] = output["score"] and round(output["score"], 3)
    return json.dumps(result, sort_keys=True)


def content_of(name: str):
    """An outcome: the content of a file."""

    def read(out: str, folder: Path):
        if (folder / name).stat().st_size > 2**26:
            raise ValueError(f"{name} is huge")
        return (folder / name).read_bytes()

    return read


# ------------------------------------------------------------------------------------------ models


def model_files(draw: random.Random, folder: Path) -> Input:
    """Configs, tokenizers and weights of three model families."""
    family = draw.choice(("libra-7b", "libra-3b", "med-cxrgen"))
    Store.copy(folder, "0.png", "1.png", family)
    configs, files = files_in(folder / family, "*.json"), files_in(folder / family)
    # configs are more often edited than weights
    path = draw.choice(draw.choice((configs, configs, files)))
    arguments = [*SAMPLE, "--model", f"{family}/model"]
    return Input("sample", arguments, lambda: damage(draw, path), outcome=computed)


def binary_weights(draw: random.Random, folder: Path) -> Input:
    """Weights as pytorch_model.bin."""
    Store.copy(folder, "0.png", "1.png", "med-cxrgen")
    weights = folder / "med-cxrgen" / draw.choice(("model", "encoder-clip")) / "model.safetensors"
    path = weights.with_name("pytorch_model.bin")
    torch.save(load_file(weights), path)
    weights.unlink()
    arguments = [*SAMPLE, "--model", "med-cxrgen/model"]
    return Input("sample", arguments, lambda: damage(draw, path), outcome=computed)


def adapters(draw: random.Random, folder: Path) -> Input:
    """LoRA adapters, with and without a connector, and a connector alone."""
    name = draw.choice(("lora", "lora-connector", "projector"))
    Store.copy(folder, "0.png", "1.png", "libra-7b", f"adapters/{name}")
    path = draw.choice(files_in(folder / "adapters"))
    arguments = [*SAMPLE, "--model", f"adapters/{name}"]
    if name == "projector":
        arguments += ["--base", "libra-7b/model"]
    return Input("sample", arguments, lambda: damage(draw, path), outcome=computed)


# ------------------------------------------------------------------------------------------ images and records


def images(draw: random.Random, folder: Path) -> Input:
    """Damaged images, and headers that declare too much; read by sample.py, or by the cache, which needs no model."""
    Store.copy(folder, "0.png", "libra-7b")
    path, what = break_image(draw, folder)
    if draw.random() < 0.5:
        (folder / "r.jsonl").write_text(json.dumps({"id": "a", "image": path.name, "conversations": []}))
        arguments = [*CACHE, "--records", "r.jsonl", "--image-folder", "."]
        return Input("prepare", arguments, lambda: Damage(what), ("cache*",), ("cache*",))
    order = draw.choice(([path.name], ["0.png", path.name]))
    arguments = [*SAMPLE, "--images", *order, "--model", "libra-7b/model"]
    return Input("sample", arguments, lambda: Damage(what))


def records(draw: random.Random, folder: Path) -> Input:
    """Training records and questions, checked."""
    name = draw.choice(("records.jsonl", "questions.jsonl"))
    Store.copy(folder, f"hospital/{name}")
    path, arguments = folder / "hospital" / name, ["check", f"hospital/{name}"]
    if draw.random() < 0.3:
        Store.copy(folder, "hospital/files")
        arguments += ["--image-folder", "hospital"]
    return Input("prepare", arguments, lambda: damage(draw, path))


def questions(draw: random.Random, folder: Path) -> Input:
    """Damaged question files, answered."""
    Store.copy(folder, "hospital", "libra-7b")
    path = folder / "hospital" / "questions.jsonl"
    outputs = ("answers.jsonl*", ".answers.jsonl.0", "priors*")
    return Input("eval", draw.choice((ANSWER, PRIOR)), lambda: damage(draw, path), outputs, outputs)


def training(draw: random.Random, folder: Path) -> Input:
    """Damaged records, trained on."""
    Store.copy(folder, "hospital", "libra-7b", "config.py")
    path = folder / "hospital" / "records.jsonl"
    return Input("train", ["config.py", "--max_steps=1"], lambda: damage(draw, path), ("run*",), ("run*",))


# ------------------------------------------------------------------------------------------ data sets


def tables(draw: random.Random, folder: Path) -> Input:
    """The tables, reports and questions of MIMIC-CXR."""
    Store.copy(folder, "hospital")
    hospital, arguments = folder / "hospital", words("mimic-cxr --root hospital --out data")
    files = [unzip(path) for path in files_in(hospital, "*.csv.gz")]
    kind = draw.choice(("reports", "pairs", "images"))
    if kind == "reports":
        files += files_in(hospital, "s*.txt")
    elif kind == "pairs":
        files.append(hospital / "mimic_pair_questions.csv")
        arguments = PAIRS
    else:
        (folder / "vqa").mkdir()
        files = [path.rename(folder / "vqa" / path.name) for path in files_in(hospital, "cxr_vqa_*.json")]
        arguments = words("cxr-vqa --root hospital --questions vqa --out data")
    path = draw.choice(files)
    return Input("prepare", arguments, lambda: damage(draw, path), outputs=("data*",))


def unzip(path: Path) -> Path:
    table = path.with_suffix("")
    table.write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    return table


def parquet(draw: random.Random, folder: Path) -> Input:
    """The published evaluation set, with odd values or damaged."""
    # 1) two good rows
    file = BytesIO()
    Image.new("L", (4, 4), 7).save(file, "PNG")
    image = {"bytes": file.getvalue(), "path": None}
    row = {"main_image": image, "prior_image": image, "default_prompt": "What?", "findings_section": "Clear."}
    Store.copy(folder, "0.png", "hospital/truth.jsonl")
    path = folder / "set" / "test.parquet"
    path.parent.mkdir()
    parquet_files.write_table(pyarrow.Table.from_pylist([row, row]), path)

    # 2) one value, or the column if a column has one type; images as bytes, as files and as nothing
    def change() -> Damage:
        if draw.random() < 0.3:
            return damage(draw, path)
        odd = [None, "", 5, [1], 0.5, {"bytes": b"no image", "path": None}, {"bytes": None, "path": None}]
        odd += [{"bytes": None, "path": name} for name in ("../0.png", "../hospital/truth.jsonl", "missing.png")]
        name, value = draw.choice(list(row)), draw.choice(odd)
        for rows in ([row, row | {name: value}], [row | {name: value}] * 2):
            with suppress(pyarrow.ArrowException):
                parquet_files.write_table(pyarrow.Table.from_pylist(rows), path)
                break
        return Damage(f"{name} is {value!r}")

    return Input("prepare", words("rrg --source set --out out"), change, outputs=("out*",))


# ------------------------------------------------------------------------------------------ evaluation


def scores(draw: random.Random, folder: Path) -> Input:
    """Question files, answer files and the truth, scored."""
    names = ("questions.jsonl", "answers.jsonl", "truth.jsonl")
    Store.copy(folder, *(f"hospital/{name}" for name in names))
    path, arguments = folder / "hospital" / draw.choice(names), [*SCORE, "--json"]
    if path.name == "truth.jsonl" or draw.random() < 0.2:
        arguments += ["--truth", "hospital/truth.jsonl"]
    if draw.random() < 0.2:
        Store.copy(folder, "hospital/files")
        arguments += words("--csv scores.csv --html page.html --image-folder hospital --export export.json")
    outputs = ("scores.csv", "page.html", "export.json")
    return Input("eval", arguments, lambda: damage(draw, path), outputs, outputs, computed)


def score_files(draw: random.Random, folder: Path) -> Input:
    """What goes into an evaluation beside answers: a CSV to extend, RadEval's scores."""
    Store.copy(folder, "hospital/questions.jsonl", "hospital/answers.jsonl")
    (folder / "rad.json").write_text(json.dumps({"green": 0.5, "each": [0.1] * 6}))
    (folder / "scores.csv").write_text("Model Name,BLEU1\nold,1.0\n")
    path = folder / draw.choice(("rad.json", "scores.csv"))
    flag = words("--merge rad.json" if path.suffix == ".json" else "--csv scores.csv")
    return Input("eval", [*SCORE, *flag], lambda: damage(draw, path), outputs=("scores.csv",))


def answering(draw: random.Random, folder: Path) -> Input:
    """What an earlier run of answering has left; the answers must be those of an unbroken run."""
    Store.copy(folder, "hospital", "libra-7b", "answers.jsonl", "answers.jsonl.settings.json")
    answers, settings = folder / "answers.jsonl", folder / "answers.jsonl.settings.json"
    # the folder of images is recorded as it was resolved
    settings.write_text(settings.read_text().replace(str(Store.folder.resolve()), str(folder.resolve())))
    # either they are complete, or the first of two is in a work file
    path = draw.choice((settings, answers))
    if draw.random() < 0.7:
        work = folder / ".answers.jsonl.0"
        first, _ = answers.read_text().splitlines()
        work.write_text(f"\n[{first}]\n")
        answers.unlink()
        path = draw.choice((settings, work))
    outputs, outcome = ("answers.jsonl*", ".answers.jsonl.0"), content_of("answers.jsonl")
    return Input("eval", ANSWER, lambda: damage(draw, path), outputs, outputs, outcome)


# ------------------------------------------------------------------------------------------ what is there already


def runs(draw: random.Random, folder: Path) -> Input:
    """What a stopped training run has left; the resumed run must end as the unbroken one."""
    Store.copy(folder, "hospital", "libra-7b", "config.py", "run")
    files = files_in(folder / "run")
    newest = folder / "run" / "checkpoints" / "step-0000003.pt"
    path, outcome = draw.choice((newest, draw.choice(files))), content_of("run/last/mm_projector.safetensors")
    return Input("train", words("config.py --resume"), lambda: damage(draw, path), ("run*",), ("run*",), outcome, True)


def hospitals(draw: random.Random, folder: Path) -> Input:
    """A drawn hospital that is drawn again."""
    Store.copy(folder, "hospital")
    path = draw.choice(sorted(path for path in (folder / "hospital").iterdir() if path.is_file()))
    ours = ("hospital/*.csv*", "hospital/truth.jsonl", "hospital/cxr_vqa_*.json")
    return Input("prepare", PHANTOM, lambda: damage(draw, path), ours, ours)


def caches(draw: random.Random, folder: Path) -> Input:
    """An image cache that is extended or resumed; training must not see what is damaged."""
    Store.copy(folder, "hospital", "libra-7b", "cache", "config.py")
    path = draw.choice(files_in(folder / "cache"))
    if draw.random() < 0.5:
        return Input("train", words("config.py --max_steps=1 --image_folder= --image_cache=cache"),
                     lambda: damage(draw, path), ("run*",), ("run*",))  # fmt: skip
    # a build that was killed leaves its index under another name
    if path.suffix == ".jsonl" and draw.random() < 0.5:
        path = path.rename(path.with_name(".index.jsonl.growing"))
    return Input("prepare", CACHE, lambda: damage(draw, path), ("cache*",), ("cache*",))


def checkpoints(draw: random.Random, folder: Path) -> Input:
    """A checkpoint that is written over an older one, beside files that are nobody's to remove."""
    Store.copy(folder, "libra-7b")
    out = folder / "merged"
    shutil.copytree(folder / "libra-7b" / draw.choice(("model", "encoder-dinov2")), out)
    path = draw.choice(files_in(out))
    for name in ("notes.txt", "src/config.json", "encoder/mine.py"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}\n")
    arguments = [*words("--model libra-7b/model --out merged"), *draw.choice(([], ["--with-encoder"]))]
    ours = ("config.json", "generation_config.json", "preprocessor_config.json", "*.safetensors", "*.index.json")
    ours += ("*token*", "encoder/*.json")
    return Input("model", arguments, lambda: damage(draw, path), tuple(f"merged/{name}" for name in ours))


def workers(draw: random.Random, folder: Path) -> Input:
    """More worker processes than files may be open."""
    Store.copy(folder, "hospital", "libra-7b/encoder-dinov2")
    count, limit = draw.randrange(20, 60), draw.randrange(12, 60)
    command = draw.choice((CACHE, words("phantom --out drawn --patients 1 --size 32")))
    what = Damage(f"{count} workers, {limit} open files")
    ours = ("cache*", "drawn*")
    return Input("prepare", [*command, "--workers", str(count)], lambda: what, ours, ours, open_files=limit)


# ------------------------------------------------------------------------------------------ flags and settings

TEXTS = [
    *("", " ", "--", "-", "x", "-1", "0", "1.5", "nan", "inf", "1e308", "-1e308", "1e-300", "9" * 20, "1" * 5000, "٣"),
    *("\udcff", "a\nb", "\x1b[31m", "y" * 300, "y" * 5000, "[1]", "{}", "None", "True", "1,2", "a:b", "os:path"),
    *("~nosuchuser/x", "missing/deeper", "notes.txt", "strange", "loop", "../x", "0.png", "libra-7b", "libra-7b/model"),
    *("lora", "white", "vicuna_v1", "cpu:x", "meta", "mps", "cuda:99", "http://127.0.0.1:9/x.png", "http://[", "https://"),
]
COMMANDS = {  # a program and its command -> what is changed by one flag
    "sample": [*SAMPLE, "--model", "libra-7b/model"],
    "eval answer": ANSWER,
    "eval score": SCORE,
    "eval prior": PRIOR,
    "prepare phantom": words("phantom --out drawn --patients 1 --size 32 --workers 1"),
    "prepare mimic-cxr": words("mimic-cxr --root hospital --out data"),
    "prepare diff-vqa": PAIRS,
    "prepare check": words("check hospital/records.jsonl"),
    "prepare cache": CACHE,
    "model": words("--model libra-7b/model --out merged"),
}
OUTPUTS = ("answers.jsonl*", "priors*", "drawn*", "data*", "cache*", "merged*")
WRITES = ("--out", "--answers", "--csv", "--html", "--export")  # flags that name what is written
VALUES = ["None", "-1", "0", "float('nan')", "[]", "{}", "''", "1e400", "10**400", "object()", "b''"]  # of settings


def flags(draw: random.Random, folder: Path) -> Input:
    """Every flag of every program, with values that it may not expect."""
    name = draw.choice(list(COMMANDS))
    add_strange_files(folder)
    flag, takes_value = draw.choice(flags_of(name))
    text = draw.choice(TEXTS)
    # a pipe that nobody opens: whoever writes to one waits, as any program does
    if flag not in WRITES and draw.random() < 0.1:
        text = "pipe"
    # not outside of the folder
    if flag in WRITES:
        text = text.replace("..", "x")
    # as many processes as that would stop this machine
    if flag == "--workers" and len(text) > 3:
        text = "64"
    arguments = [*COMMANDS[name], flag]
    if takes_value:
        arguments = draw.choice(([*arguments, text], [*COMMANDS[name], f"{flag}={text}"]))
    ours, resumable = outputs_for(text), (*OUTPUTS, ".*")
    if flag not in WRITES:
        ours = OUTPUTS
    # a file that is named for a page or an export is written over
    elif flag in ("--html", "--export") and text in ("notes.txt", "0.png"):
        ours = (text,)
    return Input(name.split()[0], arguments, lambda: Damage(f"{flag} {text[:80]}"), ours, resumable)


def settings(draw: random.Random, folder: Path) -> Input:
    """Settings of training with values that they may not expect, on the command line or in the file."""
    add_strange_files(folder)
    Store.copy(folder, "config.py")
    name, text = draw.choice(list(train.DEFAULTS)), draw.choice(TEXTS).replace("..", "x")
    # as many processes as that would stop this machine
    if name == "workers":
        text = "-1"
    arguments = ["config.py", f"--{name}={text}"]
    if draw.random() < 0.3:
        text, arguments = draw.choice(VALUES), ["config.py"]
        with open(folder / "config.py", "a") as file:
            file.write(f"{name} = {text}\n")
    ours = ("run*", *outputs_for(text)) if name == "out_dir" else ("run*",)
    return Input("train", arguments, lambda: Damage(f"{name} = {text[:80]}"), ours, ours)


def add_strange_files(folder: Path):
    Store.copy(folder, "0.png", "1.png", "hospital", "libra-7b")
    (folder / "notes.txt").write_text("not to be lost\n")
    (folder / "strange").mkdir()
    (folder / "strange" / "config.json").write_text('{"a": 1}')
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")


def outputs_for(text: str) -> tuple[str, ...]:
    """What a program may write if it is told to write to `text`: what is there already must stay."""
    name = re.sub(r"([*?[])", r"[\1]", os.path.normpath(text))
    if text in ("notes.txt", "strange", "loop", "0.png", "libra-7b", "libra-7b/model"):
        return (*OUTPUTS, f"{name}/*")
    # an empty text is the folder itself
    top = name.split("/")[0]
    return (*OUTPUTS, f"{top}*", f".{top}*") if name != "." else ("*",)


def flags_of(name: str) -> list[tuple[str, bool]]:
    """The flags of a program and its command, as its parser knows them, and whether they take a value."""
    parsers = []

    def remember(self, *arguments):
        parsers.append(self)
        raise LookupError

    program, *command = name.split()
    original, Parser.parse_args = Parser.parse_args, remember
    with suppress(LookupError):
        {"sample": sample, "eval": evaluate, "prepare": prepare, "model": model}[program].parse([])
    Parser.parse_args = original
    (parser,) = parsers
    if command:
        (commands,) = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
        parser = commands[command[0]]
    actions = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    return [(action.option_strings[-1], action.nargs != 0) for action in actions]


KINDS = {  # kind -> how often, in a thousand inputs or so
    model_files: 300,
    binary_weights: 40,
    adapters: 110,
    images: 120,
    records: 100,
    questions: 20,
    training: 10,
    tables: 70,
    parquet: 20,
    scores: 70,
    score_files: 20,
    answering: 30,
    runs: 10,
    hospitals: 10,
    caches: 20,
    checkpoints: 20,
    workers: 2,
    flags: 130,
    settings: 40,
}
