"""Quotes file and folder names on the command line before Hydra reads them.

Hydra's grammar gives brackets, commas and quotes a meaning, and refuses letters outside ASCII.
A value that names an existing file means that file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from tinyllama_lab.config import schema as config
from tinyllama_lab.config.command import quoted, typed
from tinyllama_lab.config.sources import FILE_OPTIONS
from tinyllama_lab.data import hub
from tinyllama_lab.data.sources import SUFFIXES
from tinyllama_lab.study.files import exists, user_path

FOLDERS = ("sweeps_dir", "tracking.folder")  # created if they do not exist
PATHS = ("data.path", "data.eval_path", "model.path", *FOLDERS)
_TYPED = re.compile(r"(\+{0,2})([a-z_.]+)=(.+)", re.DOTALL)
_CHOICE = re.compile(r"choice\((.+)\)", re.DOTALL)


def quote_paths(arguments: Iterable[str]) -> list[str]:
    """Return the arguments with quotes around existing names that Hydra would misread.

    A value that exists as a whole is one path. Otherwise the parts between commas may be paths.
    """
    return [_quoted_setting(text) for text in arguments]


def way_to_type(key: str, value: str, is_list: bool = False) -> str:
    """Return the end of a message that says how to type a value as a string.

    It is empty if the setting does not accept the string, or if the string cannot be printed.
    With `is_list`, the parts of a list of paths are quoted one by one.
    """
    names = [name.strip() for name in value.split(",")] if is_list and key in PATHS else [value]
    if not value.isprintable() or any(config.value_problem(key, name) for name in names):
        return ""
    command = shlex.quote(f"{key}={','.join(map(quoted, names))}")
    if key not in PATHS:
        return f"; for a string with such characters type {command}"
    if len(names) > 1:
        return f"; not all of these files exist; if the names are right, type {command}"
    return f"; no file has this name; if it is right, type {command}"


def way_to_name(group: str, name: str) -> str:
    """Return the end of a message about a file, folder or repository typed as an option.

    It is empty if the name looks like none of them.
    """
    if group not in FILE_OPTIONS:
        return ""
    # a name with the suffix of a data file is meant as a file, even if it is missing
    is_file = group == "data" and name.lower().endswith(SUFFIXES)
    if exists(name) or name.startswith(("/", "./", "../", "~")) or is_file:
        return f"; type {group}={FILE_OPTIONS[group]} {typed(f'{group}.path', name)}"
    return hub_way(group, name)


def hub_way(group: str, name: str) -> str:
    """Return the end of a message about a name that can only be a repository on the hub."""
    if "/" in name and hub.is_repository(name):
        return f"; type {group}=hub {typed(f'{group}.repo', name)}"
    return ""


def _quoted_setting(argument: str) -> str:
    match = _TYPED.fullmatch(argument)
    if match is None:
        return argument
    plus, key, value = match.groups()
    value = _quoted_value(key, value) if key in PATHS else value
    return f"{plus}{key}={_without_choice(key, value)}"


def _quoted_value(key: str, value: str) -> str:
    if exists(value) or value.startswith("~/"):
        return _single(key, value)
    # a folder to create need not exist
    if key in FOLDERS:
        return _folder(key, value)
    choice = _CHOICE.fullmatch(value)
    names = _existing_names((choice[1] if choice else value).split(","))
    if names is None:
        return value
    return ",".join(_single(key, name) for name in names)


def _without_choice(key: str, value: str) -> str:
    """Return the list in `choice("a b","c")`, because Hydra drops the quotes inside `choice`."""
    choice = _CHOICE.fullmatch(value)
    if choice is None or not re.search("[\"']", value):
        return value
    override = _read(f"{key}={choice[1]}")
    return choice[1] if override and override.is_discrete_sweep() else value


def _folder(key: str, value: str) -> str:
    """Return the name of a folder to create, quoted if Hydra misreads it, with `~` expanded.

    Hydra creates a folder of its own below it and would take `~` literally.
    """
    override = _read(f"{key}={value}")
    text = override.value() if override else value
    if isinstance(text, str) and (override is None or text.startswith("~")):
        return quoted(str(user_path(text)))
    return value


def _single(key: str, name: str) -> str:
    """Return a name, quoted only if Hydra misreads it."""
    path = str(user_path(name)) if key in FOLDERS else name
    override = _read(f"{key}={path}")
    is_misread = override is None or override.is_sweep_override() or override.value() != path
    # Hydra would resolve `${` as an interpolation
    return quoted(path) if is_misread or "${" in path else path


def _existing_names(parts: Sequence[str]) -> list[str] | None:
    """Join parts into names that all exist, trying the longest first; None if that fails."""
    if not parts:
        return []
    # a file name may contain commas, so several parts may be one name
    for count in range(len(parts), 0, -1):
        name = ",".join(parts[:count])
        name = name if exists(name) else name.strip()
        if exists(name) and (rest := _existing_names(parts[count:])) is not None:
            return [name, *rest]
    return None


def _read(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None
