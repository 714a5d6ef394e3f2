"""Keeps a command or a settings file from running code, reading secrets or making folders.

Hydra makes an object of any class that its own node names: as launcher, sweeper, callback or
logger. So only the values that `conf/` itself sets pass. Components of this project come from
registries by name, and nothing else is ever instantiated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.config.schema import Config
from tinyllama_lab.config.validate import nearest, not_a_choice
from tinyllama_lab.errors import ConfigError, shown, without_password
from tinyllama_lab.sweep.launchers import LAUNCHERS
from tinyllama_lab.sweep.search.settings import NAMES, NODE
from tinyllama_lab.sweep.settings.compose import SEARCH_PATH, register_resolvers, with_search_path

PLUGINS = {"hydra/launcher": LAUNCHERS, "hydra/sweeper": ("basic", "optuna")}
# `oc.env` reads secrets; `oc.decode` and `oc.create` can spell it; a value is as easily typed
RESOLVERS = ("lab.auto", "now", "hydra")
_LAUNCHER = "hydra_plugins.tinyllama_lab_launchers.SweepLauncher"
_SWEEPERS = (
    "hydra_plugins.tinyllama_lab_sweeper.GridSweeper",
    "hydra_plugins.tinyllama_lab_sweeper.OptunaSweeper",
)
_TYPED = (SEARCH_PATH, "hydra.mode", "hydra.verbose")  # besides the plugins and the search
_PLACES = ("hydra.run", "hydra.sweep", "hydra.output_subdir", "hydra.job")
_INSTANTIATES = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
_JOB: dict[str, Any] = {"chdir": None, "env_set": {}, "env_copy": []}  # Hydra's own defaults
_GROUPS = [item.name for item in fields(Config) if str(item.type).endswith("Config")]
_CLEARED = (
    *("oc.env", "oc.decode", "oc.create", "oc.deprecated", "oc.select"),
    *("oc.dict.keys", "oc.dict.values"),
)
_ADDRESSES = {  # settings that may be URLs, and where their passwords belong
    "tracking.uri": "set the environment variable MLFLOW_TRACKING_URI to the whole address",
    f"{NODE}.storage": "leave it out of the address: PostgreSQL takes it from ~/.pgpass",
}
_COMPOSING = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError, AssertionError, ValueError),
    *(TypeError, AttributeError, LookupError),
)
_MOST_BYTES = 2**18  # of a settings file
_MOST_VALUES = 100_000  # in a settings file, once its aliases are replaced by what they repeat


def install() -> None:
    """Guard this process, which runs one command: no resolver but ours, no oversized file."""
    for name in _CLEARED:
        OmegaConf.clear_resolver(name)
    guard_files()


def guard_files() -> None:
    """Check every settings file of a user before Hydra reads it."""
    Plugins.instance()  # registers Hydra's own class, which would be refused afterwards
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = _Files


def problems_of_hydra(key: str, override: Override, is_search: bool) -> Iterator[str]:
    """Yield the problems of a typed setting of Hydra: only launcher and sweeper can be chosen."""
    name, _, rest = key.removeprefix(f"{NODE}.").partition(".")
    of_search = key.startswith(f"{NODE}.")
    is_removed = override.is_delete()
    if key in PLUGINS and not is_removed and override.package is None:
        if override.value() not in PLUGINS[key]:
            yield not_a_choice(key, override.value(), PLUGINS[key])
    elif is_removed or not (key in _TYPED or of_search):
        yield _not_typed(key)
    # `params` also holds the grid of Hydra's basic sweeper
    elif of_search and not is_search and name in NAMES and name != "params":
        yield f"{key} belongs to a search; add hydra/sweeper=optuna"
    elif of_search and (name not in NAMES or set(rest.split(".")) & set(_INSTANTIATES)):
        yield f"{key} is not a setting{nearest(key, [f'{NODE}.{n}' for n in NAMES])}"


def _not_typed(key: str) -> str:
    is_place = any(key == place or key.startswith(f"{place}.") for place in _PLACES)
    way = "; the folder of the studies is sweeps_dir=<folder>" if is_place else "; leave it out"
    return f"{shown(key)} cannot be set: Hydra would make folders or run code{way}"


def compose_checked(overrides: Sequence[str]) -> DictConfig:
    """Return what Hydra composes, with its own node; nothing is made of it yet.

    Raises:
        ConfigError: it cannot be composed, or could run code, read secrets or make folders.
    """
    register_resolvers()  # `conf/config.yaml` needs ours
    guard_files()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        texts = with_search_path(overrides)
        try:
            found = compose("config", overrides=texts, return_hydra_config=True)
        except _COMPOSING as error:
            # Hydra ends in errors of any kind where a file or a setting has an odd form
            reason = " ".join(f"{error} {error.__cause__ or ''}".split())
            raise ConfigError([f"the settings cannot be composed: {reason[:500]}"]) from error
    check_composed(found)
    return found


def check_composed(composed: DictConfig) -> None:
    """Refuse a composed configuration that could run code, read secrets or make folders.

    Raises:
        ConfigError: with all problems.
    """
    plain: Any = OmegaConf.to_container(composed, resolve=False)
    problems = [*_problems_of_node(plain["hydra"]), *problems_of_value("", plain)]
    for name in _GROUPS:
        if not isinstance(plain.get(name), Mapping):
            got = shown(repr(plain.get(name)))
            problems.append(f"{name} must be a group of settings, got {got}; correct its file")
    if problems:
        raise ConfigError(problems)


def _problems_of_node(hydra: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs in the node `hydra` from what this project sets."""
    for key, wanted in _locked().items():
        group, _, name = key.partition(".")
        received = dict(hydra.get(group) or {}).get(name) if name else hydra.get(group)
        if received != wanted:
            yield (
                f"hydra.{key} must stay as it is, since Hydra makes folders or runs code by it; "
                "leave it out of the command and of settings files"
            )
    launcher = hydra.get("launcher")
    if launcher not in [{"_target_": _LAUNCHER, "name": name} for name in LAUNCHERS]:
        yield (
            f"hydra.launcher must be one of {', '.join(LAUNCHERS)}, got {shown(repr(launcher))}; "
            "type hydra/launcher=local, and leave it out of settings files"
        )
    sweeper = dict(hydra.get("sweeper") or {}).get("_target_")
    if sweeper not in _SWEEPERS:
        yield (
            f"hydra.sweeper must be basic or optuna, got {shown(repr(sweeper))}; type "
            "hydra/sweeper=optuna, and leave its _target_ out of settings files"
        )


