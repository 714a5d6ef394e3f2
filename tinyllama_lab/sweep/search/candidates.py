"""Proposals of Optuna, the trials that they stand for, and proposals without a sampler."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_lab.config.axes import folder_name
from tinyllama_lab.config.resolve import resolved
from tinyllama_lab.config.schema import Config
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.sweep.plan import Plan, Planned, plan_trial
from tinyllama_lab.sweep.search.settings import SearchConfig
from tinyllama_lab.sweep.search.space import Space, Value
from tinyllama_lab.sweep.settings.compose import Cell

Checked = Callable[[Sequence[str]], tuple[Cell, Config]]  # from overrides; raises ConfigError


@dataclass(frozen=True)
class Proposal:
    """A proposal of Optuna by its number, and its state."""

    number: int
    params: dict[str, Value]
    key: str | None = None  # of the trial; None if no trial was made of it
    state: str = "running"
    values: tuple[float, ...] = ()
    is_retryable: bool = False  # failed in a way that a second run may not
    feasible: bool = True  # within all constraints
    rungs: int = 0  # number of rungs in the storage


class TrialFactory:
    """Makes the trials of a study from points of the search space."""

    def __init__(self, plan: Plan, space: Space, checked: Checked) -> None:
        self._plan = plan
        self._space = space
        self._checked = checked

    def planned(self, params: Mapping[str, Value]) -> Planned:
        """Compose, check and label the trial of some parameters.

        Raises:
            ConfigError: the settings contradict each other, or need a file that is missing.
        """
        cell, config = self._checked(self._space.overrides(params))
        settings, swept = resolved(config), self._plan.swept
        trial = self._plan.study.trial(settings, folder_name(settings, swept))
        return plan_trial(cell, settings, trial, swept)

    def is_possible(self, params: Mapping[str, Value]) -> bool:
        """Return whether the parameters make a valid trial."""
        try:
            self.planned(params)
        except ConfigError:
            return False
        return True


def preset_params(
    space: Space,
    settings: SearchConfig,
    kept: Sequence[Proposal],
    to_retry: Sequence[Proposal],
    factory: TrialFactory,
) -> Iterator[dict[str, Value]]:
    """Yield the parameters that need no sampler: those to retry, then the cells of a grid.

    Args:
        space: the settings to search.
        settings: the settings of the search.
        kept: proposals of earlier commands that count; they are not proposed again.
        to_retry: proposals of earlier commands that failed.
        factory: makes the trials; impossible cells of a grid are left out.
    """
    # compared as text: dictionaries cannot be in a set
    seen = {_spell(proposal.params) for proposal in kept}
    for proposal in to_retry:
        if _spell(proposal.params) not in seen:
            seen.add(_spell(proposal.params))
            yield proposal.params
    if settings.sampler != "grid":
        return
    cells = list(space.cells())
    random.Random(settings.seed).shuffle(cells)  # so that a pack mixes ranks and values
    for params in cells:
        if _spell(params) not in seen and factory.is_possible(params):
            yield params


def _spell(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)
