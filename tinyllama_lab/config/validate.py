"""Validates a configuration against dataclasses whose fields declare bounds."""

from __future__ import annotations

import difflib
import operator
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields, is_dataclass
from functools import cache
from math import isfinite
from typing import Any


def rule(
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    prefix: str = "",
    example: str = "",
    recipe: str = "",
) -> Any:
    """Declare a dataclass field with the bounds of its value.

    Args:
        least: smallest valid value.
        above: the value must be larger than this.
        most: largest valid value.
        below: the value must be smaller than this.
        choices: valid strings; all strings if empty.
        prefix: begins strings that are valid in addition.
        example: a value, as it is typed, for the message about one of the wrong kind.
        recipe: the heading in docs/extending.md that says how to add a choice.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below, "choices": choices}
    texts = {"prefix": prefix, "example": example, "recipe": recipe}
    return field(metadata={**bounds, **texts})


def known_keys(cls: Any, prefix: str = "") -> list[str]:
    """Return every dotted key that a command can set, for example `lora.r`."""
    keys = []
    for name, kind in _hints(cls).items():
        keys += known_keys(kind, f"{prefix}{name}.") if is_dataclass(kind) else [prefix + name]
    return keys


def nearest(word: str, known: list[str]) -> str:
    """Return a hint with the most similar known word, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:  # without its group, a short name such as `r` is not similar to `lora.r`
        close = [k for k in known if k.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    return f"; did you mean '{close[0]}'?" if close else ""


def not_a_choice(key: str, value: Any, choices: Iterable[str], hint: str = "") -> str:
    """The message for a value that is none of the words that are allowed.

    Args:
        key: the setting, as it is typed.
        value: what was received.
        choices: every word that is allowed.
        hint: what to type instead; by default the most similar choice.
    """
    known = list(choices)
    hint = hint or nearest(str(value), known)
    return f"{key} must be one of {', '.join(known)}, got {value!r}{hint}"


@cache  # evaluates every annotation, and a grid builds each group once for every cell
def _hints(cls: Any) -> dict[str, Any]:
    """Return the type of every field by name."""
    return typing.get_type_hints(cls)


def build(cls: Any, raw: Any, root: Any, prefix: str = "") -> tuple[Any, list[str]]:
    """Build an instance of `cls` from plain settings and collect all problems.

    A class with rules that involve several of its settings yields them in `problems()`.

    Args:
        cls: the dataclass of a group.
        raw: the settings of that group.
        root: the dataclass of the whole configuration; hints name its keys.
        prefix: the group's dotted name, with a dot at the end.

    Returns:
        The instance, or None if a value is invalid; and the problems.
    """
    if not isinstance(raw, Mapping):
        return None, [f"{prefix.rstrip('.')} must be a group of settings, got {raw!r}"]
    types_by_name = _hints(cls)
    # a key of YAML need not be a string
    unknown = [str(name) for name in raw if name not in types_by_name]
    problems = [
        f"{prefix}{name} is not a setting{nearest(prefix + name, known_keys(root))}"
        for name in unknown
    ]
    values: dict[str, Any] = {}
    for item in fields(cls):
        key, kind = prefix + item.name, types_by_name[item.name]
        if item.name not in raw:  # the dataclasses have no defaults: those are in conf/ only
            problems.append(f"{key} is missing; set it with {key}=... or in conf/")
        elif is_dataclass(kind):
            values[item.name], inner = build(kind, raw[item.name], root, key + ".")
            problems += inner
        else:
            problem = check(key, raw[item.name], kind, item.metadata)
            problems += [problem] if problem else []
            values[item.name] = _coerce(raw[item.name], kind)
    # contradictions are checked only on valid values, so that no problem is a consequence
    if problems:
        return None, problems
    built = cls(**values)
    return built, list(getattr(built, "problems", list)())


def check(key: str, value: Any, kind: Any, bounds: Mapping[str, Any]) -> str | None:
    """Return what is wrong with one value, or None.

    Args:
        key: its dotted name, for the message.
        value: what was received.
        kind: the annotated type of the field.
        bounds: what `rule` declared for it.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if {int, str} <= set(kinds):  # a count or a word, such as data.n=all: one message for both
        return _count_problem(key, value, bounds)
    if not any(_fits(value, option) for option in kinds):
        expected = " or ".join(_spell(option) for option in kinds)
        example = bounds.get("example")
        way = f"type {shlex.quote(f'{key}={example}')}" if example else _where(key)
        return f"{key} must be {expected}, got {value!r}; {way}"
    if isinstance(value, str) and _is_unknown(value, bounds):
        choices = list(bounds["choices"])
        hint = nearest(value, choices)
        if prefix := bounds.get("prefix"):
            choices.append(f"{prefix}...")
        if way := way_to_list(key, value, kinds):
            choices[-1] += ", or a list of names"
            hint = hint or f"; type {way}"
        if recipe := bounds.get("recipe"):
            hint = hint or f"; type one of them, or add one: '{recipe}' in docs/extending.md"
        return not_a_choice(key, value, choices, hint)
    if isinstance(value, dict):
        inside = (check(f"{key}.{name}", each, int, bounds) for name, each in value.items())
        return next((problem for problem in inside if problem), None)
    if isinstance(value, int | float) and not isinstance(value, bool):
        for name, (words, holds) in _BOUNDS.items():
            if bounds.get(name) is not None and not holds(value, bounds[name]):
                return f"{key} must be {words} {bounds[name]}, got {value}; {_where(key)}"
    return None


def _is_unknown(word: str, bounds: Mapping[str, Any]) -> bool:
    choices, prefix = bounds.get("choices"), bounds.get("prefix")
    return bool(choices and word not in choices and not (prefix and word.startswith(prefix)))


def way_to_list(key: str, names: str, kinds: Iterable[Any]) -> str:
    """What to type in a shell for a list of names; empty where the setting takes no list."""
    takes_list = any(typing.get_origin(each) is list for each in kinds)
    is_plain = re.fullmatch(r"[\w.]+(,[\w.]+)*", names)
    return shlex.quote(f"{key}=[{names}]") if takes_list and is_plain else ""


def _count_problem(key: str, value: Any, bounds: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a value that must be a count or one of some words, or None."""
    if value in bounds["choices"] or (_fits(value, int) and value >= bounds["least"]):
        return None
    words = " or ".join([f"an integer of at least {bounds['least']}", *bounds["choices"]])
    hint = nearest(value, list(bounds["choices"])) if isinstance(value, str) else ""
    return f"{key} must be {words}, got {value!r}{hint or f'; {_where(key)}'}"


def _coerce(value: Any, kind: Any) -> Any:
    """Convert an integer to a float where one is expected, so that 1 and 1.0 give one key."""
    wants_float = kind is float or float in typing.get_args(kind)
    return float(value) if wants_float and type(value) is int else value


_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "least": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "most": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value has a type; unlike in Python, `true` is not an integer."""
    if kind is type(None):
        return value is None
    if kind is bool or isinstance(value, bool):  # bool is a subclass of int in Python
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and isfinite(value)  # YAML reads .nan and .inf
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return isinstance(value, list) and all(_fits(element, inner) for element in value)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    return isinstance(value, kind)


def _spell(kind: Any) -> str:
    """Return the name of a type for messages."""
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}
    if typing.get_origin(kind) is list:
        plurals = {int: "integers", float: "numbers", str: "strings"}
        return f"a list of {plurals[typing.get_args(kind)[0]]}"
    if typing.get_origin(kind) is dict:
        return "names with values"
    return "null" if kind is type(None) else names.get(kind, "a group of settings")


def _where(key: str) -> str:
    """Return the end of a message: how to set the key, and the file of its default."""
    group = key.partition(".")[0]
    file = f"conf/{group}/" if "." in key else "conf/config.yaml"
    return f"set it with {key}=... or in {file}"
