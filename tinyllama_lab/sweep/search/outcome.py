"""The outcome of a search: the best trial or the Pareto front, and parameter importances."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinyllama_lab.config.axes import short_name
from tinyllama_lab.metrics import BITS_PER_BYTE, HELDOUT_LOSS, MAXIMIZE
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.sweep.search.candidates import Proposal
from tinyllama_lab.sweep.search.goals import Goals
from tinyllama_lab.sweep.search.journal import LOG_LINES, count_lines
from tinyllama_lab.sweep.search.space import Space


@dataclass(frozen=True)
class BestTrial:
    """A trial that no other trial dominates."""

    key: str
    label: str
    values: tuple[float, ...]
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a search. `best` is one trial for one objective, else the Pareto front."""

    objectives: tuple[str, ...]
    constraints: tuple[str, ...]
    proposals: int
    states: dict[str, int]  # of the distinct trials
    infeasible: int  # finished trials that broke a constraint
    best: tuple[BestTrial, ...]
    importances: dict[str, float]

    def write(self, study: StudyFolder, command: Sequence[str]) -> None:
        """Write `search.json` for the report; `command` holds the typed overrides."""
        record = {**asdict(self), "lines": self.lines(), "command": list(command)}
        record[LOG_LINES] = count_lines(study)
        study.write_record(study.search_file, record)

    @property
    def has_other_goals(self) -> bool:
        """Whether the search had goals other than the lowest held-out loss."""
        return self.objectives not in ((HELDOUT_LOSS,), (BITS_PER_BYTE,)) or bool(self.constraints)

    def summary(self) -> dict[str, float]:
        """Return the metrics for the study's run in MLflow."""
        metrics = {f"importance/{key}": share for key, share in self.importances.items()}
        if len(self.objectives) == 1 and self.best:
            metrics[f"best/{self.objectives[0]}"] = self.best[0].values[0]
        return metrics

    def lines(self) -> list[str]:
        """Return the outcome as lines of text."""
        lines = [self.headline()]
        if len(self.objectives) == 1 and self.best:
            (best,) = self.best
            lines.append(f"best: {self.objectives[0]} {best.values[0]:.4f} with {best.label}")
        elif self.best:
            lines.append("none of these is beaten in one goal without being worse in another:")
            lines += [f"  {trial.label}: {self._shown(trial)}" for trial in self.best]
        elif self.constraints:
            lines.append(f"no trial kept {' and '.join(self.constraints)}")
        if self.importances:
            shares = [f"{short_name(key)} {part:.0%}" for key, part in self.importances.items()]
            lines.append(f"what mattered for {self.objectives[0]}: {', '.join(shares)}")
        return lines

    def headline(self) -> str:
        """Return the line with the number of trials and their states."""
        states = ", ".join(f"{count} {state}" for state, count in self.states.items())
        trials = sum(self.states.values())
        text = f"search: {trials} trials ({states})"
        if self.proposals > trials:
            text += f"; {self.proposals - trials} proposals repeated a trial and took its result"
        if self.infeasible:
            text += f"; {self.infeasible} broke {' or '.join(self.constraints)}"
        return text

    def _shown(self, trial: BestTrial) -> str:
        pairs = zip(self.objectives, trial.values, strict=True)
        return ", ".join(f"{name} {value:.4f}" for name, value in pairs)


def read_outcome(
    proposals: Sequence[Proposal], importances: dict[str, float], goals: Goals, space: Space
) -> Outcome:
    """Compute the outcome from all proposals of a study."""
    bound = [proposal for proposal in proposals if proposal.key is not None]
    distinct = {proposal.key: proposal for proposal in bound}  # the newest proposal of each trial
    # an attempt that was retried does not count, except for the newest one
    counted = [p for p in bound if not p.is_retryable or p is distinct[p.key]]
    done = [proposal for proposal in distinct.values() if proposal.state == "done"]
    feasible = [proposal for proposal in done if proposal.feasible]
    # so that lower is better for every objective
    signs = [-1.0 if way == MAXIMIZE else 1.0 for way in goals.directions]
    best = [p for p in feasible if not any(_beats(other, p, signs) for other in feasible)]
    # trials with equal values do not dominate each other: report one of them
    if len(signs) == 1:
        best = best[:1]
    return Outcome(
        goals.objectives,
        tuple(map(str, goals.constraints)),
        len(counted),
        dict(Counter(proposal.state for proposal in distinct.values())),
        len(done) - len(feasible),
        tuple(
            BestTrial(str(p.key), space.label(p.params), p.values, p.params)
            for p in sorted(best, key=lambda p: p.values[0] * signs[0])
        ),
        importances,
    )


def _beats(one: Proposal, other: Proposal, signs: Sequence[float]) -> bool:
    """Return whether `one` dominates `other`: nowhere worse, somewhere better."""
    pairs = [(a * s, b * s) for a, b, s in zip(one.values, other.values, signs, strict=True)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
