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
    reason,
    untrained,
)
from tinyllama_lab.report.analysis.settings import Settings
from tinyllama_lab.report.analysis.statistics import Estimate, Luck
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.analysis.tuned import untuned_sentence
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.trial import EVAL, canonical_json

MOST_SEEDS = 100  # seeds up to which a larger confirmation is suggested
UNFINISHED = "the trials that would confirm it against another have no result"
PROVISIONAL = "not yet confirmed on rows and seeds that had no part in the choice"
BETTER, CLOSE, NOTHING = "better", "close", ""  # what the held-out rows showed of a pair


def claim(chosen: Candidate, rival: Candidate) -> str:
    """Return what the held-out rows showed of two settings; they test each against the best."""
    if chosen.is_best:
        return NOTHING if rival.is_good_enough else BETTER
    return CLOSE if rival.is_best and chosen.is_within_margin else NOTHING


def bound(chosen: Candidate, rival: Candidate, margin: float) -> float:
    """Return what fresh rows must show the loss of `chosen` minus that of `rival` to be below."""
    return 0.0 if claim(chosen, rival) == BETTER else chosen.trials[0].measure.margin(margin)


@dataclass(frozen=True)
class Confirmed:
    """A setting on the confirmation rows, next to the recommended one.

    Attributes:
        cell: the setting on the held-out rows.
        trials: its confirmation trials, in the order of seeds.
        chosen: the recommended setting on the held-out rows.
        estimate: the loss of the recommended setting minus that of this one; None for itself.
        lost: its confirmation runs that ended without a score.
    """

    cell: Candidate
    trials: list[Scored]
    chosen: Candidate
    estimate: Estimate | None = None
    lost: int = 0

    @property
    def loss(self) -> float:
        """The mean loss over seeds."""
        return float(np.mean([trial.loss for trial in self.trials]))

    @property
    def claim(self) -> str:
        """What the held-out rows showed of the recommended setting compared with this one."""
        return claim(self.chosen, self.cell)

    def overturns(self, margin: float) -> bool:
        """Whether these rows show it to be better, against the recommendation.

        By more than the margin; by any difference if the held-out rows showed nothing.
        """
        least = self.trials[0].measure.margin(margin) if self.claim else 0.0
        return self.estimate is not None and self.estimate.interval()[0] > least

    def distance(self, margin: float) -> float:
        """Return how far the difference is below its bound."""
        difference = self.estimate.difference if self.estimate else 0.0
        return bound(self.chosen, self.cell, margin) - difference

    def is_settled(self, margin: float) -> bool:
        """Whether the interval stays below its bound."""
        if self.estimate is None:
            return True
        return self.estimate.interval()[1] - self.estimate.difference < self.distance(margin)

    def outcome(self, margin: float) -> str:
        """Return what these rows say of the recommended setting and this one."""
        this, other, measure = self.chosen.label, self.cell.label, self.trials[0].measure
        assert self.estimate is not None
        low, high = self.estimate.interval()
        within = f"by more than {measure.margin(margin):g} {measure.unit}"
        claimed = f"{this} is better than {other}"
        if self.claim == CLOSE or (not self.claim and high >= 0):
            claimed = f"{this} is not worse than {other} {within}"
        if self.lost:
            return f"{counted(self.lost, 'fresh run')} of {other} ended without a score"
        if self.is_settled(margin):
            return f"these rows {'confirm' if self.claim else 'show'} that {claimed}"
        if not self.claim:
            return f"these rows cannot tell {this} and {other} apart either"
        if low > 0:
            return (
                f"doubtful: the held-out rows showed that {claimed}, but on these rows {other} "
                "is better"
            )
        return f"these rows neither confirm nor contradict that {claimed}"


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
    if len(every) < 2 or every[0].lost:
        take, why, how_sure = advised.sentences
        known = _lost_words(every[0]) if every and every[0].lost else ""
        how_sure = f"{how_sure}; {known or (UNFINISHED if every else PROVISIONAL)}."
        advised = replace(advised, sentences=[take, why, how_sure])
    elif better := [setting for setting in every if setting.overturns(settings.margin)]:
        winner = min(better, key=lambda setting: setting.loss)
        taken = [replace(cell, is_chosen=cell is winner.cell) for cell in cells]
        advised = _overturned(every, winner, cells, settings.margin)
        advised.details.extend(cost_words(taken, winner.cell, settings.cost))
    else:
        advised = _judged(advised, every, cells, settings)
    if untuned := untuned_sentence([trial.row for cell in cells for trial in cell.trials]):
        advised.sentences[-1] += f" {untuned}"
    return taken, advised


