"""Composes the configuration of each cell of a grid.

Hydra composes each choice of groups once; the other values are set in copies of the result.
Composing every cell with Hydra would take minutes for a large grid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.axes import flatten, spelled
from tinyllama_lab.config.command import quoted
from tinyllama_lab.config.validate import known_keys
from tinyllama_lab.errors import ConfigError, shown
from tinyllama_lab.sweep.settings.profile import auto_option

SEARCH_PATH = "hydra.searchpath"  # the setting that adds the user's folders to CONF_DIR


@dataclass(frozen=True)
class Cell:
    """One cell of a grid: its overrides and the configuration composed from them."""

    overrides: tuple[str, ...]
    raw: dict[str, Any]
    choices: Mapping[str, str] = field(default_factory=dict)  # the option of each group

    def changed(self, key: str, value: Any) -> Cell:
        """Return the cell with another value of one setting, as if it had been typed."""
        raw = copy.deepcopy(self.raw)
        _put(raw, key, value)
        kept = [text for text in self.overrides if text.partition("=")[0] != key]
        return Cell((*kept, f"{key}={spelled(value)}"), raw, self.choices)


def register_resolvers() -> None:
    """Register the resolver behind `${lab.auto:model}` in `conf/`."""
    OmegaConf.register_new_resolver("lab.auto", auto_option, replace=True)


def working_folder(hydra: Any) -> Path:
    """Return the folder that the command was typed in.

    It is read without resolving interpolations: a `${` in its name is not a reference.
    """
    runtime: Any = OmegaConf.to_container(hydra.runtime, resolve=False)
    return Path(runtime["cwd"])


@dataclass
class _Folders:
    """The folders with options that the running command adds to `CONF_DIR`."""

    addresses: tuple[str, ...] = ()


_FOLDERS = _Folders()


def use_folders_of(typed: Sequence[str]) -> None:
    """Add the folders in the `hydra.searchpath` of this command to those with options."""
    search_paths = [text for text in typed if text.startswith(f"{SEARCH_PATH}=")]
    _FOLDERS.addresses = tuple(address for text in search_paths for address in folders_in(text))
    # its values are those of the former folders
    option_values.cache_clear()


def folders_in(text: str) -> list[str]:
    """Return the addresses in `hydra.searchpath=[file://my/conf]`; empty if it is not a list."""
    try:
        value = OverridesParser.create().parse_override(text).value()
    except HydraException:
        return []
    return [str(address) for address in value] if isinstance(value, list) else []


def with_search_path(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with the search path of the running command, unless they have one."""
    if not _FOLDERS.addresses or any(o.startswith(f"{SEARCH_PATH}=") for o in overrides):
        return list(overrides)
    return [f"{SEARCH_PATH}=[{','.join(map(quoted, _FOLDERS.addresses))}]", *overrides]


def _option_folders() -> list[Path]:
    """Return `CONF_DIR`, followed by the user's folders."""
    folders = [CONF_DIR]
    for address in _FOLDERS.addresses:
        folders.append(Path(address.removeprefix("file://")))
    return folders


def unresolved(error: OmegaConfBaseException) -> ConfigError:
    """Return the error for a setting that refers to something that does not exist."""
    # OmegaConf adds lines about its own objects
    reason = str(error.msg or error).partition("\n")[0]
    return ConfigError(
        [
            f"{error.full_key or 'a setting'} must be a value or refer to another setting, got an "
            f"interpolation that fails ({shown(reason, 200)}); type the value itself"
        ]
    )


def groups() -> dict[str, list[str]]:
    """Return the configuration groups, each with its options."""
    # the group `hydra` holds Hydra's own settings, which `guard.PLUGINS` lists
    names = [d.name for d in sorted(CONF_DIR.iterdir()) if d.is_dir() and d.name != "hydra"]
    return {name: sorted(_options(name)) for name in names}


def _options(group: str) -> set[str]:
    files = (file for folder in _option_folders() for file in (folder / group).glob("*.yaml"))
    # a file such as `_base.yaml` is part of other options, and no option itself
    return {file.stem for file in files if not file.stem.startswith("_")}


@lru_cache
def option_values(group: str, option: str) -> dict[str, Any]:
    """Return the settings in the file of one option, by dotted key."""
    files = [folder / group / f"{option}.yaml" for folder in _option_folders()]
    loaded: Any = OmegaConf.to_container(OmegaConf.load(next(f for f in files if f.is_file())))
    flat: dict[str, Any] = {}
    for base in loaded.pop("defaults", []):
        # entries such as `override /model: smollm2` choose other groups; only bases are merged
        if isinstance(base, str) and base != "_self_":
            flat |= option_values(group, base.rpartition("/")[2])
    return flat | flatten({group: loaded})


class Composer:
    """Composes cells; Hydra runs once for each choice of groups."""

    def __init__(self, load: Callable[[list[str]], DictConfig]) -> None:
        self._load = load
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        # only compositions without interpolations, whose values do not depend on each other
        self._plain: dict[tuple[str, ...], dict[str, Any]] = {}
        self._options: dict[tuple[str, ...], dict[str, str]] = {}

    def __call__(self, overrides: Sequence[str]) -> Cell:
        """Compose one cell, as plain dictionaries without the node `hydra`.

        Raises:
            ConfigError: an interpolation cannot be resolved.
        """
        try:
            return self._cell(overrides)
        except OmegaConfBaseException as error:
            raise unresolved(error) from None

    def _cell(self, overrides: Sequence[str]) -> Cell:
        values = [text for text in overrides if self._is_plain_value(text)]
        choices = tuple(text for text in overrides if text not in values)
        if choices not in self._composed:
            self._compose(choices)
        options = self._options[choices]
        parsed = [_parse(text) for text in values]
        simple = not any(isinstance(v, dict) or "${" in str(v) for _, v in parsed)
        if simple and choices in self._plain:
            raw = copy.deepcopy(self._plain[choices])
            for key, value in parsed:
                # `_parse` caches its values, and two cells must not share a list
                _put(raw, key, copy.deepcopy(value))
            return Cell(tuple(overrides), raw, options)
        # OmegaConf is slow, but merges a dictionary and resolves references to changed values
        composed = self._composed[choices].copy()
        for key, value in parsed:
            OmegaConf.update(composed, key, value, merge=True)
        resolved: Any = OmegaConf.to_container(composed, resolve=True)
        return Cell(tuple(overrides), resolved, options)

    def _compose(self, choices: tuple[str, ...]) -> None:
        composed = self._load(list(choices)).copy()
        self._options[choices] = dict(OmegaConf.select(composed, "hydra.runtime.choices") or {})
        # Hydra returns a structure that refuses to lose a node
        with open_dict(composed):
            composed.pop("hydra", None)
        self._composed[choices] = composed
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        # equal without resolving, so there is no interpolation in it
        if plain == OmegaConf.to_container(composed, resolve=False):
            self._plain[choices] = plain

    @staticmethod
    def _is_plain_value(text: str) -> bool:
        return text.partition("=")[0] in _KNOWN and text.partition("=")[0] not in _GROUPS


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[str, Any]:
    """Return key and value of an override."""
    override = OverridesParser.create().parse_override(text)
    return override.key_or_group, override.value()


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        raw = raw[group]
    raw[name] = value


_KNOWN = frozenset(known_keys(config.Config))
_GROUPS = frozenset(groups())
