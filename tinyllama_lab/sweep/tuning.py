"""Tunes settings by successive halving, separately for each setting and seed of a grid.

The candidates of one setting and seed form a contest. They train in the same pack, are scored at
the same steps (rungs), and the worse half ends at each rung (Jamieson and Talwalkar, 2016). The
report then chooses one value for all seeds, and scores it on rows and seeds that had no part in
the choice (`tinyllama_lab.report.analysis.cross_fit`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyllama_lab.config.axes import flatten, show, words
from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.events import Event, read_events
from tinyllama_lab.study.pack import StreamSettings
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import Result, State, contest_key
from tinyllama_lab.sweep.plan import Plan, Planned
from tinyllama_lab.sweep.settings.questions import Tune

RUNG_ROWS = 16  # held-out rows that are scored at a rung; the same ones for every candidate


@dataclass
class Contest:
    """The candidates of one setting and seed."""

    kept: list[int]  # number of candidates in each round
    running: dict[str, Planned] = field(default_factory=dict)  # by key
    losses: dict[int, dict[str, float]] = field(default_factory=dict)  # by rung and key
    done: set[str] = field(default_factory=set)

    def judge(self) -> dict[str, tuple[int, str]]:
        """Remove and return the candidates that end now.

        Returns:
            By key, the rung at which the candidate ends and the key of the best candidate there.
        """
        ended: dict[str, tuple[int, str]] = {}
        # in order: the rounds after a rung contain only those that passed it
        for rung, losses in sorted(self.losses.items()):
            reached = [key for key in self.running if key in losses]
            if any(key not in losses and key not in self.done for key in self.running):
                break  # wait until every candidate has reached this rung
            ranked = sorted(reached, key=lambda key: losses[key])
            for rank, key in enumerate(ranked):
                # a diverged candidate ends even if there is room for it
                if rank >= self.kept[rung + 1] or losses[key] == math.inf:
                    ended[key] = rung, ranked[0]
                    del self.running[key]
        return ended


class Tuning:
    """The `TrialSource` that ends candidates. It adds no trials: all are in the plan."""

    left = 0
    is_quiet = True

    def __init__(self, plan: Plan, tune: Tune) -> None:
        """Build the contests of a plan, including the rungs and results of earlier commands."""
        self._tune = tune
        rows = min(plan.config.data.eval_n, RUNG_ROWS)
        # one more than there are: the room that is left tells the scheduler that none will come
        self.stream = StreamSettings(
            max_concurrent=len(plan.todo) + 1, rungs=tune.rungs, rung_rows=rows
        )
        self._contests: dict[str, Contest] = {}
        self._contest_of: dict[str, Contest] = {}  # by the key of a candidate
        for planned in plan.trials:
            name = contest_key(planned.config, tune.values)
            contest = self._contests.setdefault(name, Contest(tune.kept))
            contest.running[planned.trial.key] = planned
            self._contest_of[planned.trial.key] = contest
            for event in read_events(planned.trial.events_file):
                if event["kind"] == "rung":
                    self._note(planned, event)
        for planned in plan.trials:
            if (result := plan.results.get(planned.trial.key)) is not None:
                self.ended(planned, result)
        for contest in self._contests.values():
            self._end(contest)

    def ask(self, room: int) -> list[Planned]:
        """Return no trials: all candidates are in the plan."""
        return []

    def at_rungs(self, reached: Sequence[tuple[Planned, Event]]) -> list[tuple[Planned, str]]:
        """Return the candidates to end, once their whole contest has reached the rung."""
        for planned, event in reached:
            self._note(planned, event)
        touched = [self._contest_of.get(planned.trial.key) for planned, _ in reached]
        contests = {id(contest): contest for contest in touched if contest is not None}
        return [pair for contest in contests.values() for pair in self._judged(contest)]

    def ended(self, planned: Planned, result: Result) -> None:
        """Record the end of a candidate; the others no longer wait for one that failed."""
        contest = self._contest_of.get(planned.trial.key)
        if contest is None:
            return
        if result.state is State.DONE:
            contest.done.add(planned.trial.key)
        else:
            contest.running.pop(planned.trial.key, None)
        self._end(contest)

    def conclude(self) -> dict[str, float]:
        """Return no metrics: the report reads the tuned values from the study."""
        return {}

    def _note(self, planned: Planned, event: Event) -> None:
        rung = int(event["rung"])
        if rung >= len(self.stream.rungs) or len(event["examples"]) > self.stream.rung_rows:
            return  # an earlier search of this study had other rungs
        loss = float(event["values"]["rung/eval_loss"])
        losses = self._contest_of[planned.trial.key].losses.setdefault(rung, {})
        losses[planned.trial.key] = loss if math.isfinite(loss) else math.inf

    def _judged(self, contest: Contest) -> list[tuple[Planned, str]]:
        candidates = dict(contest.running)
        return [
            (
                candidates[key],
                self._reason(contest.losses[rung], candidates[key], candidates[best]),
            )
            for key, (rung, best) in contest.judge().items()
        ]

    def _reason(self, losses: Mapping[str, float], planned: Planned, best: Planned) -> str:
        other = {key: flatten(best.config)[key] for key in self._tune.values}
        return (
            f"tuning: held-out loss {losses[planned.trial.key]:.4f}, against "
            f"{losses[best.trial.key]:.4f} with {words(other)}"
        )

    def _end(self, contest: Contest) -> None:
        for planned, reason in self._judged(contest):
            # a trial that has ended meanwhile keeps its result
            if not planned.trial.result_file.exists():
                planned.trial.prune(reason)


def untuned_note(study: StudyFolder, tuned: Mapping[str, Any]) -> str:
    """Return the note for a command that adds untuned trials to a tuned study."""
    keys = ",".join(tuned["values"])
    return (
        f"note: {study.name} tunes {keys}; trials that are not tuned are not compared with those "
        f"that are: add tune={keys}, or take another study=<name>"
    )


def record(study: StudyFolder, tune: Tune, plan: Plan) -> None:
    """Record for the report which values are tuned, and which trials are candidates.

    Raises:
        StudyError: the study has trials that were tuned over other values or rungs. They had
            other chances, so they cannot be compared.
    """
    values = {key: list(map(show, candidates)) for key, candidates in tune.values.items()}
    # rounded: the shares are compared with those that an earlier command has stored
    before, rungs = study.read_tuned(), [round(share, 6) for share in tune.rungs]
    if before and _differ(before, values, rungs):
        was = _described(before["values"], before["rungs"])
        now = _described(values, rungs)
        raise StudyError(
            f"all settings of a study must be tuned alike: {study.name} has {was}, got {now}; "
            "type the former tune_values and tune_budget, or take another study=<name>"
        )
    # candidates of earlier commands stay, in the order in which they were added
    keys = dict.fromkeys([*before.get("keys", []), *(p.trial.key for p in plan.trials)])
    record = {"values": values, "rungs": rungs, "keys": list(keys)}
    study.write_record(study.tuned_file, record)


def _differ(
    before: Mapping[str, Any], values: Mapping[str, Sequence[str]], rungs: Sequence[float]
) -> bool:
    sorted_before = {key: sorted(candidates) for key, candidates in before["values"].items()}
    sorted_now = {key: sorted(candidates) for key, candidates in values.items()}
    return sorted_before != sorted_now or before["rungs"] != rungs


def _described(values: Mapping[str, Sequence[str]], rungs: Sequence[float]) -> str:
    text = "; ".join(f"{key}={','.join(candidates)}" for key, candidates in values.items())
    shares = ", ".join(f"{share:.0%}" for share in rungs) or "100%"
    return f"{text}, judged after {shares} of the steps"
