"""`hydra/sweeper=basic` and `optuna`: grids and searches, whose trials run under one driver."""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.tinyllama_lab_launchers import SweepLauncher


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper, which expands a grid, without its check of every cell.

    Hydra would compose each of them, in a tenth of a second. Our launcher composes them all much
    faster, and reports the problems of all of them.
    """

    def validate_batch_is_legal(self, batch: Any) -> None:
        """Leave the check to our launcher; programs with another one keep Hydra's."""
        if not isinstance(self.launcher, SweepLauncher):
            super().validate_batch_is_legal(batch)


class OptunaSweeper(Sweeper):
    """Hands the command to `run_search`; `conf/hydra/sweeper/optuna.yaml` holds its settings."""

    def __init__(self, **settings: Any) -> None:
        """Ignore `settings`, which Hydra passes one by one: `sweep` reads them from the node."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store what is needed to compose trials; the task function is not used."""
        self._loader = hydra_context.config_loader
        self._config = config

    def sweep(self, arguments: list[str]) -> Any:
        """Run the search and return its best trials.

        Raises:
            SystemExit: no trial has the objectives within the constraints.
        """
        # late: Hydra imports its plugins at every start, also for --help
        from tinyllama_lab.errors import user_errors
        from tinyllama_lab.sweep.search.run import run_search
        from tinyllama_lab.sweep.settings.compose import Composer, working_folder

        node: Any = OmegaConf.to_container(self._config.hydra.sweeper, resolve=True)
        launcher = str(self._config.hydra.runtime.choices["hydra/launcher"])
        compose = Composer(lambda o: self._loader.load_sweep_config(self._config, o))
        workdir = working_folder(self._config.hydra)
        # Hydra adds its mode to the overrides, although nobody typed it
        hydra_overrides = [o for o in self._config.hydra.overrides.hydra if "hydra.mode" not in o]
        with user_errors():
            outcome = run_search(arguments, node, compose, launcher, workdir, hydra_overrides)
        if not outcome.best:
            raise SystemExit(1)
        return outcome.best


# in place of Hydra's own
ConfigStore.instance().store(
    group="hydra/sweeper",
    name="basic",
    node=BasicSweeperConf(_target_=f"{__name__}.GridSweeper"),
    provider="tinyllama_lab",
)
