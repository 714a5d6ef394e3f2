"""The recommendation on rows that no choice has seen, from trials with fresh seeds.

The held-out rows chose a setting, so they flatter it. The confirmation trials of a study repeat
the recommended setting, the best one and the cheapest rival. They are compared with each other
only.
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
from tinyllama_lab.report.analysis.measure import between
from tinyllama_lab.report.analysis.recommend import (
    Advice,
    Candidate,
    advice,
    cost_words,
    heldout_words,
    untrained,
)
from tinyllama_lab.report.analysis.settings import Settings
from tinyllama_lab.report.analysis.statistics import Estimate
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.analysis.tuned import untuned_sentence
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.trial import EVAL, canonical_json

MOST_SEEDS = 100  # seeds up to which a larger confirmation is suggested
UNFINISHED = "the trials that would confirm it against another have no result"
PROVISIONAL = "not yet confirmed on rows and seeds that had no part in the choice"


@dataclass(frozen=True)
class Confirmed:
    """A setting on the confirmation rows; the estimate is the recommended one minus this one."""

    cell: Candidate  # the setting on the held-out rows
    trials: list[Scored]  # confirmation trials, in the order of seeds
    estimate: Estimate | None = None  # None for the recommended setting itself

    @property
    def loss(self) -> float:
        """The mean loss over seeds."""
        return float(np.mean([trial.loss for trial in self.trials]))

    def is_better_by(self, margin: float) -> bool:
        """Whether it was shown to be better than the recommended one by more than the margin."""
        least = self.trials[0].measure.margin(margin)
        return self.estimate is not None and self.estimate.interval()[0] > least

    def claim(self, margin: float) -> str:
        """Return what the held-out rows said of the recommended setting compared with this one."""
        measure = self.trials[0].measure
        if not self.cell.is_good_enough:
            return f"better than {self.cell.label}"
        within = f"{measure.margin(margin):g} {measure.unit}"
        return f"as good as {self.cell.label}, within {within}"

    def is_held(self, margin: float) -> bool:
        """Whether the confirmation rows show the same of both settings as the held-out rows did.

        That is, the recommended setting is better than this one; or, if this one was as good,
        it is not worse by more than the margin.
        """
        if self.estimate is None:
            return True
        return self.estimate.interval()[1] < self.bound(margin)

    def bound(self, margin: float) -> float:
        """Return the bound below which the interval of the difference must lie."""
        return self.trials[0].measure.margin(margin) if self.cell.is_good_enough else 0.0

    def distance(self, margin: float) -> float:
        """Return how far the difference is below its bound: what more runs would have to show."""
        return self.bound(margin) - (self.estimate.difference if self.estimate else 0.0)


def recommendation(
    comparison: Comparable,
    cells: Sequence[Candidate],
    rows: Sequence[TrialRow],
    settings: Settings,
) -> tuple[list[Candidate], Advice]:
    """Return the settings, one of them chosen, and the recommendation in words.

    Args:
        comparison: the trials that are compared.
        cells: their settings, one chosen by the held-out rows.
        rows: the confirmation trials, as in `StudyRows.confirmation`.
        settings: how the trials are judged.
    """
    advised = advice(cells, settings.cost, settings.margin)
    if len(cells) < 2 or not any(cell.is_chosen for cell in cells):
        return list(cells), advised
    every = confirmed(comparison, cells, rows)
    taken = list(cells)
    if len(every) < 2:
        take, why, how_sure = advised.sentences
        how_sure = f"{how_sure}; {UNFINISHED if every else PROVISIONAL}."
        advised = replace(advised, sentences=[take, why, how_sure])
    elif better := [setting for setting in every if setting.is_better_by(settings.margin)]:
        winner = min(better, key=lambda setting: setting.loss)  # of several, the best
        taken = [replace(cell, is_chosen=cell is winner.cell) for cell in cells]
        advised = _contradicted(every[0], winner, settings.margin)
        advised.details.extend(cost_words(taken, winner.cell, settings.cost))
    else:
        advised = _judged(advised, every, cells, settings.margin)
    if untuned := untuned_sentence([trial.row for cell in cells for trial in cell.trials]):
        advised.sentences[-1] += f" {untuned}"
    return taken, advised


def _judged(
    heldout_advice: Advice, every: Sequence[Confirmed], cells: Sequence[Candidate], margin: float
) -> Advice:
    """Add what the confirmation says to the recommendation of the held-out rows."""
    recommended, *rivals = every
    open_ones = [rival for rival in rivals if not rival.is_held(margin)]
    claims = " and ".join(rival.claim(margin) for rival in open_ones or rivals)
    claimed = f"{recommended.cell.label} is {claims}"
    details = [f"On the held-out rows, which chose it, its {heldout_words(cells, margin)}."]
    if not open_ones:
        sure = f"these rows confirm that {claimed}"
    elif better := [rival.cell.label for rival in rivals if rival.is_better_by(0.0)]:
        they = f"{' and '.join(better)} {'is' if len(better) == 1 else 'are'}"
        sure = f"doubtful: the held-out rows say that {claimed}, but on these rows {they} better"
    else:
        sure = f"these rows neither confirm nor contradict that {claimed}"
        them = "the two" if len(every) == 2 else "they"
        details.append(
            "Not confirmed: chance alone may be the reason where an interval reaches from lower "
            f"to higher, which does not mean that {them} are equally good"
            f"{_more_seeds(open_ones, margin)}."
        )
    take = heldout_advice.sentences[0]
    if not open_ones or recommended.loss <= min(rival.loss for rival in rivals):
        take = f"Take {recommended.cell.label}."  # no rival is worth its name
    sentences = [take, f"Why: {_on(every)}, {_listed(every)}.", f"How sure: {sure}."]
    return Advice(sentences, [*details, *heldout_advice.details])


def _on(every: Sequence[Confirmed]) -> str:
    """Describe the rows and seeds of the confirmation."""
    rows = counted(len(every[0].trials[0].losses), "other row")
    seeds = counted(len(every[0].trials), "fresh seed")
    return f"on {rows} with {seeds}, which had no part in the choice"


def _more_seeds(open_ones: Sequence[Confirmed], margin: float) -> str:
    """Say how many seeds would confirm the choice on these rows, if the difference stays so."""
    sizes = [(rival.estimate, rival.distance(margin)) for rival in open_ones]
    if any(size <= 0 for _, size in sizes):  # more of the same would not confirm it
        return ""
    needed = [estimate.seeds_needed(size) for estimate, size in sizes if estimate]
    seeds_to_ask = max(seeds or MOST_SEEDS + 1 for seeds in needed)
    if seeds_to_ask > MOST_SEEDS:
        return "; if the difference stays so, these rows are too few to tell"
    return f"; if the difference stays so, the same command with confirm={seeds_to_ask} would tell"


def _contradicted(recommended: Confirmed, winner: Confirmed, margin: float) -> Advice:
    measure, other = winner.trials[0].measure, recommended.cell.label
    assert winner.estimate is not None
    least = f"{measure.margin(margin):g} {measure.unit}"
    low, high = winner.estimate.interval()
    return Advice(
        [
            f"Take {winner.cell.label}.",
            f"Why: {_on([winner])}, its loss is {winner.loss:.3f}, lower than that of {other} by "
            f"more than {least} ({recommended.loss:.3f}; 95 % interval of the difference: "
            f"{between(-high, -low)}).",
            f"How sure: this contradicts the held-out rows, which recommend {other}; the answers "
            "below are those of the held-out rows.",
        ]
    )


def _listed(every: Sequence[Confirmed]) -> str:
    """Return the loss of the recommended setting, and its difference from those of its rivals."""
    recommended, *rivals = every
    measure, words = recommended.trials[0].measure, []
    for rival in rivals:
        assert rival.estimate is not None
        than = f"{measure.change(rival.estimate.difference)} than that of {rival.cell.label}"
        words.append(f"{than} ({measure.interval_words(rival.estimate)})")
    base = untrained(recommended.trials)
    known = f"{recommended.loss:.3f}{f' ({base})' if base else ''}"
    return f"its loss is {known}, {' and '.join(words)}"


def confirmed(
    comparison: Comparable, cells: Sequence[Candidate], rows: Sequence[TrialRow]
) -> list[Confirmed]:
    """Return the recommended setting and its rivals on the confirmation rows, on the same seeds.

    Empty if the recommended setting has no trial there.

    Args:
        comparison: the trials that are compared on the held-out rows.
        cells: their settings, one of them chosen.
        rows: the confirmation trials, as in `StudyRows.confirmation`.
    """
    chosen = next(cell for cell in cells if cell.is_chosen)
    trials = _fresh(comparison, rows)
    recommended = _of(chosen, trials)
    if not recommended:
        return []
    # the tuned values were fixed before these trials, so the choice adds no variance here
    spread = replace(seed_spread(comparison), choice={})
    every = [Confirmed(chosen, [recommended[seed] for seed in sorted(recommended)])]
    for cell in cells:
        rival = _of(cell, trials)
        if cell is not chosen and (seeds := sorted(recommended.keys() & rival.keys())):
            names = [[cell_of(c.trials[0].row, comparison.keys)] for c in (cell, chosen)]
            luck = spread.luck(names[0], names[1], len(seeds))
            theirs = [rival[seed] for seed in seeds]
            estimate = paired([recommended[seed] for seed in seeds], theirs, luck)
            every.append(Confirmed(cell, theirs, estimate))
    return every


def _fresh(comparison: Comparable, rows: Sequence[TrialRow]) -> list[Scored]:
    """Return the confirmation trials with a seed that no trial of the comparison has."""
    seen = {trial.seed for trial in comparison.trials}
    questions = {question(trial.row) for trial in comparison.trials}
    fresh = [
        row for row in rows if row.settings.get(SEED) not in seen and question(row) in questions
    ]
    return comparable(fresh).trials


def question(row: TrialRow) -> str:
    """Return a key that is equal for trials that differ only in seed and evaluation."""
    trained = {k: v for k, v in row.settings.items() if not k.startswith(f"{EVAL}.")}
    return canonical_json({**trained, SEED: None})


def _of(cell: Candidate, trials: Sequence[Scored]) -> dict[int, Scored]:
    """Return the confirmation trials of a setting, by seed."""
    questions = {question(trial.row) for trial in cell.trials}
    return {trial.seed: trial for trial in trials if question(trial.row) in questions}