def _lost_words(recommended: Confirmed) -> str:
    runs = recommended.lost + len(recommended.trials)
    return (
        f"not confirmed, because {recommended.lost} of {counted(runs, 'fresh run')} of "
        f"{recommended.cell.label} ended without a score"
    )


def _judged(
    heldout_advice: Advice, every: Sequence[Confirmed], cells: Sequence[Candidate], how: Settings
) -> Advice:
    """Add what the confirmation says to the recommendation of the held-out rows."""
    recommended, *rivals = every
    open_ones = [rival for rival in rivals if not rival.is_settled(how.margin)]
    outcomes = "; ".join(rival.outcome(how.margin) for rival in rivals)
    details = [*_heldout(cells, how.margin)]
    if more := _more_seeds(open_ones, how.margin):
        details.append(more)
    take = heldout_advice.sentences[0]
    is_lowest = recommended.loss <= min(rival.loss for rival in rivals)
    if not open_ones or (is_lowest and not recommended.cell.is_best):
        take = f"Take {recommended.cell.label}."  # these rows name no alternative
    sure = f"How sure: {_on(every)}, {_listed(every)}: {outcomes}."
    why = f"Why: {reason(cells, how.cost, how.margin)}."
    return Advice([take, why, sure], [*details, *heldout_advice.details])


def _heldout(cells: Sequence[Candidate], margin: float) -> list[str]:
    within = (
        f"{margin:g} nats per token" if cells[0].trials[0].measure.is_per_token else "the margin"
    )
    return [
        f"The rule: of all settings whose loss is within {within} of the lowest, the cheapest.",
        f"The held-out rows made this choice: its {heldout_words(cells, margin)}.",
        "The other rows are other texts: compare their losses with each other, not with those of "
        "the held-out rows.",
    ]


def _on(every: Sequence[Confirmed]) -> str:
    """Describe the rows and seeds of the confirmation."""
    trial = every[0].trials[0]
    rows = counted(len(trial.losses), "other row")
    alike = len(trial.losses) if trial.clusters is None else len(np.unique(trial.clusters))
    if alike < len(trial.losses):
        rows += f" (they count as {alike}, since some are alike)"
    return f"on {rows} with {counted(len(every[0].trials), 'fresh seed')}"


def _more_seeds(open_ones: Sequence[Confirmed], margin: float) -> str:
    """Say how many seeds would settle the choice on these rows, if the difference stays so."""
    distances = [(rival.estimate, rival.distance(margin)) for rival in open_ones if not rival.lost]
    # a difference on the wrong side of its bound is not settled by more of the same
    if not distances or any(distance <= 0 for _, distance in distances):
        return ""
    needed = [estimate.seeds_needed(distance) for estimate, distance in distances if estimate]
    seeds_to_ask = max(seeds or MOST_SEEDS + 1 for seeds in needed)
    if seeds_to_ask > MOST_SEEDS:
        return "More fresh seeds would not settle it: the other rows are too few."
    return (
        "If the true difference is the one seen on the other rows, the same command with "
        f"confirm={seeds_to_ask} (fresh seeds) settles it four times out of five."
    )


