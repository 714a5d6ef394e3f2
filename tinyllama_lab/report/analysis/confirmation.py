"""The recommended setting and its rivals on rows that no choice has seen, with fresh seeds.

The held-out rows chose a setting, so they flatter it. The confirmation trials of a study repeat
the recommended setting, the best one and the cheapest rival. They are compared with each other
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tinyllama_lab.report.analysis.comparison import (
    SEED,
    Comparison,
    Scored,
    cell_of,
    in_bits,
    make_comparison,
    paired,
)
from tinyllama_lab.report.analysis.costs import noises
from tinyllama_lab.report.analysis.luck import seed_spread
from tinyllama_lab.report.analysis.ranking import RankedCell, chosen_of, is_cheaper, price
from tinyllama_lab.report.analysis.statistics import ALPHA, Estimate, Luck
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.trial import EVAL, canonical_json

BETTER, CLOSE, NOTHING = "better", "close", ""  # what the held-out rows showed of a pair


@dataclass(frozen=True)
class RivalPair:
    """The recommended setting and a rival: what they cost, and what the held-out rows showed."""

    chosen: RankedCell
    rival: RankedCell
    rival_is_cheaper: bool

    @property
    def names(self) -> tuple[str, str]:
        """What a sentence calls the recommended setting and the rival."""
        return self.chosen.beside(self.chosen), self.rival.beside(self.chosen)

    @property
    def claim(self) -> str:
        """What the held-out rows showed; they test every setting against the best one only."""
        if self.chosen.is_best:
            return BETTER if self.rival.p_worse < ALPHA else NOTHING
        return CLOSE if self.rival.is_best and self.chosen.is_within_margin else NOTHING

    def distance(self, difference: float, margin: float) -> float:
        """Return how far the interval may reach from the difference for the choice to be settled.

        A cheaper rival of which nothing was shown is settled if it is within the margin, or worse;
        any other one if it is not better by the margin (at all, if it was shown to be worse).

        Args:
            difference: the loss of the recommended setting minus that of the rival.
            margin: in the same unit.
        """
        if self.claim == BETTER:
            return -difference
        if self.rival_is_cheaper:
            return difference + margin if difference > -margin else -difference
        return margin - difference


@dataclass(frozen=True)
class RivalResult:
    """A rival on the confirmation rows, next to the recommended setting on the same seeds.

    Attributes:
        pair: the two settings on the held-out rows.
        trials: confirmation trials of the rival, in the order of seeds.
        estimate: the loss of the recommended setting minus that of the rival; None without trials.
        lost: runs of the rival that ended without a score.
    """

    pair: RivalPair
    trials: list[Scored] = field(default_factory=list)
    estimate: Estimate | None = None
    lost: int = 0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference; unbounded without trials."""
        return self.estimate.interval() if self.estimate else (-np.inf, np.inf)

    def is_settled(self, margin: float) -> bool:
        """Whether these rows leave no choice between the two settings."""
        low, high = self.interval
        if self.pair.claim == BETTER:
            return high < 0
        if self.pair.rival_is_cheaper:
            return low > -margin or high < 0
        return high < margin

    def overturns(self, margin: float) -> bool:
        """Whether the rival is taken instead.

        A dearer one must be shown to be better, and by more than the margin if the held-out rows
        showed the reverse. A cheaper one of which they showed nothing must be within the margin.
        """
        low, high = self.interval
        if self.lost or self.estimate is None:
            return False
        if self.pair.rival_is_cheaper:
            return low > (0.0 if self.pair.claim else -margin)
        return low > margin if self.pair.claim else low > 0 and high >= margin

    def outcome(self, margin: float, within: str) -> str:
        """Return what these rows say of the two settings.

        Args:
            margin: in the unit of the estimate.
            within: the margin in words.
        """
        this, other = self.pair.names
        low, high = self.interval
        if self.lost:
            runs = counted(self.lost + len(self.trials), "fresh run")
            return f"{self.lost} of {runs} of {other} ended without a score"
        if self.estimate is None:
            return f"no fresh run of {other} has a result"
        if not self.pair.claim:
            return self._shown(margin, within)
        claimed, bound = f"{this} is better than {other}", 0.0
        if self.pair.claim == CLOSE:
            claimed, bound = f"{this} is not worse than {other} by more than {within}", margin
        if high < bound:
            return f"these rows confirm that {claimed}"
        if low > bound:
            return f"doubtful: the held-out rows showed that {claimed}, these rows the reverse"
        return f"these rows neither confirm nor contradict that {claimed}"

    def _shown(self, margin: float, within: str) -> str:
        this, other = self.pair.names
        low, high = self.interval
        if -margin < low and high < margin:
            return f"these rows show that {this} and {other} differ by less than {within}"
        if high < 0:
            return f"these rows show that {this} is better than {other}"
        if high < margin and not self.pair.rival_is_cheaper:
            return f"these rows show that {this} is not worse than {other} by more than {within}"
        return f"these rows cannot tell {this} and {other} apart either"


@dataclass(frozen=True)
class Confirmation:
    """What fresh seeds on other rows say of the recommended setting and its rivals."""

    chosen: RankedCell
    trials: list[Scored]  # of the recommended setting, in the order of seeds
    lost: int  # its runs that ended without a score
    rivals: list[RivalResult]
    problem: str = ""  # why trials that have ended are not compared

    @property
    def loss(self) -> float:
        """The mean loss of the recommended setting over its fresh seeds."""
        return mean_loss(self.trials)


