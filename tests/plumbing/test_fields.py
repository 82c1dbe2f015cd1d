"""Values from outside against annotations: what fits, what does not, and the message. Oracle: written by hand."""

import json
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from plumbing.fields import Range, Share, Size, check_fields, describe


@dataclass
class Example:
    size: Size
    share: Share = 0.5
    act: Literal["silu", "gelu"] = "silu"
    window: Size | None = None
    mean: tuple[float, ...] = ()
    flag: bool = False
    layers: Annotated[list[str], Range(0, 3)] | None = None


FITTING = dict(size=3, share=1, act="gelu", window=None, mean=[0, 0.5], flag=True, layers=["a"])


def test_fitting_values_come_back_in_their_types():
    values = check_fields(FITTING | {"unknown": {}}, Example, "config.json")
    assert values == dict(size=3, share=1.0, act="gelu", window=None, mean=(0.0, 0.5), flag=True, layers=["a"])
    assert type(values["share"]) is float and type(values["mean"]) is tuple


NESTED = json.loads("[" * 500 + "]" * 500)
MISFITS = [
    ("size", 0), ("size", -1), ("size", 10**30), ("size", 1.0), ("size", True), ("size", None), ("size", "3"),
    ("size", [3]), ("size", {}), ("size", NESTED), ("size", math.nan), ("share", math.nan), ("share", math.inf),
    ("share", 1.5), ("share", 10**400), ("act", "relu"), ("act", 1), ("window", 0), ("mean", 0.5), ("mean", ["a"]),
    ("mean", [math.nan]), ("flag", 1), ("flag", "true"), ("layers", ["a"] * 4), ("layers", [1]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), MISFITS, ids=lambda item: str(item)[:20])
def test_a_misfit_is_one_line_that_names_file_field_and_expectation(name, value):
    with pytest.raises(ValueError, match=f"^config.json: {name} is .*, expected ") as error:
        check_fields(FITTING | {name: value}, Example, "config.json")
    message = str(error.value)
    assert "\n" not in message and len(message) < 200


def test_annotations_in_words():
    assert describe(Size | None) == "a whole number from 1 to 1,048,576 or null"
    assert describe(Literal["mean", "black"]) == "'mean' or 'black'"
    assert describe(tuple[float, ...]) == "a list, each a number"
    assert describe(tuple[float, float, float]) == "a list of 3, each a number"
    assert describe(Annotated[list[str], Range(0, 3)]) == "a list, each a text of length from 0 to 3"
