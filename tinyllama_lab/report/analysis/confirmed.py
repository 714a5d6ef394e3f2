"""The recommendation on rows that no choice has seen, from trials with seeds of their own.

The held-out rows choose a setting and so flatter it. The confirmation trials of a study repeat
the recommended setting, the best and the cheapest rival; they are compared with each other alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinyllama_lab.report.analysis.comparable import (
    SEED,
    Comparable,
    Scored,
    cell_of,
    comparable,
    paired,
)
from tinyllama_lab.report.analysis.luck import seed_spread
from tinyllama_lab.report.analysis.recommend import Candidate, price_words, sentences
from tinyllama_lab.report.analysis.settings import Settings
from tinyllama_lab.report.analysis.statistics import Estimate
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.analysis.tuned import untuned_words
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.trial import EVAL, canonical_json

MOST_SEEDS = 100  # that anybody would confirm with
UNFINISHED = "Provisional: the trials that would confirm it against another have no result."
PROVISIONAL = "Provisional: not yet confirmed on rows and seeds that had no part in the choice."


@dataclass(frozen=True)
class Confirmed:
    """A setting on the confirmation rows. The estimate is of the recommended one minus it."""

    cell: Candidate  # as the held-out rows have it
    trials: list[Scored]  # by seed
    estimate: Estimate | None = None  # None for the recommended one itself

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return float(np.mean([trial.loss for trial in self.trials]))

    def is_better_by(self, margin: float) -> bool:
        """Whether it was shown to be better than the recommended one by more than the margin."""
        least = self.trials[0].measure.margin(margin)
        return self.estimate is not None and self.estimate.interval()[0] > least

    def claim(self, margin: float) -> str:
        """What the held-out rows said of the recommended setting beside this one."""
        measure = self.trials[0].measure
        if not self.cell.is_good_enough:
            return f"better than {self.cell.label}"
        within = f"{measure.margin(margin):g} {measure.unit}"
        return f"as good as {self.cell.label}, within {within}"

    def is_held(self, margin: float) -> bool:
        """Whether what the held-out rows said of it was shown on these rows as well.

        That the recommended setting is better; or, where it was as good as this one, that it is
        not worse by more than the margin.
        """
        if self.estimate is None:
            return True
        return self.estimate.interval()[1] < self.bound(margin)

    def bound(self, margin: float) -> float:
        """What the difference must be below."""
        return self.trials[0].measure.margin(margin) if self.cell.is_good_enough else 0.0


def recommendation(
    found: Comparable, cells: Sequence[Candidate], rows: Sequence[TrialRow], settings: Settings
) -> tuple[list[Candidate], list[str]]:
    """The settings, the one to take chosen, and the recommendation in sentences.

    Args:
        found: the trials that are compared.
        cells: their settings, one chosen by the held-out rows.
        rows: the confirmation trials, as in `StudyRows.confirmation`.
        settings: how the trials are judged.
    """
    has_choice = len(cells) > 1 and any(cell.is_chosen for cell in cells)
    every = confirmed(found, cells, rows) if has_choice else []
    told = sentences(cells, settings.cost, settings.margin, is_confirmed=len(every) > 1)
    if not has_choice:
        return list(cells), told
    if len(every) < 2:
        words = UNFINISHED if every else PROVISIONAL
        return list(cells), [*told[:-1], f"{told[-1]} {words}"]
    on = f"{counted(len(every[0].trials[0].losses), 'other row')} with "
    on += f"{counted(len(every[0].trials), 'fresh seed')}, which had no part in the choice"
    better = [each for each in every if each.is_better_by(settings.margin)]
    if better:
        winner = min(better, key=lambda each: each.loss)
        taken = [replace(cell, is_chosen=cell is winner.cell) for cell in cells]
        contradicted = _contradicted(every[0], winner, on, settings.margin)
        contradicted[-1] += price_words(taken, winner.cell, settings.cost)
        return taken, [*contradicted, *_untuned(cells)]
    outcome = _outcome(every, on, settings.margin)
    return list(cells), [*told[:-1], f"{told[-1]} {outcome}"]


def _untuned(cells: Sequence[Candidate]) -> list[str]:
    words = untuned_words([trial.row for cell in cells for trial in cell.trials])
    return [f"How sure: {words}."] if words else []


def _outcome(every: Sequence[Confirmed], on: str, margin: float) -> str:
    """What the confirmation says of the recommendation."""
    recommended, *rivals = every
    open_ones = [rival for rival in rivals if not rival.is_held(margin)]
    claims = " and ".join(rival.claim(margin) for rival in open_ones or rivals)
    claimed = f"{recommended.cell.label} is {claims}"
    if not open_ones:
        return f"Confirmed on {on}: {claimed}. {_listed(every)}."
    if any(rival.is_better_by(0.0) for rival in rivals):
        return f"Doubtful on {on}: that {claimed}. {_listed(every)}."
    them = "the two" if len(every) == 2 else "they"
    return (
        f"Neither confirmed nor contradicted on {on}: that {claimed}. {_listed(every)}. Chance "
        "alone may be the reason where an interval reaches from lower to higher, which does not "
        f"mean that {them} are equally good{_more_seeds(open_ones, margin)}."
    )


def _more_seeds(open_ones: Sequence[Confirmed], margin: float) -> str:
    """How many seeds would show on these rows what the held-out rows showed, if all stays so."""
    asked = 0
    for rival in open_ones:
        assert rival.estimate is not None
        size = rival.bound(margin) - rival.estimate.difference
        if size <= 0:  # more of the same would not confirm it
            return ""
        seeds = rival.estimate.seeds_needed(size)
        asked = max(asked, seeds or MOST_SEEDS + 1)
    if asked > MOST_SEEDS:
        return "; if the difference stays so, these rows are too few to tell"
    return f"; if the difference stays so, the same command with confirm={asked} would tell"


def _contradicted(recommended: Confirmed, winner: Confirmed, on: str, margin: float) -> list[str]:
    measure = winner.trials[0].measure
    return [
        f"Take {winner.cell.label}.",
        f"Why: the confirmation contradicts the held-out rows, which recommend "
        f"{recommended.cell.label}. On {on}, {winner.cell.label} is better by more than "
        f"{measure.margin(margin):g} {measure.unit}. {_listed([recommended, winner])}. The "
        "answers below are those of the held-out rows.",
    ]


def _listed(every: Sequence[Confirmed]) -> str:
    """The loss of each, the recommended one first, and how far that is from its rivals."""
    recommended, *rivals = every
    words = []
    for rival in rivals:
        assert rival.estimate is not None
        measure, estimate = rival.trials[0].measure, rival.estimate
        than = f"{measure.change(estimate.difference)} than {rival.cell.label}"
        words.append(f"{than} ({measure.interval_words(estimate)})")
    loss = f"There, the loss of {recommended.cell.label} is {recommended.loss:.3f}"
    return f"{loss}, {' and '.join(words)}"


def confirmed(
    found: Comparable, cells: Sequence[Candidate], rows: Sequence[TrialRow]
) -> list[Confirmed]:
    """The recommended setting and its rivals on the confirmation rows, on the same seeds.

    Empty where the recommended one has no trial there.
    """
    chosen = next(cell for cell in cells if cell.is_chosen)
    trials = _fresh(found, rows)
    recommended = _of(chosen, trials)
    if not recommended:
        return []
    spread = replace(seed_spread(found), choice={})  # the values were chosen before
    every = [Confirmed(chosen, [recommended[seed] for seed in sorted(recommended)])]
    for cell in cells:
        rival = _of(cell, trials)
        if cell is not chosen and (seeds := sorted(recommended.keys() & rival.keys())):
            names = [[cell_of(each.trials[0].row, found.keys)] for each in (cell, chosen)]
            luck = spread.luck(names[0], names[1], len(seeds))
            theirs = [rival[seed] for seed in seeds]
            estimate = paired([recommended[seed] for seed in seeds], theirs, luck)
            every.append(Confirmed(cell, theirs, estimate))
    return every


def _fresh(found: Comparable, rows: Sequence[TrialRow]) -> list[Scored]:
    """Confirmation trials with a seed that no trial of the comparison has."""
    seen = {trial.seed for trial in found.trials}
    asked = {question(trial.row) for trial in found.trials}
    fresh = [row for row in rows if row.settings.get(SEED) not in seen and question(row) in asked]
    return comparable(fresh).trials


def question(row: TrialRow) -> str:
    """Equal for trials that differ in nothing but the seed and how they are scored."""
    trained = {k: v for k, v in row.settings.items() if not k.startswith(f"{EVAL}.")}
    return canonical_json({**trained, SEED: None})


def _of(cell: Candidate, trials: Sequence[Scored]) -> dict[int, Scored]:
    """The confirmation trials of a setting, by seed."""
    asked = {question(trial.row) for trial in cell.trials}
    return {trial.seed: trial for trial in trials if question(trial.row) in asked}
