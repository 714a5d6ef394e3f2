"""The cheapest of the settings that cannot be told apart from the best.

A setting is out where it was shown to be worse than the best that was found, at a level divided
by the number of settings, and not shown to be within the margin of it: so the true best is among
those that stay in at least 95 % of studies (Bonferroni; Hsu 1984 calls it multiple comparisons
with the best).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from tinyllama_lab.report.comparable import Comparable, Scored, cell_of
from tinyllama_lab.report.contrasts import MARGIN
from tinyllama_lab.report.costs import COSTS, cost_of, noises
from tinyllama_lab.report.luck import SeedSpread, seed_spread
from tinyllama_lab.report.statistics import ALPHA, ONE_SIDED, Estimate, adjusted, compare
from tinyllama_lab.report.tuned import setting_words
from tinyllama_lab.swept import words

UNITS = {
    "compute": "{:.3g} TFLOP of training",
    "memory": "{:.0f} MiB for one alone",
    "size": "{:.1f} MiB of adapter",
    "time": "{:.0f} s of training",
    "decode": "{:.1f} tokens/s",
}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A cell: trials that differ in nothing but their seed."""

    trials: list[Scored]
    label: str
    loss: float  # mean over seeds
    costs: dict[str, float]
    estimate: Estimate | None = None  # of its loss minus the best's; None for the best
    p: float = 0.0  # that it is worse than the best by the margin or more, corrected
    p_worse: float = 1.0  # that it is not worse than the best, corrected
    is_best: bool = False
    is_chosen: bool = False

    @property
    def is_good_enough(self) -> bool:
        """Whether it cannot be told apart from the best, or was shown to be within the margin."""
        return self.is_best or self.p_worse >= ALPHA or self.is_within_margin

    @property
    def is_within_margin(self) -> bool:
        """Whether it was shown not to be worse than the best by the margin."""
        return self.p < ONE_SIDED


def candidates(
    found: Comparable, cost: str = "compute", margin: float = MARGIN, correction: str = "holm"
) -> list[Candidate]:
    """Every cell beside the best, the cheapest good one chosen; best first."""
    cells = [_candidate(trials) for trials in found.whole_cells()]
    cells.sort(key=lambda cell: cell.loss)
    if not cells:
        return []
    best, *others = cells
    spread, margin = seed_spread(found), found.measure.margin(margin)
    estimates = [_against(best, other, found.keys, spread) for other in others]
    corrected = adjusted([each.p_below(margin) for each in estimates], correction)
    worse = [min(1.0, each.p_below(0.0, above=True) * len(others)) for each in estimates]
    tested = [
        _with(other, estimate=estimate, p=p, p_worse=p_worse)
        for other, estimate, p, p_worse in zip(others, estimates, corrected, worse, strict=True)
    ]
    every = [_with(best, is_best=True), *tested]
    good = [each for each in every if each.is_good_enough]
    least = min(_price(each, cost) for each in good)
    same = noises(found)[cost].ratio(len(best.trials))
    near = [each for each in good if _price(each, cost) <= least * same] or good
    cheapest = min(near, key=lambda each: (each.costs.get("size", math.inf), each.loss))
    return [_with(each, is_chosen=True) if each is cheapest else each for each in every]


def front(cells: Sequence[Candidate], cost: str) -> list[Candidate]:
    """The Pareto front: no other cell is both better and cheaper. Cheapest first."""
    sign = -1 if cost == "decode" else 1
    priced = [each for each in cells if cost in each.costs]
    priced.sort(key=lambda each: (sign * each.costs[cost], each.loss))
    found: list[Candidate] = []
    for each in priced:
        if not found or each.loss < found[-1].loss:
            found.append(each)
    return found


def sentence(cells: Sequence[Candidate], cost: str = "compute", margin: float = MARGIN) -> str:
    """The recommendation, with its numbers; empty where none of the cells is chosen."""
    if not cells:
        return "No recommendation: no trial is done and can be compared."
    best = next(each for each in cells if each.is_best)
    chosen = next((each for each in cells if each.is_chosen), None)
    if chosen is None:
        return ""
    price = _priced(chosen, cost)
    if len(cells) == 1:
        return f"Only one setting, {best.label}: held-out loss {best.loss:.4f}{price}."
    rivals = [each for each in cells if each.is_good_enough]
    once = " in this one run of each" if len(best.trials) == 1 else ""
    told = _told_apart(len(rivals), len(cells), bool(once))
    if chosen is best or chosen.estimate is None:
        return (
            f"Take {best.label}: its held-out loss {best.loss:.4f} is the lowest of "
            f"{len(cells)} settings{once}{price}; {told}."
        )
    low, high = chosen.estimate.interval()
    apart = f"{chosen.estimate.difference:+.4f}, 95 % {low:+.4f} to {high:+.4f}"
    is_close = chosen.is_within_margin
    measure = chosen.trials[0].measure
    within = f"{measure.margin(margin):g} {measure.word}"
    words = f"was shown to be within {within} of" if is_close else "cannot be told apart from"
    saved = _ratio(chosen, best, cost)
    return (
        f"Take {chosen.label}: its held-out loss {chosen.loss:.4f} {words} the best{once}, "
        f"{best.label} ({best.loss:.4f}; difference {apart}){price}{saved}; of {len(rivals)} such "
        "settings it is the cheapest."
    )


def _told_apart(good: int, cells: int, is_one_run: bool) -> str:
    if good == 1 and is_one_run:
        return "every other is higher by more than runs are taken to differ"
    if good == 1:
        return "every other was shown to be worse"
    if good == cells:
        return "none of the others can be told apart from it, and none is clearly cheaper"
    few = "1 other" if good == 2 else f"{good - 1} others"
    return f"{few} cannot be told apart from it, and cost no less"


def _candidate(trials: list[Scored]) -> Candidate:
    trials = sorted(trials, key=lambda trial: str(trial.seed))
    name = words(setting_words([trial.row for trial in trials]))
    costs = {}
    for cost in COSTS:
        values = [value for t in trials if (value := cost_of(t, cost)) is not None]
        if values:
            costs[cost] = fmean(values)
    loss = fmean(trial.loss for trial in trials)
    return Candidate(trials, name or trials[0].label, loss, costs)


def _against(
    best: Candidate, other: Candidate, keys: Sequence[str], spread: SeedSpread
) -> Estimate:
    """The loss of `other` minus that of the best, seed by seed."""
    pairs = zip(other.trials, best.trials, strict=True)
    differences = np.stack([ours.losses - theirs.losses for ours, theirs in pairs])
    first, second = ([cell_of(each.trials[0].row, keys)] for each in (best, other))
    luck = spread.luck(first, second, len(best.trials))
    return compare(differences, best.trials[0].tokens, luck, best.trials[0].clusters)


def _with(cell: Candidate, **changes: object) -> Candidate:
    return Candidate(**{**vars(cell), **changes})


def _price(cell: Candidate, cost: str) -> float:
    """Lower is cheaper; infinite where it is not known."""
    value = cell.costs.get(cost)
    if not value:
        return math.inf
    return 1 / value if cost == "decode" else value


def _priced(cell: Candidate, cost: str) -> str:
    return f", at {UNITS[cost].format(cell.costs[cost])}" if cost in cell.costs else ""


def _ratio(chosen: Candidate, best: Candidate, cost: str) -> str:
    if not chosen.costs.get(cost) or not best.costs.get(cost):
        return ""
    return f" against {UNITS[cost].format(best.costs[cost])}"
