"""Finds settings that have no effect with the other options and settings of a command.

A setting that no trial of the command uses is refused. If only some trials use it, the others
get the value of the option's file: an unused value must not be part of their key or name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tinyllama_lab.config.axes import flatten
from tinyllama_lab.config.command import typed
from tinyllama_lab.config.lora import OF_BASE
from tinyllama_lab.config.sources import FILE_OPTIONS, SOURCES
from tinyllama_lab.config.variants import FULL
from tinyllama_lab.errors import without_password
from tinyllama_lab.sweep.settings.compose import Cell, groups, option_values

Flat = Mapping[str, Any]
_WHERE = ("repo", "config", "revision", "split", "eval_split", "path", "eval_path")
_READ = {  # the settings of `_WHERE` that each source reads
    "package": (),
    "random": (),
    "local": ("path",),
    **{name: kind.settings for name, kind in SOURCES.items()},
}
# the option of a source; other options have the name of their source
_OPTIONS = {"package": "smollm2", "random": "tiny_random"}
_EXAMPLES = {"model.path": "/a/folder", "data.path": "my.jsonl"}
_FILLED_IN = ("identity", "rendering")  # by the driver
_LAUNCHER = "hydra/launcher"
_GROUPS = ("model", "data", "lora", "train", "eval", "tracking", "hardware")


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _is_not(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value not in values


# a setting, the one it depends on, the values at which it has no effect, and what to type instead
_IDLE: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ("train.epochs", "train.max_steps", _is_not(None), "train.max_steps=null"),
    ("eval.max_new_tokens", "eval.generations", _is(0), "eval.generations=8"),
    ("eval.temperature", "eval.generations", _is(0), "eval.generations=8"),
    ("eval.sample_seed", "eval.generations", _is(0), "eval.generations=8"),
    ("eval.sample_seed", "eval.temperature", _is(0), "eval.temperature=0.7"),
    ("eval.latency_batch", "eval.latency_tokens", _is(0), "eval.latency_tokens=32"),
    ("data.system", "data.style", _is_not("chat"), "data.style=chat"),
    ("data.date", "data.style", _is_not("chat"), "data.style=chat"),
    ("data.learn", "data.style", _is_not("chat"), "data.style=chat"),
    ("data.learn", "data.mask", _is("all"), "data.mask=response"),
    ("data.mask", "data.style", _is("text"), "data.style=chat"),
    ("data.balance_by", "data.n", _is("all"), "data.n=100"),
    ("data.subset", "data.n", _is("all"), "data.n=100"),
    ("data.columns.prompt", "data.columns.messages", _is_not(None), "data.columns.messages=null"),
    ("data.columns.context", "data.columns.messages", _is_not(None), "data.columns.messages=null"),
    (
        "data.columns.response",
        "data.columns.messages",
        _is_not(None),
        "data.columns.messages=null",
    ),
    ("tracking.uri", "tracking.enabled", _is(False), "tracking=mlflow"),
    ("tracking.folder", "tracking.enabled", _is(False), "tracking=mlflow"),
    ("tracking.folder", "tracking.uri", _is_not(None), "tracking.uri=null"),
    ("hardware.keep_dequantized", "quant.kind", _is_not("nf4", "fp4"), "quant=nf4"),
    ("hardware.gpus", "hardware.device", _is("cpu"), "hardware.device=auto"),
    ("hardware.gpus", _LAUNCHER, _is("inline"), f"{_LAUNCHER}=local"),
    ("hardware.workers", _LAUNCHER, _is("inline"), f"{_LAUNCHER}=local"),
    ("hardware.max_attempts", _LAUNCHER, _is("inline"), f"{_LAUNCHER}=local"),
    ("hardware.silence_s", _LAUNCHER, _is("inline"), f"{_LAUNCHER}=local"),
    *(
        (f"lora.{name}", "lora.variant", _is(FULL), "lora.variant=lora")
        for name in ("r", "alpha", "dropout", "targets", "layers", "init", *OF_BASE)
    ),
)


def drop_unused(cells: Sequence[Cell]) -> tuple[list[Cell], list[str]]:
    """Return the cells without unused values, and the problems of settings that no cell uses."""
    kept: list[Cell] = []
    problems: dict[str, str] = {}
    used: set[str] = set()
    for cell in cells:
        foreign, idle = _foreign(cell), _idle(cell)
        # the message of the first cell stays
        problems = {**foreign, **idle, **problems}
        # a setting is used if it has an effect in one cell at least
        used |= _changed(cell).keys() - foreign.keys() - idle.keys()
        unused = foreign | idle
        kept.append(_without(cell, unused) if unused else cell)
    return kept, [text for key, text in problems.items() if key not in used]


def _without(cell: Cell, keys: Mapping[str, str]) -> Cell:
    """Return the cell with these settings reset to the values in the files of its options."""
    raw = copy.deepcopy(cell.raw)
    for key in keys:
        group, *inner, name = key.split(".")
        node = raw[group]
        for inner_name in inner:
            node = node[inner_name]
        node[name] = option_values(group, cell.choices[group])[key]
    return replace(cell, raw=raw)


def _changed(cell: Cell) -> dict[str, Any]:
    """Return the settings that differ from the file of their option; null does not count."""
    flat = flatten(cell.raw)
    changed: dict[str, Any] = {}
    for group in _GROUPS:
        if group in cell.choices:
            defaults = option_values(group, cell.choices[group])
            for key in defaults:
                # null is how a setting is switched off, so it needs no effect
                if flat.get(key) is not None and flat[key] != defaults[key]:
                    changed[key] = flat[key]
    return changed


def _foreign(cell: Cell) -> dict[str, str]:
    """Return, by key, the problems of settings that the chosen model or data does not use."""
    flat = flatten(cell.raw)
    problems = {}
    for key, value in _changed(cell).items():
        group = key.partition(".")[0]
        option = cell.choices[group]
        rule = _misplaced(key, value, option, flat) if group in ("model", "data") else None
        if rule:
            problems[key] = f"{key} {rule[0]}, got {value!r} with {group}={option}; {rule[1]}"
    return problems


def _misplaced(key: str, value: Any, option: str, flat: Flat) -> tuple[str, str] | None:
    """Return the rule that a setting breaks with this option and what to type, or None."""
    group, _, name = key.partition(".")
    defaults = option_values(group, option)
    # an option such as `smollm2` names its repository itself
    source, is_fixed = defaults[f"{group}.source"], defaults[f"{group}.repo"] is not None
    file = FILE_OPTIONS[group]
    if name in _FILLED_IN:
        return "is filled in when a sweep is planned", "leave it out"
    if name == "source":
        return f"follows from {group}", f"type {group}={_OPTIONS.get(str(value), value)}"
    if name == "name" and value in groups()[group]:
        return f"must not be the name of another option of {group}", "choose another name"
    if name == "name" and (is_fixed or not _READ[source]):
        return f"is a label for {group}={file} and {group}=hub", "leave it out"
    if name in _WHERE and (name not in _READ[source] or (name == "repo" and is_fixed)):
        used_by = f"{group}={file}" if name in _READ[file] else f"{group}=hub"
        return f"needs {used_by}", f"type {_command(group, name, flat)}"
    return None


def _command(group: str, name: str, flat: Flat) -> str:
    """Return what to type for a setting that says where a model or data set comes from."""
    file = FILE_OPTIONS[group]
    option, leader = (file, "path") if name in _READ[file] else ("hub", "repo")
    first = flat.get(f"{group}.{leader}") or _EXAMPLES.get(f"{group}.{leader}", "owner/name")
    words = [typed(group, option), typed(f"{group}.{leader}", str(first))]
    if name != leader:
        words.append(typed(f"{group}.{name}", str(flat[f"{group}.{name}"])))
    return " ".join(words)


def _idle(cell: Cell) -> dict[str, str]:
    """Return, by key, the problems of typed settings that another setting makes meaningless."""
    # only typed ones: an experiment file may set more than each of its trials uses
    typed = {text.partition("=")[0].lstrip("+") for text in cell.overrides}
    return {key: text for key, text in _meaningless(cell) if key in typed}


def _meaningless(cell: Cell) -> Iterator[tuple[str, str]]:
    changed = _changed(cell)
    # the launcher is not a setting of a trial, but decides on some of `hardware`
    flat = {_LAUNCHER: cell.choices.get(_LAUNCHER), **flatten(cell.raw)}
    for key, other, has_no_effect, remedy in _IDLE:
        if key in changed and has_no_effect(flat.get(other)):
            cause = without_password(f"{other}={flat.get(other)}")
            got = without_password(repr(changed[key]))
            way_out = f"leave it out, or set {remedy}"
            yield key, f"{key} has no effect with {cause}, got {got}; {way_out}"
