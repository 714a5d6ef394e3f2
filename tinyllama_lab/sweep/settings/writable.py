"""Checks that a sweep can write its folders, before Hydra creates the first one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyllama_lab.config import schema as config
from tinyllama_lab.config.schema import HardwareConfig, TrackingConfig
from tinyllama_lab.data import cache
from tinyllama_lab.errors import CacheError, ConfigError, user_errors
from tinyllama_lab.study.files import utf8_problem, write_problem
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.settings.profile import gpu_count
from tinyllama_lab.sweep.tracking.record import (
    database_file,
    default_folder,
    is_in_folder,
    sqlite_file,
    tracking_uri,
)

_SETTINGS = ("sweeps_dir", "study", "tracking", "hardware")


class PlacesCheck(Callback):
    """A Hydra callback that runs after composing and before Hydra creates its own folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check a command without `-m`."""
        _check(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check a command with `-m`; none of these settings can be swept."""
        _check(config)


def _check(composed: DictConfig) -> None:
    try:
        settings = {name: OmegaConf.select(composed, name) for name in _SETTINGS}
        plain: Any = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
    except OmegaConfBaseException:
        return  # Hydra reports the broken interpolation
    with user_errors():
        if problems := list(output_problems(plain, Path.cwd())):
            raise ConfigError(problems)


def output_problems(raw: Mapping[str, Any], workdir: Path) -> Iterator[str]:
    """Yield a problem for each folder that cannot be written to, with the setting to change.

    `raw` holds the settings of `_SETTINGS`. Invalid values are reported by the schema instead.
    """
    if any(config.value_problem(name, raw[name]) for name in ("sweeps_dir", "study")):
        return
    if problem := utf8_problem(str(workdir)):
        yield f"the working folder {problem}"
        return
    # neither HOME nor the password file of the system names a folder
    if os.path.expanduser("~") == "~":
        yield (
            "some libraries need the home folder of the user, and this user has none; set "
            "HOME=/a/folder"
        )
    yield from _problems_of_studies(raw["sweeps_dir"], raw["study"], workdir)
    # the schema reports invalid values
    with suppress(ConfigError):
        yield from _problems_of_tracking(config.part(TrackingConfig, raw["tracking"]), workdir)
        yield from _problems_of_leases(config.part(HardwareConfig, raw["hardware"]))


def _problems_of_studies(sweeps_dir: str, name: str, workdir: Path) -> Iterator[str]:
    study = StudyFolder(workdir / sweeps_dir, name)
    if problem := write_problem(study.root):
        yield (
            f"sweeps_dir must be a folder that can be written to, got {sweeps_dir}: {problem}; "
            "set sweeps_dir=/another/folder"
        )
        return
    for problem in study.problems():
        yield f"{problem}; move it away, or set another study=<name> or sweeps_dir=<folder>"


def _problems_of_tracking(tracking: TrackingConfig, workdir: Path) -> Iterator[str]:
    if not is_in_folder(tracking):
        # a server decides itself where it writes; a SQLite file is written by this process
        file = sqlite_file(tracking_uri(tracking, workdir)) if tracking.enabled else None
        if file is not None and (problem := write_problem((workdir / file).parent)):
            yield (
                f"tracking.uri must name a database that can be written to, got {file}: "
                f"{problem}; set tracking.uri=null, or tracking=none"
            )
        return
    folder = default_folder(tracking, workdir)
    problem = write_problem(folder) or write_problem(folder / "artifacts")
    if not problem and database_file(tracking, workdir).is_dir():
        problem = f"{database_file(tracking, workdir)} is a folder"
    if problem:
        yield (
            "tracking.folder must be a folder that can be written to, got "
            f"{tracking.folder}: {problem}; set tracking.folder=/another/folder, or tracking=none"
        )


def _problems_of_leases(hardware: HardwareConfig) -> Iterator[str]:
    """Yield the problem of a cache without room for the lock files of GPUs."""
    if hardware.device == "cpu" or not gpu_count():
        return
    try:
        cache.check_writable()
    except CacheError as error:
        yield str(error)