def _overturned(
    every: Sequence[Confirmed], winner: Confirmed, cells: Sequence[Candidate], margin: float
) -> Advice:
    measure, other = winner.trials[0].measure, winner.chosen.label
    assert winner.estimate is not None
    low, high = winner.estimate.interval()
    before = f"this contradicts the held-out rows, which recommend {other}"
    if not winner.claim:
        before = f"the held-out rows alone could not tell {other} and {winner.cell.label} apart"
    base = untrained(winner.trials)
    return Advice(
        [
            f"Take {winner.cell.label}.",
            f"Why: {_on([winner])}, its loss is {winner.loss:.3f}{f' ({base})' if base else ''}, "
            f"{measure.change(-winner.estimate.difference)} than that of {other} (95 % interval: "
            f"{between(-high, -low)}).",
            f"How sure: {before}; the answers below are those of the held-out rows.",
        ],
        _heldout(cells, margin),
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
    fresh = _fresh(comparison, rows)
    trials = comparable(fresh).trials
    of_chosen = _of(chosen, trials)
    of_rivals = {id(cell): _of(cell, trials) for cell in cells if cell is not chosen}
    rivals = [cell for cell in cells if of_rivals.get(id(cell))]
    shared = set(of_chosen).intersection(*(of_rivals[id(cell)] for cell in rivals))
    if not of_chosen:
        return []
    seeds = sorted(shared if rivals else of_chosen)
    every = [Confirmed(chosen, [of_chosen[s] for s in seeds], chosen, lost=_lost(chosen, fresh))]
    if not seeds:
        return [replace(every[0], trials=list(of_chosen.values()))]
    # the tuned values were fixed before these trials, so the choice adds no variance here
    spread = replace(seed_spread(comparison), choice={})
    for cell in rivals:
        names = [[cell_of(c.trials[0].row, comparison.keys)] for c in (cell, chosen)]
        theirs = [of_rivals[id(cell)][seed] for seed in seeds]
        luck = with_own(spread.luck(names[0], names[1], len(seeds)), every[0].trials, theirs)
        estimate = paired(every[0].trials, theirs, luck)
        every.append(Confirmed(cell, theirs, chosen, estimate, _lost(cell, fresh)))
    return every


def with_own(luck: Luck, ours: Sequence[Scored], theirs: Sequence[Scored]) -> Luck:
    """Pool the luck that the study knows with what the fresh seeds show of it themselves."""
    seeds = len(ours)
    if seeds < 2:
        return replace(luck, known=luck.freedom)
    differences = [mine.loss - other.loss for mine, other in zip(ours, theirs, strict=True)]
    freedom = luck.freedom + seeds - 1
    pooled = luck.freedom * luck.variance + (seeds - 1) * float(np.var(differences, ddof=1))
    return replace(luck, variance=pooled / freedom, freedom=freedom, known=luck.freedom)


def _fresh(comparison: Comparable, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the confirmation trials with a seed that no trial of the comparison has."""
    seen = {trial.seed for trial in comparison.trials}
    questions = {question(trial.row) for trial in comparison.trials}
    return [
        row for row in rows if row.settings.get(SEED) not in seen and question(row) in questions
    ]


def _lost(cell: Candidate, fresh: Sequence[TrialRow]) -> int:
    """Count the confirmation runs of a setting that ended without a score."""
    questions = {question(trial.row) for trial in cell.trials}
    return sum(
        row.result is not None and not row.is_done and question(row) in questions for row in fresh
    )


def question(row: TrialRow) -> str:
    """Return a key that is equal for trials that differ only in seed and evaluation."""
    trained = {k: v for k, v in row.settings.items() if not k.startswith(f"{EVAL}.")}
    return canonical_json({**trained, SEED: None})


def _of(cell: Candidate, trials: Sequence[Scored]) -> dict[int, Scored]:
    """Return the confirmation trials of a setting, by seed."""
    questions = {question(trial.row) for trial in cell.trials}
    return {trial.seed: trial for trial in trials if question(trial.row) in questions}
