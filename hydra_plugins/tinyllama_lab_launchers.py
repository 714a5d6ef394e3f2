"""`hydra/launcher=local`, `inline` and others: one driver runs all jobs of a multirun."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from tinyllama_lab.sweep.launchers import LAUNCHERS


class SweepLauncher(Launcher):
    """Hands the whole grid to `run_grid`, which runs only the trials that are missing."""

    def __init__(self, name: str) -> None:
        """Run workers where the launcher of this name does."""
        self.name = name

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store what is needed to compose the jobs; the task function is not used."""
        self._loader = hydra_context.config_loader
        self._config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run all jobs and return their mean held-out losses, NaN for a job without any.

        Raises:
            SystemExit: at least one trial failed.
        """
        # late: Hydra imports its plugins at every start, also for --help
        from tinyllama_lab.errors import user_errors
        from tinyllama_lab.sweep.run import all_ended_well, objective, run_grid
        from tinyllama_lab.sweep.settings.compose import Composer, working_folder

        with user_errors():
            compose = Composer(lambda o: self._loader.load_sweep_config(self._config, o))
            cells = [compose(overrides) for overrides in job_overrides]
            results = run_grid(cells, self.name, working_folder(self._config.hydra))
        if not all_ended_well(results):
            raise SystemExit(1)
        # Hydra expects one value a job, but a job has a trial for each seed and tuned value
        runs = len(results) // len(job_overrides)
        return [
            _returned(list(o), objective(results[n * runs : (n + 1) * runs]))
            for n, o in enumerate(job_overrides)
        ]


def _returned(overrides: list[str], value: float) -> JobReturn:
    # completed even if its trials failed: Hydra raises when a failed job's value is read
    returned = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    returned.return_value = value
    return returned


for _name in LAUNCHERS:
    # a launcher has no settings of its own: those of the machine are in the group `hardware`
    ConfigStore.instance().store(
        group="hydra/launcher",
        name=_name,
        node={"_target_": f"{__name__}.SweepLauncher", "name": _name},
        provider="tinyllama_lab",
    )
