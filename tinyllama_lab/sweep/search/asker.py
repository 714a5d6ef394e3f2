"""Turns proposals into trials: asks, answers from results, ends who falls behind, resumes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tinyllama_lab.config import Config, resolved
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.events import Event, read_events
from tinyllama_lab.sweep.compose import Cell
from tinyllama_lab.sweep.plan import RETRIED, Plan, Planned, folder_name, is_again, plan_trial
from tinyllama_lab.sweep.search.goals import Goals
from tinyllama_lab.sweep.search.outcome import Outcome, read_outcome
from tinyllama_lab.sweep.search.sampling import Proposal, Sampling
from tinyllama_lab.sweep.search.settings import SearchConfig
from tinyllama_lab.sweep.search.space import Space, Value
from tinyllama_lab.trial import Result, trial_key

MOST_REFUSED = 100  # proposals in a row that are no possible trial


class Asker:
    """The source of a search's trials; see `Source`."""

    def __init__(
        self,
        plan: Plan,
        space: Space,
        goals: Goals,
        sampling: Sampling,
        settings: SearchConfig,
        checked: Callable[[Sequence[str]], tuple[Cell, Config]],
    ) -> None:
        """`checked` composes a trial from what one would type, or raises ConfigError."""
        self.race = settings.race
        self.repeated = 0  # proposals that were answered from a result
        self._plan = plan
        self._space = space
        self._goals = goals
        self._sampling = sampling
        self._settings = settings
        self._checked = checked
        self._open: dict[str, list[int]] = {}  # by key, the numbers of proposals that wait for it
        self._waiting: list[Planned] = []  # begun by an earlier command
        self._asked = 0
        self._refused = 0  # in a row
        self._ended = False
        self._chosen = self._choices(self._resume())

    @property
    def left(self) -> int:
        """Proposals that are still to come, as far as that is known."""
        if self._ended:
            return len(self._waiting)
        total = self._settings.n_trials
        if self._settings.sampler == "grid":
            size = sum(1 for _ in self._space.cells())
            total = size if total is None else min(total, size)
        return len(self._waiting) + max(0, (total or 0) - self._asked)

    def ask(self, room: int) -> list[Planned]:
        """At most `room` more trials; fewer only where no more will come.

        Raises:
            ConfigError: proposals are never possible trials.
        """
        found, self._waiting = self._waiting[:room], self._waiting[room:]
        while len(found) < room and not self._is_over():
            planned = self._propose()
            if planned is not None:
                self._plan.trials.append(planned)
                found.append(planned)
        return found

    def at_rungs(self, reached: Sequence[tuple[Planned, Event]]) -> list[tuple[Planned, str]]:
        """All are reported before any is judged, so that those who come together are ranked."""
        numbers = {
            planned.trial.key: self._open.get(planned.trial.key, []) for planned, _ in reached
        }
        for planned, event in reached:
            for number in numbers[planned.trial.key]:
                self._sampling.report(number, event["rung"], _loss(event), event["examples"])
        return [
            (planned, self._reason(event))
            for planned, event in reached
            if any(self._sampling.gives_up(number) for number in numbers[planned.trial.key])
        ]

    def ended(self, planned: Planned, result: Result) -> None:
        """Tell Optuna; without a base, nothing more is worth asking."""
        self._ended = self._ended or _class(result) == "no_base"
        for number in self._open.pop(planned.trial.key, []):
            self._tell(number, result)

    def conclude(self) -> dict[str, float]:
        """Write the outcome so far."""
        self.outcome().write(self._plan.study)
        return self.outcome().summary()

    def outcome(self) -> Outcome:
        """What the search came to so far."""
        importances = self._sampling.importances()
        return read_outcome(self._sampling.proposals(), importances, self._goals, self._space)

    def _is_over(self) -> bool:
        total = self._settings.n_trials
        return self._ended or (total is not None and self._asked >= total)

    def _propose(self) -> Planned | None:
        """The next trial to train; None where a proposal needs no training, or none is left."""
        params = next(self._chosen, None)
        if params is None and self._settings.sampler == "grid":
            self._ended = True
            return None
        proposal = self._sampling.ask(params)
        planned = self._possible(proposal)
        if planned is None:
            return None
        key = planned.trial.key
        self._sampling.bind(proposal, key)
        self._asked += 1
        if key in self._open:
            self._open[key].append(proposal.number)
            self.repeated += 1
            return None
        result = self._plan.results.get(key) or planned.trial.read_result()[0]
        if result is not None and not is_again(result, self._plan.config.retry):
            self._plan.results[key] = result
            self._tell(proposal.number, result)
            self.repeated += 1
            return None
        self._open[key] = [proposal.number]
        return planned

    def _possible(self, proposal: Proposal) -> Planned | None:
        """The trial of a proposal; None where its settings contradict each other."""
        try:
            planned = self._planned(proposal.params)
        except ConfigError as error:
            self._sampling.tell(proposal.number, "failed", {}, False)
            self._refused += 1
            if self._refused > MOST_REFUSED:
                raise
            self._plan.notes.append(f"{self._space.label(proposal.params)}: {error.problems[0]}")
            return None
        self._refused = 0
        return planned

    def _planned(self, params: Mapping[str, Value]) -> Planned:
        """Compose, check and name a trial.

        Raises:
            ConfigError: its settings contradict each other, or ask for what is not there.
        """
        cell, found = self._checked(self._space.overrides(params))
        settings = resolved(found)
        swept = self._plan.swept
        trial = self._plan.study.trial(trial_key(settings), folder_name(settings, swept))
        return plan_trial(cell, settings, trial, swept)

    def _resume(self) -> list[Proposal]:
        """Take up what earlier commands left; returns all their proposals that are trials."""
        kept = []
        for proposal in self._sampling.proposals():
            if proposal.key is None:
                if proposal.state == "running":  # its driver was killed before it was a trial
                    self._sampling.tell(proposal.number, "failed", {}, False)
                continue
            if proposal.again and self._plan.config.retry != "none":
                continue  # it is proposed anew
            kept.append(proposal)
            self._asked += 1
            self._take_up(proposal)
        return kept

    def _take_up(self, proposal: Proposal) -> None:
        """Go on with a proposal that an earlier command bound to a trial."""
        planned = self._planned(proposal.params)
        key = planned.trial.key
        if all(key != other.trial.key for other in self._plan.trials):
            self._plan.trials.append(planned)
        result = planned.trial.read_result()[0]
        if result is not None:
            self._plan.results[key] = result
        for event in read_events(planned.trial.events_file):
            if event["kind"] == "rung":
                rung = event["rung"]
                self._sampling.replay(proposal.number, rung, _loss(event), event["examples"])
        if proposal.state != "running":
            self._sampling.settle(proposal.number, proposal.state, proposal.values)
            return
        if result is not None:
            self._tell(proposal.number, result)
        elif key in self._open:
            self._open[key].append(proposal.number)
        else:
            self._open[key] = [proposal.number]
            self._waiting.append(planned)

    def _choices(self, kept: Sequence[Proposal]) -> Iterator[dict[str, Value]]:
        """What is proposed before the sampler is asked: failures to repeat, and a whole grid."""
        seen = {_spell(proposal.params) for proposal in kept}
        if self._plan.config.retry != "none":
            for proposal in self._sampling.proposals():
                if proposal.again and _spell(proposal.params) not in seen:
                    seen.add(_spell(proposal.params))
                    yield proposal.params
        if self._settings.sampler != "grid":
            return
        cells = list(self._space.cells())
        random.Random(self._settings.seed).shuffle(cells)  # a pack then holds no one's neighbours
        for params in cells:
            if _spell(params) not in seen and self._is_possible(params):
                yield params

    def _is_possible(self, params: Mapping[str, Value]) -> bool:
        try:
            self._planned(params)
        except ConfigError:
            return False
        return True

    def _tell(self, number: int, result: Result) -> None:
        again = _class(result) in RETRIED
        self._sampling.tell(number, str(result.state), result.metrics, again)

    def _reason(self, event: Event) -> str:
        name = self._settings.pruner
        return f"{name}: held-out loss {_loss(event):.4f} at step {event['step']} is behind"


def _loss(event: Event) -> float:
    return float(event["values"]["rung/eval_loss"])


def _class(result: Result) -> str:
    return (result.error or {}).get("class", "")


def _spell(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)
