"""Makes the configuration of each cell of a grid; Hydra composes, values are put on top."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.config import schema as config
from tinyllama_lab.config.axes import flatten, spelled
from tinyllama_lab.config.validate import known_keys
from tinyllama_lab.sweep.settings.profile import auto_option


@dataclass(frozen=True)
class Cell:
    """One cell of a grid: what was typed for it and what that came to."""

    overrides: tuple[str, ...]
    raw: dict[str, Any]
    choices: Mapping[str, str] = field(default_factory=dict)  # the option of each group

    def changed(self, key: str, value: Any) -> Cell:
        """The same cell with another value of one setting, as if that had been typed."""
        raw = copy.deepcopy(self.raw)
        _put(raw, key, value)
        kept = [text for text in self.overrides if text.partition("=")[0] != key]
        return Cell((*kept, f"{key}={spelled(value)}"), raw, self.choices)


def register_resolvers() -> None:
    """Make `${lab.auto:model}` known to the files in `conf/`."""
    OmegaConf.register_new_resolver("lab.auto", auto_option, replace=True)


def working_folder(hydra: Any) -> Path:
    """Where the command was typed; read as it stands, for a `${` in its name is no reference."""
    runtime: Any = OmegaConf.to_container(hydra.runtime, resolve=False)
    return Path(runtime["cwd"])


def groups() -> dict[str, list[str]]:
    """The configuration groups and the options of each."""
    return {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml") if not f.stem.startswith("_"))
        for folder in sorted(CONF_DIR.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    }


@lru_cache
def option_values(group: str, option: str) -> dict[str, Any]:
    """What the file of one option says, by dotted key: the settings before anyone changed them."""
    loaded: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / group / f"{option}.yaml"))
    flat: dict[str, Any] = {}
    for base in loaded.pop("defaults", []):
        flat |= option_values(group, base) if base != "_self_" else {}
    return flat | flatten({group: loaded})


class Composer:
    """Composes cells; Hydra works once for each choice of groups, values are put on top."""

    def __init__(self, load: Callable[[list[str]], DictConfig]) -> None:
        self._load = load
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._plain: dict[tuple[str, ...], dict[str, Any]] = {}  # those without interpolations
        self._options: dict[tuple[str, ...], dict[str, str]] = {}

    def __call__(self, overrides: Sequence[str]) -> Cell:
        """The configuration of one cell, as plain dictionaries without Hydra's own node."""
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
                _put(raw, key, copy.deepcopy(value))
            return Cell(tuple(overrides), raw, options)
        composed = self._composed[choices].copy()
        for key, value in parsed:
            OmegaConf.update(composed, key, value, merge=True)
        resolved: Any = OmegaConf.to_container(composed, resolve=True)
        return Cell(tuple(overrides), resolved, options)

    def _compose(self, choices: tuple[str, ...]) -> None:
        composed = self._load(list(choices)).copy()
        self._options[choices] = dict(OmegaConf.select(composed, "hydra.runtime.choices") or {})
        with open_dict(composed):
            composed.pop("hydra", None)
        self._composed[choices] = composed
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        if plain == OmegaConf.to_container(composed, resolve=False):
            self._plain[choices] = plain

    @staticmethod
    def _is_plain_value(text: str) -> bool:
        return text.partition("=")[0] in _KNOWN and text.partition("=")[0] not in _GROUPS


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[str, Any]:
    """Key and value of what was typed."""
    override = OverridesParser.create().parse_override(text)
    return override.key_or_group, override.value()


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        raw = raw[group]
    raw[name] = value


_KNOWN = frozenset(known_keys(config.Config))
_GROUPS = frozenset(groups())
