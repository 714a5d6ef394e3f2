"""Writes `docs/configuration.md` from `conf/` and the schema; a test compares the two.

    python -m tinyllama_lab.sweep.reference > docs/configuration.md

A setting's type and bounds come from the dataclasses, its default and its meaning from the YAML
files, so that the reference repeats neither by hand.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.config.axes import flatten
from tinyllama_lab.config.schema import Config
from tinyllama_lab.sweep.search.settings import NODE, SearchConfig
from tinyllama_lab.sweep.settings.compose import groups, option_values

COMMAND = "python -m tinyllama_lab.sweep.reference > docs/configuration.md"
_HEAD = f"""\
# Configuration reference

<!-- Written by `{COMMAND}`.
     Edit conf/ or the schema instead. -->

Every setting, with its type, bounds, default and meaning. The defaults are those of the YAML files
in `conf/`; nothing else holds a default. Type a setting as `key=value`, for example `lora.r=16`.
Pick a file of a group as `group=file`, for example `quant=nf4`; its own defaults override the
others. *By option* means that every file of the group sets its own.

A trial's key, the hash that identifies it, covers `model`, `data`, `lora`, `quant`, `train` and
`seed`. The settings of `eval` have a key of their own. All other settings are in no key.
[sweeps.md](sweeps.md#settings-by-task) lists the settings by task, and [data.md](data.md#columns)
says how columns are recognised.
"""
_NAMES = {
    int: "integer",
    float: "number",
    bool: "`true` or `false`",
    str: "string",
    type(None): "`null`",
}
_SIGNS = {"least": "≥", "above": ">", "most": "≤", "below": "<"}
_LINE = re.compile(r"\s*(?:- )?([\w.]+):\s.*?\s#\s+(.*)")  # a setting with its comment
_SHORTCUTS = ("profile", "experiment")  # groups whose files set keys of other groups
_LABELS = ("name", "identity")  # different in every option, or filled in by the driver
_BY_OPTION = "*by option*"


def reference() -> str:
    """Return the whole document."""
    root, search = CONF_DIR / "config.yaml", CONF_DIR / "hydra" / "sweeper" / "optuna.yaml"
    known = [(item.name, kind) for item, kind in _typed_fields(Config) if is_dataclass(kind)]
    search_defaults = flatten(_load(search), f"{NODE}.")
    search_defaults.pop(f"{NODE}._target_")
    sections = [
        _section("The command", Config, "", _root_values(root), _comments([root])),
        *(_group_section(name, kind) for name, kind in known),
        *(f"## {name}\n\n{_options_table(name, {})}" for name in _SHORTCUTS),
        _section(NODE, SearchConfig, f"{NODE}.", search_defaults, _comments([search])),
    ]
    return "\n".join([_HEAD, *sections])


def _group_section(name: str, kind: Any) -> str:
    """Return the section of a configuration group: its files, then its settings."""
    defaults = _group_defaults(name)
    files = sorted((CONF_DIR / name).glob("*.yaml"))  # `_base.yaml` comes first
    table = _options_table(name, defaults) if len(groups()[name]) > 1 else ""
    return _section(name, kind, f"{name}.", defaults, _comments(files), table)


def _group_defaults(group: str) -> dict[str, Any]:
    """Return the defaults that no choice of an option changes.

    They are those of `_base.yaml`, or else of the option that `config.yaml` picks. So another
    option changes no row of the others.
    """
    if (CONF_DIR / group / "_base.yaml").is_file():
        return option_values(group, "_base")
    (picked,) = [each for each in _load(CONF_DIR / "config.yaml")["defaults"] if group in each]
    return option_values(group, picked[group])


def _section(
    title: str,
    kind: Any,
    prefix: str,
    defaults: Mapping[str, Any],
    comments: Mapping[str, str],
    options: str = "",
) -> str:
    """Return a heading, the description of the dataclass, and a row for every setting."""
    lines = [f"## {title}", "", _description(kind), ""]
    nested = [(item.name, inner) for item, inner in _typed_fields(kind) if is_dataclass(inner)]
    for name, inner in nested if prefix else ():
        lines += [f"`{prefix}{name}`: {_description(inner)}", ""]
    lines += [options] if options else []
    lines += ["| setting | type and bounds | default | meaning |", "|---|---|---|---|"]
    allowed = {key: _allowed(setting, bounds) for key, setting, bounds in _settings(kind, prefix)}
    if prefix:  # some settings of a search are in no dataclass: they hold keys of trials
        allowed |= {key: "mapping" for key in defaults if key not in allowed}
    for key, text in allowed.items():
        meaning = comments.get(key.removeprefix(prefix), "")
        lines.append(f"| `{key}` | {text} | {_default(key, defaults)} | {meaning} |")
    return "\n".join([*lines, ""])


def _description(kind: Any) -> str:
    return inspect.cleandoc(kind.__doc__ or "")


def _options_table(name: str, defaults: Mapping[str, Any]) -> str:
    """Return the table of a group's files: their purpose and what they change of its defaults."""
    lines = ["| option | purpose | its own defaults |", "|---|---|---|"]
    for option in groups()[name]:
        values = option_values(name, option) if name not in _SHORTCUTS else {}
        changes = [
            f"`{key}={_plain(value)}`"
            for key, value in values.items()
            if value != defaults.get(key) and key.rpartition(".")[2] not in _LABELS
        ]
        lines.append(f"| `{name}={option}` | {_purpose(name, option)} | {', '.join(changes)} |")
    return "\n".join([*lines, ""])


def _settings(kind: Any, prefix: str) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield key, type and bounds of every setting of a class, including nested groups."""
    for item, setting in _typed_fields(kind):
        if not is_dataclass(setting):
            yield prefix + item.name, setting, item.metadata
        elif prefix:  # the groups of the root have sections of their own
            yield from _settings(setting, f"{prefix}{item.name}.")


def _typed_fields(kind: Any) -> Iterator[tuple[Any, Any]]:
    hints = typing.get_type_hints(kind)
    return ((item, hints[item.name]) for item in fields(kind))


def _allowed(kind: Any, bounds: Mapping[str, Any]) -> str:
    """Return the values that a setting takes, for example ``integer ≥ 1 or `all```."""
    if isinstance(kind, types.UnionType):
        return " or ".join(_allowed(member, bounds) for member in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"list of {_allowed(typing.get_args(kind)[0], {})}s"
    if typing.get_origin(kind) is dict:
        return f"names, each with {_allowed(typing.get_args(kind)[1], bounds)}"
    if kind is str and bounds.get("choices"):
        choices = [f"`{choice}`" for choice in bounds["choices"]]
        return ", ".join([*choices, *([f"`{prefix}…`"] if (prefix := bounds["prefix"]) else [])])
    limits = [f"{sign} {bounds[n]}" for n, sign in _SIGNS.items() if bounds.get(n) is not None]
    return " ".join([_NAMES[kind], " and ".join(limits if kind in (int, float) else [])]).strip()


def _default(key: str, defaults: Mapping[str, Any]) -> str:
    """Return the default of a setting; `_BY_OPTION` if every option sets its own."""
    return f"`{_plain(defaults[key])}`" if key in defaults else _BY_OPTION


def _plain(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_plain, value))}]"
    return str(value) if isinstance(value, str) else json.dumps(value)


def _comments(files: Iterable[Path]) -> dict[str, str]:
    """Return the comment of each setting, from the first file that has one."""
    comments: dict[str, str] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if match := _LINE.match(line):
                # a bar would end the cell of the Markdown table
                comments.setdefault(match[1], match[2].replace("|", "\\|"))
    return comments


def _purpose(group: str, option: str) -> str:
    """Return the comment at the top of a file of `conf/`."""
    lines = (CONF_DIR / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("# ") for line in lines if not line.startswith("# @package"))


def _root_values(file: Path) -> dict[str, Any]:
    """Return the settings of the command, with `profile` from the `defaults` list."""
    loaded = _load(file)
    (profile,) = [entry for entry in loaded["defaults"] if "profile" in entry]
    return {**loaded, **profile}


def _load(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return loaded


if __name__ == "__main__":
    print(reference(), end="")
