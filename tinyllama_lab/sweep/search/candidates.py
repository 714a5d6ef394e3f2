"""What Optuna proposed, the trial made of it, and the proposals that need no sampler."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_lab.config.axes import folder_name
from tinyllama_lab.config.schema import Config, resolved
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.sweep.plan import Plan, Planned, plan_trial
from tinyllama_lab.sweep.search.settings import SearchConfig
from tinyllama_lab.sweep.search.space import Space, Value
from tinyllama_lab.sweep.settings.compose import Cell

Checked = Callable[[Sequence[str]], tuple[Cell, Config]]  # from what one types; or ConfigError


@dataclass(frozen=True)
class Proposal:
    """What Optuna proposed under a number, and what became of it."""

    number: int
    params: dict[str, Value]
    key: str | None = None  # of the trial; None where it was never one
    state: str = "running"
    values: tuple[float, ...] = ()
    is_retryable: bool = False  # failed for a reason that may go away
    feasible: bool = True  # it keeps all constraints
    rungs: int = 0  # reported so far


class TrialFactory:
    """Makes the trials of a study from values in a space."""

    def __init__(self, plan: Plan, space: Space, checked: Checked) -> None:
        self._plan = plan
        self._space = space
        self._checked = checked

    def planned(self, params: Mapping[str, Value]) -> Planned:
        """Compose, check and name a trial.

        Raises:
            ConfigError: its settings contradict each other, or ask for what is not there.
        """
        cell, found = self._checked(self._space.overrides(params))
        settings, swept = resolved(found), self._plan.swept
        trial = self._plan.study.trial(settings, folder_name(settings, swept))
        return plan_trial(cell, settings, trial, swept)

    def is_possible(self, params: Mapping[str, Value]) -> bool:
        """Whether there can be such a trial."""
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
    """Yields what is proposed before the sampler: `to_retry`, then a grid without `kept`."""
    seen = {_spell(proposal.params) for proposal in kept}
    for proposal in to_retry:
        if _spell(proposal.params) not in seen:
            seen.add(_spell(proposal.params))
            yield proposal.params
    if settings.sampler != "grid":
        return
    cells = list(space.cells())
    random.Random(settings.seed).shuffle(cells)  # so that no pack is all of one rank
    for params in cells:
        if _spell(params) not in seen and factory.is_possible(params):
            yield params


def _spell(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)
