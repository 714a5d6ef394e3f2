"""What to type instead of a setting that Hydra's grammar refuses, in words of the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from tinyllama_lab.config import schema as config
from tinyllama_lab.config.command import sweep_command
from tinyllama_lab.config.validate import known_keys, nearest
from tinyllama_lab.sweep.settings.compose import groups
from tinyllama_lab.sweep.settings.typed_paths import way_to_name, way_to_type

COMMANDS = ("data", "ask", "evaluate", "report", "ui", "demo")
_KEYS = frozenset(known_keys(config.Config))
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


def unreadable(text: str, many: bool) -> str:
    """The rule, what was received, and what to type instead.

    Args:
        text: a setting as it was typed.
        many: whether several values may stand between commas.
    """
    key, sign, value = text.lstrip("+~").partition("=")
    if not sign:
        return f"{text!r} is not of the form key=value{_way_to_complete(text)}"
    is_known = key in _KEYS or key in groups() or key.startswith("hydra")
    if not is_known and re.fullmatch(r"[\w.]+", key):
        return f"{key} is not a setting{hint_to(key)}"
    form = "key=value or key=value,value" if many else "key=value"
    way_out = way_to_name(key, value) or (way_to_type(key, value, many) if key in _KEYS else "")
    if not way_out and (repaired := _repaired(key, value)):
        needs_m = "" if many or "," not in repaired else "-m "
        way_out = f"; type {needs_m}{shlex.quote(repaired)}"
    if not way_out and key in _KEYS and (problem := config.value_problem(key, value)):
        return problem
    return f"{text!r} is not of the form {form}{_reason(value)}{way_out}"


def hint_to(key: str) -> str:
    """The end of a message about a key that is no setting: the nearest one, if any."""
    if key in ALIASES:
        return f"; did you mean '{ALIASES[key]}'?"
    return nearest(key, [*_KEYS, *groups()])


def way_without_brackets(text: str) -> str:
    """The end of a message about `lora.r=[8,16]`, where the setting takes no list."""
    repaired = _repaired(*text.lstrip("+").partition("=")[::2])
    return f"; for several values type -m {shlex.quote(repaired)}" if "," in repaired else ""


def split_at_spaces(typed: Sequence[str]) -> list[list[str]]:
    """The words of each setting: `lora.r=8, 16` and `lora.r 8` reach a program as two words."""
    found: list[list[str]] = []
    for word in typed:
        is_rest = "=" not in word and not word.startswith("~")
        previous = found[-1][-1] if found else ""
        is_cut = previous.endswith(",") or word.startswith(",") or previous in _KEYS
        if found and is_rest and is_cut:
            found[-1].append(word)
        else:
            found.append([word])
    return found


def way_to_join(words: Sequence[str]) -> str:
    """What to say of a setting whose value was typed with spaces in it."""
    typed = " ".join(words)
    key, _, value = (typed if "=" in words[0] else typed.replace(" ", "=", 1)).partition("=")
    if way_out := way_to_type(key, value) if key in _KEYS else "":
        return f"a value with spaces must be quoted, got {typed!r}{way_out}"
    repaired = _repaired(key, value) or f"{key}=<value>"
    return f"a setting must be typed without spaces, got {typed!r}; type {shlex.quote(repaired)}"


def _way_to_complete(word: str) -> str:
    """The end of a message about a word without a value."""
    if word in _KEYS or word in groups():
        return f"; type {word}=<value>"
    if hint := nearest(word, list(COMMANDS)):
        return f", nor a command{hint}"
    return f"; a setting is typed as in {sweep_command(['lora.r=8'])}"


def _repaired(key: str, value: str) -> str:
    """The setting without stray commas, brackets and spaces; empty where that is no help."""
    plain = re.sub(r"[\s,;]+", ",", value.strip(" \t,;=()[]{}\"'"))
    text = f"{key}={plain}"
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return ""
    is_list = override.is_sweep_override()
    if is_list and not override.is_discrete_sweep():
        return ""
    parts = [OverridesParser.create().parse_override(f"{key}={v}") for v in plain.split(",")]
    return text if plain and all(_is_right(key, part.value()) for part in parts) else ""


def _is_right(key: str, value: object) -> bool:
    if key in groups():
        return value in groups()[key]
    return key in _KEYS and not config.value_problem(key, value)


def _reason(value: str) -> str:
    """Why Hydra cannot read a value, where it is plain to see."""
    if value.rstrip().endswith(","):
        return ", for nothing follows the last comma"
    if any(value.count(quote) % 2 for quote in "\"'"):
        return ", for a quote is not closed"
    if any(value.count(opening) != value.count(end) for opening, end in _PAIRS.items()):
        return ", for a bracket is not closed"
    return ""
