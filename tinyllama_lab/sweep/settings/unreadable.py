"""Explains settings that Hydra's grammar refuses, and says what to type instead.

Hydra's own message names tokens of its grammar, which mean nothing to most users.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from tinyllama_lab.config import schema as config
from tinyllama_lab.config.command import sweep_command
from tinyllama_lab.config.validate import known_keys, nearest
from tinyllama_lab.sweep.settings.compose import groups
from tinyllama_lab.sweep.settings.typed_paths import way_to_name, way_to_type

COMMANDS = ("data", "ask", "plan", "doctor", "evaluate", "report", "track", "ui", "demo")
_DEPLOY_COMMANDS = ("chat", "serve", "merge", "gguf", "card", "push", "deploy")
_KEYS = frozenset(known_keys(config.Config))
# names of other libraries and short names, and the settings that they mean here
ALIASES = {
    "rank": "lora.r",
    "alpha": "lora.alpha",
    "dropout": "lora.dropout",
    "targets": "lora.targets",
    "target_modules": "lora.targets",
    "lora.rank": "lora.r",
    "lora.target_modules": "lora.targets",
    "lora.lora_alpha": "lora.alpha",
    "learning_rate": "train.lr",
    "lr": "train.lr",
    "train.learning_rate": "train.lr",
    "epochs": "train.epochs",
    "train.num_train_epochs": "train.epochs",
    "quantization": "quant",
    "objective": "hydra.sweeper.objective",
    "constraints": "hydra.sweeper.constraints",
    "n_trials": "hydra.sweeper.n_trials",
    "sampler": "hydra.sweeper.sampler",
    "pruner": "hydra.sweeper.pruner",
}
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_NAMED = re.compile(r"\s*(.+?)\s*:\s*(-?\d+)\s*(?:,|$)")  # a name with an integer, in braces
_SPECIAL = re.compile(r"[()\[\]{}:=,\s]")  # Hydra reads them in a name after a backslash alone


def unreadable(text: str, many: bool) -> str:
    """Return the message for a setting that Hydra cannot parse.

    Args:
        text: the setting as typed.
        many: whether a list of values between commas is allowed.
    """
    key, sign, value = text.lstrip("+~").partition("=")
    if not sign:
        return not_a_setting(text)
    # an unknown key is the first problem, whatever its value
    is_known = key in _KEYS or key in groups() or key.startswith("hydra")
    if not is_known and re.fullmatch(r"[\w.]+", key):
        return f"{key} is not a setting{hint_to(key)}"
    form = "key=value or key=value,value" if many else "key=value"
    if typed := _with_plain_names(key, value):
        return (
            f"{key} must have names without quotes, and a backslash before brackets, commas and "
            f"spaces in a name, got {value}; type {shlex.quote(typed)}"
        )
    way_out = way_to_name(key, value) or (way_to_type(key, value, many) if key in _KEYS else "")
    if not way_out and (repaired := _repaired(key, value)):
        needs_m = "" if many or "," not in repaired else "-m "
        way_out = f"; type {needs_m}{shlex.quote(repaired)}"
    if not way_out and key in _KEYS and (problem := config.value_problem(key, value)):
        return problem
    return f"{text!r} is not of the form {form}{_reason(value)}{way_out}"


def hint_to(key: str) -> str:
    """Return the end of a message that names the setting nearest to an unknown key."""
    if key in ALIASES:
        return f"; did you mean '{ALIASES[key]}'?"
    return nearest(key, [*_KEYS, *groups()])


def way_without_brackets(text: str) -> str:
    """Return the end of a message about `lora.r=[8,16]` for a setting that takes no list."""
    repaired = _repaired(*text.lstrip("+").partition("=")[::2])
    return f"; for several values type -m {shlex.quote(repaired)}" if "," in repaired else ""


def split_at_spaces(typed: Sequence[str]) -> list[list[str]]:
    """Group the words of each setting: a shell splits `lora.r=8, 16` and `lora.r 8` in two."""
    settings: list[list[str]] = []
    for word in typed:
        is_rest = "=" not in word and not word.startswith("~")
        previous = settings[-1][-1] if settings else ""
        # a word continues the former one after a comma, or after a key without a value
        is_cut = previous.endswith(",") or word.startswith(",") or previous in _KEYS
        if settings and is_rest and is_cut:
            settings[-1].append(word)
        else:
            settings.append([word])
    return settings


def way_to_join(words: Sequence[str]) -> str:
    """Return the message for a setting that was typed with spaces."""
    typed = " ".join(words)
    key, _, value = (typed if "=" in words[0] else typed.replace(" ", "=", 1)).partition("=")
    if way_out := way_to_type(key, value) if key in _KEYS else "":
        return f"a value with spaces must be quoted, got {typed!r}{way_out}"
    repaired = _repaired(key, value) or f"{key}=<value>"
    return f"a setting must be typed without spaces, got {typed!r}; type {shlex.quote(repaired)}"


def not_a_setting(word: str) -> str:
    """Return the message for a word without a value."""
    return f"{word!r} is not of the form key=value{_way_to_complete(word)}"


def _way_to_complete(word: str) -> str:
    """Return the end of a message about a word without a value."""
    if word in _DEPLOY_COMMANDS:
        command = "" if word == "deploy" else f" {word}"
        return f"; type python -m tinyllama_lab.deploy{command}"
    if word in _KEYS or word in groups():
        return f"; type {word}=<value>"
    if hint := nearest(word, list(COMMANDS)):
        return f", nor a command{hint}"
    commands = ", ".join(COMMANDS)
    return f"; a setting is typed as in {sweep_command(['lora.r=8'])}; commands are {commands}"


def _repaired(key: str, value: str) -> str:
    """Return the setting without stray commas, brackets and spaces; empty if it stays invalid."""
    # brackets and quotes around the whole value, and spaces and semicolons between values
    plain = re.sub(r"[\s,;]+", ",", value.strip(" \t,;=()[]{}\"'"))
    text = f"{key}={plain}"
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return ""
    is_list = override.is_sweep_override()
    if is_list and not override.is_discrete_sweep():
        return ""
    # a suggestion must be valid itself
    parts = [OverridesParser.create().parse_override(f"{key}={v}") for v in plain.split(",")]
    return text if plain and all(_is_right(key, part.value()) for part in parts) else ""


def _with_plain_names(key: str, value: str) -> str:
    """Return a setting that maps names to integers as Hydra reads it; empty if there is no way."""
    takes_names = key in _KEYS and any(get_origin(kind) is dict for kind in config.kinds_of(key))
    inside = re.fullmatch(r"\s*\{(.*)\}\s*", value)
    if not takes_names or inside is None or _NAMED.sub("", inside[1]).strip():
        return ""
    names = {_unquoted(name): int(number) for name, number in _NAMED.findall(inside[1])}
    pairs = ", ".join(_SPECIAL.sub(r"\\\g<0>", n) + f": {rank}" for n, rank in names.items())
    text = f"{key}={{{pairs}}}"
    try:
        is_same = OverridesParser.create().parse_override(text).value() == names
    except HydraException:
        return ""
    return text if is_same and not config.value_problem(key, names) else ""


def _unquoted(name: str) -> str:
    """Return a name without quotes around it, and without the backslashes that are needed then."""
    if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
        return name[1:-1].replace(f"\\{name[0]}", name[0])
    return re.sub(r"\\([()\[\]{}:=,\s])", r"\1", name)


def _is_right(key: str, value: object) -> bool:
    if key in groups():
        return value in groups()[key]
    return key in _KEYS and not config.value_problem(key, value)


def _reason(value: str) -> str:
    """Return the reason why Hydra cannot parse a value; empty if it is not obvious."""
    if value.rstrip().endswith(","):
        return ", because nothing follows the last comma"
    if any(value.count(quote) % 2 for quote in "\"'"):
        return ", because a quote is not closed"
    if any(value.count(opening) != value.count(end) for opening, end in _PAIRS.items()):
        return ", because a bracket is not closed"
    return ""
