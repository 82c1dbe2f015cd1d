"""The settings of a program: defaults, changed by a Python file of assignments and then by a command line."""

import ast
import difflib
from pathlib import Path


def read_settings(defaults: dict, path: str, overrides: dict[str, str]) -> dict:
    """Reads settings, of the types of their defaults; overrides are texts from a command line.

    Raises ValueError that names the place, and the expected type or the nearest known name.
    """
    # 1) the file is a program: it may calculate, and it may fail in any way
    namespace: dict = {}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), namespace)
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None

    # 2) its variables, then the command line, which wins
    settings = {}
    for name, value in namespace.items():
        if not name.startswith("__"):
            settings[name] = check_setting(defaults, name, value, path)
    for name, text in overrides.items():
        value = parse_text(text, type(defaults[name]))
        settings[name] = check_setting(defaults, name, value, "the command line")
    return settings


def parse_text(text: str, kind: type):
    """A setting's text on a command line -> its value, such as "connector,lora" -> ("connector", "lora")."""
    if kind is str:
        return text
    if kind is tuple:
        return tuple(part for part in text.split(",") if part)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # it stays text, which `check_setting` refuses
        return text


def check_setting(defaults: dict, name: str, value, place: str):
    """Returns the value in its default's type: one text may stand for a tuple, a list for a tuple, 1 for 1.0."""
    if name not in defaults:
        nearest = difflib.get_close_matches(name, defaults, 1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "see --help"
        raise ValueError(f"{place}: there is no setting {name!r}; {hint}")

    kind, given = type(defaults[name]), type(value)
    if (kind, given) == (tuple, str):
        return (value,)
    if (kind, given) in ((tuple, list), (float, int)):
        value = kind(value)
    fits = type(value) is kind
    if fits and kind is tuple:
        # every tuple here is one of texts
        fits = all(isinstance(part, str) for part in value)
    if not fits:
        expected = "tuple of texts" if kind is tuple else kind.__name__
        raise ValueError(f"{place}: {name} is {value!r}, not of type {expected}")
    return value