@cache
def _locked() -> dict[str, Any]:
    """Return the values of the node `hydra` that never change, by key within it."""
    ours = yaml.safe_load((CONF_DIR / "config.yaml").read_text(encoding="utf-8"))["hydra"]
    job = {**_JOB, **ours.pop("job")}
    logging = {"job_logging": _LOGGING, "hydra_logging": _LOGGING}
    return {**ours, **logging, **{f"job.{name}": value for name, value in job.items()}}


def problems_of_value(key: str, value: Any) -> Iterator[str]:
    """Yield the problems of a value and of what it holds: classes to make, resolvers to call."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            path = f"{key}.{name}".lstrip(".")
            # those of the locked nodes are compared as a whole
            is_ours = key in ("hydra.launcher", NODE, "hydra.callbacks.places")
            if name in _INSTANTIATES and not is_ours:
                yield (
                    f"{shown(path)} would make an object of any class, which settings cannot do; "
                    "leave it out of the command and of settings files"
                )
            yield from problems_of_value(path, inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from problems_of_value(f"{key}[{number}]", inner)
    elif isinstance(value, str) and key in _ADDRESSES and without_password(value) != value:
        yield (
            f"{key} must not hold a password, which every user of this machine could read in the "
            f"list of processes; {_ADDRESSES[key]}"
        )
    elif isinstance(value, str) and not key.startswith("hydra.overrides"):
        yield from (_not_resolved(key, name) for name in resolvers(value) if name not in RESOLVERS)


def _not_resolved(key: str, name: str) -> str:
    if name == "oc.env":
        why = "reads the environment, whose secrets would be recorded with the trials"
    else:
        why = "is none of the functions that settings may call"
    return (
        f"{shown(key)} must be a value or refer to another setting, got ${{{shown(name)}:...}}, "
        f"which {why}; type the value itself"
    )


def resolvers(text: str) -> Iterator[str]:
    """Yield the name of every function that the interpolations in a text call, as it is spelled.

    A name that is computed is yielded as its interpolation.
    """
    begin = text.find("${")
    while begin >= 0:
        depth = 0
        for end in range(begin + 2, len(text)):
            if text[end] == ":" and not depth:
                yield text[begin + 2 : end].strip()
                break
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth < 0:  # a reference to another setting
                break
        begin = text.find("${", begin + 2)


class _Files(FileConfigSource):
    """Settings files of a folder, checked before they are read."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file.

        Raises:
            ConfigError: it is too large, or grows too large when its aliases are replaced.
        """
        file = Path(self.path, self._normalize_file_name(config_path))
        if file.is_file() and not file.is_relative_to(CONF_DIR):
            check_file(file)
        result: ConfigResult = super().load_config(config_path)
        return result


def check_file(file: Path) -> None:
    """Refuse a settings file that would take minutes or gigabytes to read.

    Raises:
        ConfigError: it is too large, or grows too large when its aliases are replaced.
    """
    size = file.stat().st_size
    if size > _MOST_BYTES:
        raise ConfigError(
            [f"a settings file must have at most {_MOST_BYTES} bytes, got {size} in {file}"]
        )
    try:
        # not libyaml, which ends the process where brackets are nested deeply
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        values = _count(root, {})
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = shown(" ".join(str(error).split()), 200)
        raise ConfigError([f"{file} must be a YAML file with settings, got {reason}"]) from None
    if values > _MOST_VALUES:
        raise ConfigError(
            [
                f"a settings file must have at most {_MOST_VALUES} values, got more in {file}, "
                "whose aliases repeat each other; write the values out"
            ]
        )


def _count(node: Any, known: dict[int, int]) -> int:
    """Return the values below a node; those behind an alias count each time."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # of an alias within itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (part if isinstance(part, tuple) else (part,) for part in inner)
        known[id(node)] = 1 + sum(_count(part, known) for pair in pairs for part in pair)
    return known[id(node)]
