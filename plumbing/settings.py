"""The settings of a program: defaults, changed by a Python file of assignments and then by a command line."""

import ast
import difflib
from dataclasses import asdict
from types import ModuleType
from typing import get_type_hints

from plumbing.fields import check_value
from plumbing.files import read_text


def read_settings(cls: type, path: str, overrides: dict[str, str]) -> dict:
    """Reads settings: fields of a dataclass whose annotations give types and bounds. overrides: a command line's texts.

    Raises ValueError that names the place, and what is expected or the nearest known name.
    """
    # 1) the file is a program: it may calculate, and it may fail in any way
    namespace: dict = {}
    try:
        exec(compile(read_text(path), path, "exec"), namespace)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None

    # 2) its variables, but not what it calculates with; then the command line, which wins
    settings = {}
    for name, value in namespace.items():
        is_helper = name.startswith("_") or isinstance(value, ModuleType) or callable(value)
        if not is_helper:
            settings[name] = check_setting(cls, name, value, path)
    defaults = asdict(cls())
    for name, text in overrides.items():
        value = parse_text(text, type(defaults[name]))
        settings[name] = check_setting(cls, name, value, "the command line")
    return settings


def parse_text(text: str, kind: type):
    """A setting's text on a command line -> its value, such as "connector,lora" -> ("connector", "lora")."""
    if kind is str:
        return text
    if kind is tuple:
        return tuple(part for part in text.split(",") if part)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        # it stays text, which `check_setting` refuses
        return text


def check_setting(cls: type, name: str, value, place: str):
    """Returns the value as the field's annotation wants it: 1.0 for 1, a tuple for a list or for one text."""
    hints = get_type_hints(cls, include_extras=True)
    if name not in hints:
        nearest = difflib.get_close_matches(name, hints, 1)
        advice = f"did you mean {nearest[0]!r}?" if nearest else "see --help; a helper's name begins with _"
        raise ValueError(f"{place}: there is no setting {name!r}; {advice}")
    if isinstance(getattr(cls, name, None), tuple) and isinstance(value, str):
        value = (value,)
    return check_value(value, hints[name], name, place)
