"""Golden checkpoints and what the published implementation computes with them.

GOLDEN_DIR, where it is set, names a fuller set of the same layout than the copy in tests/golden.
"""

import functools
import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR") or ROOT / "tests" / "golden").resolve()
XRAYS = GOLDEN.parent / "cxr"  # the real pair of case-cxr lies beside the full set only
sys.path.insert(0, str(ROOT))

from data import Study  # noqa: E402
from model import Libra  # noqa: E402

FAMILIES = sorted(folder.parent.name for folder in GOLDEN.glob("*/model"))
LIBRA = ["libra-7b", "libra-3b"]


@functools.cache
def load(family: str) -> Libra:
    """A golden checkpoint in float32 on the CPU, read once. Tests must not change it."""
    return Libra.from_pretrained(GOLDEN / family / "model", device="cpu", dtype="float32")


def seconds_of_children() -> float:
    """CPU seconds of this process's children that have ended: the clock's would grow with what else runs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cases():
    """(family, case folder) of every golden case whose images are at hand."""
    folders = [(family, case) for family in FAMILIES for case in sorted((GOLDEN / family).glob("case*"))]
    return [(family, case) for family, case in folders if XRAYS.exists() or case.name != "case-cxr"]


def study_of(case: dict) -> Study:
    """The study of a golden case, as its expected.json describes it."""
    find = lambda name: (GOLDEN / "images" if name.endswith(".png") else XRAYS) / name
    return Study(find(case["current"]), find(case["prior"]) if case["prior"] else None, case["query"])


def relative(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out - reference).norm() / reference.norm())


def read(*path: str):
    return json.loads(GOLDEN.joinpath(*path).read_text())


def training_record(question="Has it grown?", answer="It has.", image="0.png", id="1", **changes) -> dict:
    messages = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": messages} | changes


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def seven():
    return load("libra-7b")
