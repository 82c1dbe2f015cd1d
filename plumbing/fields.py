"""Checks values from outside (JSON files, settings) against the annotations of a dataclass.

    @dataclass
    class Example:
        hidden_size: Size                                     # a whole number from 1 to 2**20
        hidden_act: Literal["silu", "gelu"]
        layer_norm_eps: Annotated[float, Range(0, 1)]
        sliding_window: Size | None = None

The annotation is the whole rule: a field's type, its bounds, and the message when a value breaks them.
"""

import math
import types
import warnings
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included; for a text or a list, bounds of its length."""

    low: float
    high: float


Size = Annotated[int, Range(1, 2**20)]
Count = Annotated[int, Range(1, 10**9)]
CountOrZero = Annotated[int, Range(0, 10**9)]
Positive = Annotated[float, Range(1e-12, 1e12)]
Share = Annotated[float, Range(0, 1)]


def check_fields(json: dict, cls: type, where) -> dict:
    """Returns those fields of a JSON object that a dataclass has, checked against its annotations.

    A whole number becomes a float and a list becomes a tuple where the annotation asks for that. Fields that the object
    lacks are left out. Raises ValueError that names `where`, the field, its value and what is expected.
    """
    hints = get_type_hints(cls, include_extras=True)
    names = [field.name for field in fields(cls) if field.name in json]
    return {name: check_value(json[name], hints[name], name, where) for name in names}


def check_present(json: dict, hints: dict, where):
    """Checks those fields of a JSON object that it has against annotations by name; errors as `check_fields`."""
    for name, hint in hints.items():
        if name in json:
            check_value(json[name], hint, name, where)


def warn_of_training(json: dict, names, where):
    """Warns about fields with a value which only change training, and which training does not apply here."""
    for name in names:
        if json.get(name):
            warnings.warn(f"{where}: {name} {shorten(json[name])} is not applied in training", stacklevel=3)


def check_value(value, hint, name: str, where):
    """Returns a value in the type that an annotation names; see `check_fields`."""
    fitted = _fit(value, hint)
    if fitted is _MISFIT:
        raise misfit(value, name, where, describe(hint))
    return fitted


def misfit(value, name: str, where, expected: str) -> ValueError:
    """The error for a field's value that is not what is expected; `raise` it."""
    return ValueError(f"{where}: {name} is {shorten(value)}, expected {expected}")


def printable(text, limit: int | None = None) -> str:
    """A text as one line, of at most `limit` characters.

    What comes from outside, such as a file's name or a server's answer, may hold control characters, which a terminal
    would obey.
    """
    line = " ".join(str(text).split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…"


def shorten(value) -> str:
    """A value as it is shown in a message: one line of at most 60 characters."""
    # repr of a deeply nested value would exceed Python's stack
    if isinstance(value, list | tuple | dict) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}…"


_MISFIT = object()


def _fit(value, hint):
    """The value in the type of an annotation, or _MISFIT."""
    kind, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint is None or hint is type(None):
        return None if value is None else _MISFIT
    if kind is Literal:
        # True == 1, but they are not the same in a file
        same = [choice for choice in arguments if choice == value and type(choice) is type(value)]
        return same[0] if same else _MISFIT
    if kind is Annotated:
        return _fit_range(value, *arguments)
    if kind in (Union, types.UnionType):
        results = [_fit(value, argument) for argument in arguments]
        return next((result for result in results if result is not _MISFIT), _MISFIT)
    if kind in (tuple, list):
        return _fit_sequence(value, kind, arguments)
    if kind is dict:
        return _fit_object(value, arguments[1])

    # plain types
    kind = kind or hint
    if kind is float and type(value) is int:
        # too large for a float
        value = float(value) if abs(value) < 1e300 else math.inf
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        return _MISFIT
    return value if type(value) is kind else _MISFIT


def _fit_range(value, hint, bounds: Range):
    value = _fit(value, hint)
    if value is _MISFIT or value is None:
        return value
    size = value if isinstance(value, int | float) else len(value)
    return value if bounds.low <= size <= bounds.high else _MISFIT


def _fit_sequence(value, kind: type, arguments: tuple):
    """tuple[X, ...], list[X] or tuple[X, Y] from a list or a tuple."""
    if not isinstance(value, list | tuple):
        return _MISFIT
    hints = arguments
    if kind is list or arguments[-1] is ...:
        hints = arguments[:1] * len(value)
    if len(hints) != len(value):
        return _MISFIT
    parts = [_fit(part, hint) for part, hint in zip(value, hints, strict=True)]
    return _MISFIT if _MISFIT in parts else kind(parts)


def _fit_object(value, hint):
    """dict[str, X] from an object, whose names are texts."""
    if not isinstance(value, dict):
        return _MISFIT
    parts = {name: _fit(part, hint) for name, part in value.items()}
    return _MISFIT if _MISFIT in parts.values() else parts


NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object"}
NAMES |= {type(None): "null", list: "a list", tuple: "a list"}


def describe(hint) -> str:
    """An annotation in words, such as "a whole number from 1 to 8 or null"."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return " or ".join(map(repr, arguments))
    if kind is Annotated:
        inner, bounds = arguments
        unit = "" if _is_number(inner) else " of length"
        return f"{describe(inner)}{unit} from {bounds.low:,} to {bounds.high:,}"
    if kind in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if kind is list or (kind is tuple and arguments[-1] is ...):
        return f"a list, each {describe(arguments[0])}"
    if kind is tuple and len(set(arguments)) == 1:
        return f"a list of {len(arguments)}, each {describe(arguments[0])}"
    if kind is tuple:
        return f"a list of {len(arguments)}: {', '.join(map(describe, arguments))}"
    if kind is dict:
        return f"an object, each value {describe(arguments[1])}"
    return NAMES.get(kind or hint, str(hint))


def _is_number(hint) -> bool:
    return hint in (int, float)
