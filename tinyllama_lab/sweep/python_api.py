"""`run_sweep` of the Python API: runs `python -m tinyllama_lab -m ...` inside this process.

It composes the command as Hydra's multirun does, so that both give trials the same keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyllama_lab.config import CONF_DIR
from tinyllama_lab.config.command import setting
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.report.loaded_study import Study, load_study
from tinyllama_lab.study.files import user_path
from tinyllama_lab.sweep import run as grid
from tinyllama_lab.sweep.check import check_command
from tinyllama_lab.sweep.search import run as search
from tinyllama_lab.sweep.settings.compose import Composer, register_resolvers
from tinyllama_lab.sweep.settings.typed_paths import quote_paths
from tinyllama_lab.sweep.settings.writable import output_problems


def run_sweep(
    overrides: Sequence[str] = (),
    *,
    study: str | None = None,
    sweeps_dir: str | Path | None = None,
) -> Study:
    """Run the missing trials of a grid or a search, and return its study.

    A failed trial raises no exception; its `state` and `error` report the failure.

    Args:
        overrides: settings as on the command line, such as `["lora.r=8,16", "data.n=64"]`.
        study: the same as `study=<name>` in `overrides`.
        sweeps_dir: the same as `sweeps_dir=<folder>`; relative to the working folder.

    Raises:
        LabError: the settings are wrong, or the study cannot be used; nothing was started.
        KeyboardInterrupt: the user stopped it; the same call continues.
    """
    workdir = Path.cwd()
    folder = None if sweeps_dir is None else user_path(str(sweeps_dir))
    arguments = {"study": study, "sweeps_dir": folder}
    short = [setting(key, str(value)) for key, value in arguments.items() if value is not None]
    command = quote_paths([*_checked(overrides), *short])
    with _own_hydra():
        # like -m, and like the run mode that `_compose` asks Hydra for
        check_command(["-m", *command])
        register_resolvers()
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = _compose(command)
            _run(composed, workdir)
    # read again from disk, which also has the trials of earlier calls
    return load_study(composed.study, workdir / composed.sweeps_dir)


def _checked(overrides: Sequence[str]) -> list[str]:
    """Return the overrides as a list.

    Raises:
        ConfigError: they are a single string, or contain an option of the command line.
    """
    if isinstance(overrides, str):
        raise ConfigError(
            [f"overrides must be a list of strings, got {overrides!r}; type [{overrides!r}]"]
        )
    wrong = [text for text in overrides if text.startswith("-")]
    if problems := [f"{text!r} is not of the form key=value; leave it out" for text in wrong]:
        raise ConfigError(problems)
    return list(overrides)


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Put aside the global Hydra that a notebook or another app has initialized."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        if before is not None:
            GlobalHydra.instance().initialize(before)


def _compose(command: list[str]) -> DictConfig:
    """Compose the settings that all trials of the command share, including the node `hydra`."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    try:
        return hydra.compose_config("config", command, RunMode.MULTIRUN, from_shell=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([" ".join(str(error).split())]) from error


def _run(composed: DictConfig, workdir: Path) -> None:
    """Hand the command to the driver, as the launcher and sweeper plugins do."""
    plain: Any = {
        name: OmegaConf.to_container(OmegaConf.select(composed, name), resolve=True)
        for name in ("tracking", "hardware", "hydra.sweeper")
    }
    common = {"study": composed.study, "sweeps_dir": composed.sweeps_dir, **plain}
    # on the command line a Hydra callback checks this, but composing alone calls none
    if problems := list(output_problems(common, workdir)):
        raise ConfigError(problems)
    loader = GlobalHydra.instance().config_loader()
    compose = Composer(lambda overrides: loader.load_sweep_config(composed, overrides))
    choices, typed = composed.hydra.runtime.choices, composed.hydra.overrides
    launcher, task = str(choices["hydra/launcher"]), list(typed.task)
    sweeper = plain["hydra.sweeper"]
    if choices["hydra/sweeper"] == "optuna":
        # Hydra adds its mode to the overrides, although nobody typed it
        hydra_overrides = [text for text in typed.hydra if "hydra.mode" not in text]
        search.run_search(task, sweeper, compose, launcher, workdir, hydra_overrides)
        return
    params = [f"{key}={value}" for key, value in (sweeper["params"] or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*params, *task])
    # Hydra's own expansion, so that the order of trials is that of the command line
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    grid.run_grid([compose(overrides) for overrides in jobs], launcher, workdir)
