"""Chooses a setting: the cheapest one whose loss is within the margin of the lowest.

A setting is excluded if it was shown to be worse than the one with the lowest loss, and not shown
to be within the margin of it. The level of the first test is divided by the number of settings. So
the true best remains in at least 95 % of studies (Bonferroni; Hsu 1984, multiple comparisons with
the best). The cheapest of all that remain is often truly worse, so its measured loss must be
within the margin, too; `python -m benchmarks.statistics --only taken` compares the rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tinyllama_lab.config.axes import setting_labels, shortened, spelled, words
from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.comparison import Comparison, Scored, cell_of, paired
from tinyllama_lab.report.analysis.costs import cost_of, noises
from tinyllama_lab.report.analysis.luck import SeedSpread, seed_spread
from tinyllama_lab.report.analysis.settings import DEFAULTS, Settings
from tinyllama_lab.report.analysis.shrunken import shrunken_losses
from tinyllama_lab.report.analysis.statistics import ALPHA, ONE_SIDED, Estimate, adjusted
from tinyllama_lab.report.analysis.tuned import setting_words
from tinyllama_lab.report.text import leading

MOST_IN_FULL = 4  # settings; of cells with more, sentences name only what differs from the chosen
_LONGEST_VALUE = 300  # characters of a value that is to be typed again
_LONGEST_DIFFERENCE = 60  # characters of the settings that name a cell next to the chosen one


@dataclass(frozen=True, eq=False)
class RankedCell:
    """A cell as a setting that may be recommended, compared with the best one."""

    trials: list[Scored]
    label: str
    loss: float  # mean over seeds
    costs: dict[str, float]
    settings: dict[str, Any]  # the swept values, by key
    expected: float = math.nan  # its loss without the luck of being the lowest (`shrunken`)
    estimate: Estimate | None = None  # its loss minus that of the best; None for the best
    p: float = 0.0  # p-value of being worse than the best by the margin or more, corrected
    p_worse: float = 1.0  # p-value of not being worse than the best, corrected
    is_best: bool = False
    is_chosen: bool = False
    is_cheapest: bool = False  # of those that are good enough

    @property
    def is_good_enough(self) -> bool:
        """Whether it cannot be told apart from the best, or was shown to be within the margin."""
        return self.is_best or self.p_worse >= ALPHA or self.is_within_margin

    @property
    def is_within_margin(self) -> bool:
        """Whether it was shown to be worse than the best by less than the margin."""
        return self.p < ONE_SIDED

    @property
    def has_many_settings(self) -> bool:
        """Whether its label is too long to be repeated in every sentence."""
        return len(self.settings) > MOST_IN_FULL

    @property
    def in_full(self) -> str:
        """All of its settings, so that they can be typed again; `label` shortens them."""
        return " ".join(setting_labels(self.settings, _LONGEST_VALUE)) or self.label

    @property
    def is_shortened(self) -> bool:
        """Whether even `in_full` shortens a value."""
        texts = map(spelled, self.settings.values())
        return any(shortened(text, _LONGEST_VALUE) != text for text in texts)

    def beside(self, chosen: RankedCell | None, is_whole: bool = False) -> str:
        """Return what a sentence calls the cell: of many settings, what differs from the chosen.

        Args:
            chosen: the cell that is recommended; None where there is none.
            is_whole: whether all that differs is named, and the chosen one in full.
        """
        if chosen is None or not self.has_many_settings:
            return self.in_full if is_whole else self.label
        different = {k: v for k, v in self.settings.items() if chosen.settings.get(k) != v}
        if not different:
            return self.in_full if is_whole else "the recommended one"
        if is_whole:
            return f"the same with {' '.join(setting_labels(different, _LONGEST_VALUE))}"
        return f"the one with {_first(setting_labels(different))}"


def _first(labels: Sequence[str]) -> str:
    """Join the labels that have room in a sentence, and count the others."""
    named = leading(labels, _LONGEST_DIFFERENCE)
    more = len(labels) - len(named)
    if more < 2:  # to count one takes as much room as to name it
        return " ".join(labels)
    return f"{' '.join(named)} and {more} other differences"


def rank_cells(comparison: Comparison, settings: Settings = DEFAULTS) -> list[RankedCell]:
    """Compare every cell with the best and choose the cheapest good one; returns the best first.

    Args:
        comparison: the trials that are compared.
        settings: how they are judged; the correction is that of the p-values of equivalence.
    """
    cells = [_cell(trials) for trials in comparison.whole_cells()]
    cells.sort(key=lambda cell: cell.loss)
    if not cells:
        return []
    best, *others = cells  # the lowest measured loss is partly luck: see `shrunken`
    spread, cost = seed_spread(comparison), settings.cost
    margin = comparison.measure.margin(settings.margin)
    estimates = [_against(best, other, comparison.keys, spread) for other in others]
    corrected = adjusted([estimate.p_below(margin) for estimate in estimates], settings.correction)
    # two-sided, so that the result for two settings agrees with the verdict on them
    worse = [min(1.0, 2 * e.p_below(0.0, above=True) * len(others)) for e in estimates]
    tested = [
        _with(other, estimate=estimate, p=p, p_worse=p_worse)
        for other, estimate, p, p_worse in zip(others, estimates, corrected, worse, strict=True)
    ]
    expected = shrunken_losses([cell.trials for cell in cells], comparison.keys, spread)
    every = [
        _with(cell, expected=loss)
        for cell, loss in zip([_with(best, is_best=True), *tested], expected, strict=True)
    ]
    good = [cell for cell in every if cell.is_good_enough]
    # cheap is not enough: a setting that only cannot be told apart is often truly worse
    near = [c for c in good if c.is_within_margin or c.loss - best.loss <= margin]
    same = noises(comparison)[cost].ratio(len(best.trials))
    chosen, cheapest = _cheapest(near, cost, same), _cheapest(good, cost, same)
    return [_with(cell, is_chosen=cell is chosen, is_cheapest=cell is cheapest) for cell in every]


def chosen_of(cells: Sequence[RankedCell]) -> RankedCell | None:
    """Return the recommended cell; None where none is chosen."""
    return next((cell for cell in cells if cell.is_chosen), None)


def is_cheaper(one: RankedCell, other: RankedCell, cost: str, same: float) -> bool:
    """Whether a setting costs less than another one; costs up to the ratio `same` are equal."""
    return _cheapest([one, other], cost, same) is one


def _cheapest(cells: Sequence[RankedCell], cost: str, same: float) -> RankedCell:
    """Costs up to the ratio `same` are equal; the smaller adapter breaks the tie."""
    least = min(price(cell, cost) for cell in cells)
    near = [cell for cell in cells if price(cell, cost) <= least * same] or cells
    return min(near, key=lambda cell: (cell.costs.get("size", math.inf), cell.loss))


def front(cells: Sequence[RankedCell], cost: str) -> list[RankedCell]:
    """Return the Pareto front, cheapest first: no other cell is both better and cheaper."""
    sign = -1 if COSTS[cost].is_saved_by_more else 1
    priced = [cell for cell in cells if cost in cell.costs]
    priced.sort(key=lambda cell: (sign * cell.costs[cost], cell.loss))
    front_cells: list[RankedCell] = []
    for cell in priced:
        if not front_cells or cell.loss < front_cells[-1].loss:
            front_cells.append(cell)
    return front_cells


def rivals(cells: Sequence[RankedCell]) -> list[RankedCell]:
    """Return the settings that cannot be told apart from the best, the best among them."""
    return [cell for cell in cells if cell.is_good_enough]


def _cell(trials: list[Scored]) -> RankedCell:
    trials = sorted(trials, key=lambda trial: str(trial.seed))
    settings = setting_words([trial.row for trial in trials])
    costs = {}
    for cost in COSTS:
        values = [value for t in trials if (value := cost_of(t, cost)) is not None]
        if values:
            costs[cost] = fmean(values)
    loss = fmean(trial.loss for trial in trials)  # equal tokens, so no weights are needed
    return RankedCell(trials, words(settings) or trials[0].label, loss, costs, settings)


def _against(
    best: RankedCell, other: RankedCell, keys: Sequence[str], spread: SeedSpread
) -> Estimate:
    """Estimate the loss of `other` minus that of the best, seed by seed."""
    first, second = ([cell_of(cell.trials[0].row, keys)] for cell in (best, other))
    luck = spread.luck(first, second, len(best.trials))
    return paired(other.trials, best.trials, luck)


def _with(cell: RankedCell, **changes: object) -> RankedCell:
    return RankedCell(**{**vars(cell), **changes})


def price(cell: RankedCell, cost: str) -> float:
    """Return a number that is lower for a cheaper cell; infinite where the cost is not known."""
    value = cell.costs.get(cost)
    if not value:
        return math.inf
    return 1 / value if COSTS[cost].is_saved_by_more else value