def mean_loss(trials: Sequence[Scored]) -> float:
    return float(np.mean([trial.loss for trial in trials]))


def cells_to_confirm(cells: Sequence[RankedCell], cost: str) -> list[RankedCell]:
    """Return the recommended setting, the best and the cheapest rival; empty without a choice.

    If no other setting is as good, the rival is the second best.
    """
    chosen = chosen_of(cells)
    if chosen is None or len(cells) < 2:
        return []
    rivals = [cell for cell in cells if cell.is_good_enough and cell is not chosen]
    cheapest = sorted(rivals, key=lambda cell: price(cell, cost))[:1] or cells[1:2]
    return list(dict.fromkeys([chosen, *(cell for cell in cells if cell.is_best), *cheapest]))


def rival_pairs(comparison: Comparison, cells: Sequence[RankedCell], cost: str) -> list[RivalPair]:
    """Return the recommended setting with each of its rivals that a confirmation trains."""
    if not (asked := cells_to_confirm(cells, cost)):
        return []
    chosen, *rivals = asked
    same = noises(comparison)[cost].ratio(len(chosen.trials))
    return [RivalPair(chosen, rival, is_cheaper(rival, chosen, cost, same)) for rival in rivals]


def make_confirmation(
    comparison: Comparison, cells: Sequence[RankedCell], rows: Sequence[TrialRow], cost: str
) -> Confirmation | None:
    """Return the recommended setting and its rivals on the confirmation rows; None without rivals.

    Args:
        comparison: the trials that are compared on the held-out rows.
        cells: their settings, one of them chosen.
        rows: the confirmation trials, as in `StudyRows.confirmation`.
        cost: what the choice saves, a name in `COSTS`.
    """
    pairs = rival_pairs(comparison, cells, cost)
    if not pairs:
        return None
    chosen = pairs[0].chosen
    fresh = _fresh(comparison, rows)
    trials, problem = _compared(comparison, fresh)
    ours = _of(chosen, trials)
    # the tuned values were fixed before these trials, so the choice adds no variance here
    spread = replace(seed_spread(comparison), choice={})
    rivals = []
    for pair in pairs:
        theirs, lost = _of(pair.rival, trials), _lost(pair.rival, fresh)
        if not (seeds := sorted(ours.keys() & theirs.keys())):
            rivals.append(RivalResult(pair, lost=lost))
            continue
        names = [[cell_of(c.trials[0].row, comparison.keys)] for c in (pair.rival, chosen)]
        first, second = ([of[seed] for seed in seeds] for of in (ours, theirs))
        luck = with_own(spread.luck(names[0], names[1], len(seeds)), first, second)
        rivals.append(RivalResult(pair, second, paired(first, second, luck), lost))
    every = [ours[seed] for seed in sorted(ours)]
    return Confirmation(chosen, every, _lost(chosen, fresh), rivals, "" if every else problem)


def _compared(comparison: Comparison, fresh: Sequence[TrialRow]) -> tuple[list[Scored], str]:
    """Return the fresh trials in the measure of the held-out rows, or why there are none."""
    compared = make_comparison(fresh)
    trials = compared.trials
    if trials and trials[0].measure.metric != comparison.measure.metric:
        has_bytes = all(trial.bytes is not None for trial in trials)
        trials = in_bits(trials) if has_bytes and trials[0].measure.is_per_token else []
    ended = any(row.is_done for row in fresh)
    return trials, next(iter(compared.left_out), "other tokens") if ended and not trials else ""


def with_own(luck: Luck, ours: Sequence[Scored], theirs: Sequence[Scored]) -> Luck:
    """Pool the luck that the study knows with what the fresh seeds show of it themselves."""
    seeds = len(ours)
    if seeds < 2:
        return replace(luck, known=luck.freedom)
    differences = [mine.loss - other.loss for mine, other in zip(ours, theirs, strict=True)]
    freedom = luck.freedom + seeds - 1
    pooled = luck.freedom * luck.variance + (seeds - 1) * float(np.var(differences, ddof=1))
    return replace(luck, variance=pooled / freedom, freedom=freedom, known=luck.freedom)


def _fresh(comparison: Comparison, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the confirmation trials with a seed that no trial of the comparison has."""
    seen = {trial.seed for trial in comparison.trials}
    questions = {question(trial.row) for trial in comparison.trials}
    return [
        row for row in rows if row.settings.get(SEED) not in seen and question(row) in questions
    ]


def _lost(cell: RankedCell, fresh: Sequence[TrialRow]) -> int:
    """Count the confirmation runs of a setting that ended without a score."""
    questions = {question(trial.row) for trial in cell.trials}
    return sum(
        row.result is not None and not row.is_done and question(row) in questions for row in fresh
    )


def question(row: TrialRow) -> str:
    """Return a key that is equal for trials that differ only in seed and evaluation."""
    trained = {k: v for k, v in row.settings.items() if not k.startswith(f"{EVAL}.")}
    return canonical_json({**trained, SEED: None})


def _of(cell: RankedCell, trials: Sequence[Scored]) -> dict[int, Scored]:
    """Return the confirmation trials of a setting, by seed."""
    questions = {question(trial.row) for trial in cell.trials}
    return {trial.seed: trial for trial in trials if question(trial.row) in questions}
