"""The settings of a search, from `conf/hydra/sweeper/optuna.yaml`, with their checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from tinyllama_lab.config.validate import build, rule
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.metrics import HELDOUT_LOSS
from tinyllama_lab.study.pack import StreamSettings

SAMPLERS = ("tpe", "random", "grid", "cmaes", "nsgaii")
PRUNERS = ("none", "halving", "hyperband", "median", "wilcoxon")
NODE = "hydra.sweeper"
FEW, MANY = 8, 32  # trials at the same time
_FREE = ("_target_", "params", "when")  # checked elsewhere: they hold settings of trials


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a search proposes trials, how many, and when it prunes one."""

    n_trials: int | None = rule(least=1)
    at_once: int | None = rule(least=1)
    objective: str | list[str]
    direction: str | list[str] | None
    constraints: str | list[str]
    sampler: str = rule(choices=SAMPLERS)
    seed: int = rule(least=0, most=2**31 - 1)
    pruner: str = rule(choices=PRUNERS)
    rungs: list[float]
    rung_rows: int = rule(least=1)
    reduction_factor: int = rule(least=2)
    storage: str | None

    def problems(self) -> Iterator[str]:
        """Yield the settings that contradict each other."""
        if not all(0 < rung < 1 for rung in self.rungs) or self.rungs != sorted(set(self.rungs)):
            yield (
                f"{NODE}.rungs must be rising shares of a trial between 0 and 1, got "
                f"{self.rungs}; for example [0.1,0.3]"
            )
        if self.n_trials is None and self.sampler != "grid":
            yield (
                f"{NODE}.n_trials must be a number with {NODE}.sampler={self.sampler}, got null: "
                "only a grid has a size of its own"
            )
        if self.pruner == "none":
            return
        if not self.rungs:
            yield (
                f"{NODE}.rungs must not be empty with {NODE}.pruner={self.pruner}: a pruner "
                f"compares trials at rungs; set {NODE}.rungs=[0.1,0.3], or {NODE}.pruner=none"
            )
        if self.objectives != [HELDOUT_LOSS]:
            yield (
                f"{NODE}.objective must be {HELDOUT_LOSS} with {NODE}.pruner={self.pruner}, got "
                f"{', '.join(self.objectives)}: nothing else is known at a rung; "
                f"set {NODE}.pruner=none"
            )

    @property
    def objectives(self) -> list[str]:
        """The objectives as a list."""
        return _listed(self.objective)

    @property
    def directions(self) -> list[str]:
        """The directions as a list; empty for the direction of each metric."""
        return _listed(self.direction)

    @property
    def bounds(self) -> list[str]:
        """The constraints as a list of texts."""
        return _listed(self.constraints)

    @property
    def stream(self) -> StreamSettings:
        """The settings that a worker needs."""
        # without a pruner no rung is scored, which saves its time
        rungs = () if self.pruner == "none" else tuple(self.rungs)
        return StreamSettings(self.at_once or self._fitting, rungs, self.rung_rows)

    @property
    def _fitting(self) -> int:
        """The default of `at_once`: few if proposals or pruning depend on finished trials."""
        waits = self.sampler not in ("grid", "random") or self.pruner in ("median", "wilcoxon")
        return FEW if waits else MANY


NAMES = (*(each.name for each in fields(SearchConfig)), "params", "when")


def load_search(node: Mapping[str, Any]) -> SearchConfig:
    """Return the settings in the composed node `hydra.sweeper`.

    Raises:
        ConfigError: with all problems.
    """
    raw = {name: value for name, value in node.items() if name not in _FREE}
    found, problems = build(SearchConfig, raw, SearchConfig, f"{NODE}.")
    if problems:
        raise ConfigError(problems)
    settings: SearchConfig = found
    return settings


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value
