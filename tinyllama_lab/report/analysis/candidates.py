"""The recommendation: the cheapest setting whose loss is within the margin of the lowest.

A setting is excluded if it was shown to be worse than the one with the lowest loss, and not shown
to be within the margin of it. The level of the first test is divided by the number of settings. So
the true best remains in at least 95 % of studies (Bonferroni; Hsu 1984, multiple comparisons with
the best). The cheapest of all that remain is often truly worse, so its measured loss must be
within the margin, too; `python -m benchmarks.statistics --only taken` compares the rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from tinyllama_lab.config.axes import words
from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.comparison import Comparison, Scored, cell_of, paired
from tinyllama_lab.report.analysis.contrasts import MARGIN
from tinyllama_lab.report.analysis.costs import cost_of, noises
from tinyllama_lab.report.analysis.luck import SeedSpread, seed_spread
from tinyllama_lab.report.analysis.measure import between
from tinyllama_lab.report.analysis.shrunken import shrunken_losses
from tinyllama_lab.report.analysis.statistics import ALPHA, ONE_SIDED, Estimate, adjusted
from tinyllama_lab.report.analysis.tuned import setting_words

MOST_NAMED = 5  # settings in a sentence


@dataclass(frozen=True, eq=False)
class Candidate:
    """A cell as a setting that may be recommended, compared with the best one."""

    trials: list[Scored]
    label: str
    loss: float  # mean over seeds
    costs: dict[str, float]
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


def rank_candidates(
    comparison: Comparison, cost: str = "compute", margin: float = MARGIN, correction: str = "holm"
) -> list[Candidate]:
    """Compare every cell with the best and choose the cheapest good one; returns the best first.

    Args:
        comparison: the trials that are compared.
        cost: what the choice saves, a name in `COSTS`.
        margin: nats per token.
        correction: of the p-values of equivalence: `holm` or `fdr_bh`.
    """
    cells = [_candidate(trials) for trials in comparison.whole_cells()]
    cells.sort(key=lambda cell: cell.loss)
    if not cells:
        return []
    best, *others = cells  # the lowest measured loss is partly luck: see `shrunken`
    spread, margin = seed_spread(comparison), comparison.measure.margin(margin)
    estimates = [_against(best, other, comparison.keys, spread) for other in others]
    corrected = adjusted([estimate.p_below(margin) for estimate in estimates], correction)
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


def is_cheaper(one: Candidate, other: Candidate, cost: str, same: float) -> bool:
    """Whether a setting costs less than another one; costs up to the ratio `same` are equal."""
    return _cheapest([one, other], cost, same) is one


def _cheapest(cells: Sequence[Candidate], cost: str, same: float) -> Candidate:
    """Costs up to the ratio `same` are equal; the smaller adapter breaks the tie."""
    least = min(price(cell, cost) for cell in cells)
    near = [cell for cell in cells if price(cell, cost) <= least * same] or cells
    return min(near, key=lambda cell: (cell.costs.get("size", math.inf), cell.loss))


def front(cells: Sequence[Candidate], cost: str) -> list[Candidate]:
    """Return the Pareto front, cheapest first: no other cell is both better and cheaper."""
    sign = -1 if COSTS[cost].is_saved_by_more else 1
    priced = [cell for cell in cells if cost in cell.costs]
    priced.sort(key=lambda cell: (sign * cell.costs[cost], cell.loss))
    front_cells: list[Candidate] = []
    for cell in priced:
        if not front_cells or cell.loss < front_cells[-1].loss:
            front_cells.append(cell)
    return front_cells


@dataclass(frozen=True)
class Advice:
    """A recommendation in words.

    Attributes:
        sentences: what to take, why, and how sure that is.
        details: what it costs and what else is known, for those who read on.
    """

    sentences: list[str]
    details: list[str] = field(default_factory=list)


def advice(cells: Sequence[Candidate], cost: str = "compute", margin: float = MARGIN) -> Advice:
    """Return the recommendation of the held-out rows, unconfirmed; empty if none is chosen."""
    if not cells:
        return Advice(["No recommendation: no trial is done and can be compared."])
    chosen = next((cell for cell in cells if cell.is_chosen), None)
    if chosen is None:
        return Advice([])
    if len(cells) == 1:
        unit, base = chosen.trials[0].measure.unit, untrained(chosen.trials)
        loss = f"held-out loss {chosen.loss:.3f} {unit}{base and f' ({base})'}"
        only = f"Only one setting, {chosen.label}: {loss}."
        return Advice([only], cost_words(cells, chosen, cost))
    best = next(cell for cell in cells if cell.is_best)
    cheapest = next(cell for cell in cells if cell.is_cheapest)
    take = f"Take {chosen.label}"
    if not (chosen.is_best or chosen.is_within_margin):
        take += f", or {best.label} if cost does not matter"
    elif chosen.is_best and cheapest is not chosen:
        take += f", or {cheapest.label} to save cost"
    sure = (
        f"provisional; expect a loss of about {chosen.expected:.3f} for {chosen.label} on rows "
        "as hard as these"
    )
    return Advice(
        [f"{take}.", f"Why: {reason(cells, cost, margin)}.", f"How sure: {sure}"],
        [heldout_losses(cells), *cost_words(cells, chosen, cost), *_as_good(cells, margin)],
    )


def rivals(cells: Sequence[Candidate]) -> list[Candidate]:
    """Return the settings that cannot be told apart from the best, the best among them."""
    return [cell for cell in cells if cell.is_good_enough]


def cost_words(cells: Sequence[Candidate], chosen: Candidate, cost: str) -> list[str]:
    """Say what the chosen setting costs, and the best one; if it is the best, the cheapest one."""
    best = next(cell for cell in cells if cell.is_best)
    if cost not in chosen.costs:
        return []
    other = best if chosen is not best else min(cells, key=lambda cell: price(cell, cost))
    shown_cells = [chosen, other] if other is not chosen and cost in other.costs else [chosen]
    listed = [f"{cell.label}: {_costs_of(cell, cost)}" for cell in shown_cells]
    return [f"Cost: {'; '.join(listed)}."]


def _costs_of(cell: Candidate, cost: str) -> str:
    """Return the cost that was asked for, and the adapter's size, which is easy to picture."""
    names = [name for name in dict.fromkeys((cost, "size")) if name in cell.costs]
    return ", ".join(COSTS[name].shown(cell.costs[name]) for name in names)


def reason(cells: Sequence[Candidate], cost: str, margin: float) -> str:
    """Say in short why the held-out rows recommend the chosen setting."""
    best = next(cell for cell in cells if cell.is_best)
    chosen = next(cell for cell in cells if cell.is_chosen)
    within = _within(chosen, margin)
    if chosen.is_best:
        lowest = f"its held-out loss is the lowest of {len(cells)} settings"
        return f"{lowest}; {_others(cells, margin)}"
    which = "the cheaper one" if len(cells) == 2 else "the cheapest such setting"
    spent = f" ({_costs_of(chosen, cost)})" if cost in chosen.costs else ""
    verb = "was shown to be" if chosen.is_within_margin else "is"
    apart = "" if chosen.is_within_margin else ", and the two cannot be told apart"
    return (
        f"its held-out loss {verb} within {within} of the lowest, that of {best.label}{apart}; it "
        f"is {which}{spent}"
    )


def _within(cell: Candidate, margin: float) -> str:
    measure = cell.trials[0].measure
    return f"{measure.margin(margin):g} {measure.unit}"


def heldout_losses(cells: Sequence[Candidate]) -> str:
    """Return the lowest loss, and that of the setting that competes with it."""
    best = next(cell for cell in cells if cell.is_best)
    others = [cell for cell in cells if cell is not best and (cell.is_chosen or cell.is_cheapest)]
    runs, other = len(best.trials), (others or cells[1:])[0]
    assert other.estimate is not None
    many = f"mean of {runs} runs" if runs > 1 else "one run"
    base = untrained(best.trials)
    return (
        f"Held-out loss, {best.trials[0].measure.unit} ({many}): {best.label} {best.loss:.3f}; "
        f"{other.label} {other.loss:.3f} ({_tested(other.estimate, cells)}){base and f'; {base}'}."
    )


def _others(cells: Sequence[Candidate], margin: float) -> str:
    """Compare the other settings with the one with the lowest loss, which is chosen."""
    best = next(cell for cell in cells if cell.is_best)
    cheapest = next(cell for cell in cells if cell.is_cheapest)
    if cheapest is not best:
        above = f"its loss is more than {_within(best, margin)} higher"
        return f"{cheapest.label} is cheaper, but {above}, which may be chance"
    if others := [cell for cell in rivals(cells) if cell is not best]:
        tied = [cell for cell in others if cell.p_worse >= ALPHA]
        known = f"{_listed(tied)} may be as good"
        if not tied:
            known = f"{_listed(others)} is worse by less than {_within(best, margin)}"
        verb = "is" if len(tied or others) == 1 else "are"
        return f"{known}, and {verb} no cheaper beyond noise"
    rest = "every other setting" if len(cells) > 2 else cells[1].label
    if len(best.trials) > 1:
        return f"{rest} was shown to be worse"
    return f"{rest} is worse by more than two runs of one setting are assumed to differ"


def _tested(estimate: Estimate, cells: Sequence[Candidate]) -> str:
    """Return the difference, with the simultaneous interval for all settings, which decides."""
    others = len(cells) - 1
    measure = cells[0].trials[0].measure
    ends = between(*estimate.interval(1 - ALPHA / others))
    together = f" for all {others} comparisons together" if others > 1 else ""
    return f"{measure.change(estimate.difference)}, 95 % interval{together}: {ends}"


def _as_good(cells: Sequence[Candidate], margin: float) -> list[str]:
    """Name the settings that may be the best, and those that were shown to be close enough."""
    best = next(cell for cell in cells if cell.is_best)
    others = [cell for cell in rivals(cells) if cell is not best]
    tied = [cell for cell in others if cell.p_worse >= ALPHA]
    close = [cell for cell in others if cell.p_worse < ALPHA]
    words = []
    if len(others) > 1 and tied:
        words.append(f"This study cannot tell {best.label} apart from {_listed(tied)}.")
    if len(others) > 1 and close:
        verb, within = "was" if len(close) == 1 else "were", _within(best, margin)
        words.append(f"{_listed(close)} {verb} shown to be within {within} of {best.label}.")
    return words


def untrained(trials: Sequence[Scored]) -> str:
    """Return the loss of the base on the rows that these trials were scored on."""
    trial = trials[0]
    loss = trial.metric(trial.measure.metric.replace("eval/", "base/"))
    return f"before training: {loss:.3f}" if loss is not None else ""


def _listed(cells: Sequence[Candidate]) -> str:
    """Join up to five labels, and count the rest."""
    names = [cell.label for cell in cells]
    more = len(names) - MOST_NAMED
    if more > 0:
        return f"{', '.join(names[:MOST_NAMED])} and {more} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _candidate(trials: list[Scored]) -> Candidate:
    trials = sorted(trials, key=lambda trial: str(trial.seed))
    name = words(setting_words([trial.row for trial in trials]))
    costs = {}
    for cost in COSTS:
        values = [value for t in trials if (value := cost_of(t, cost)) is not None]
        if values:
            costs[cost] = fmean(values)
    loss = fmean(trial.loss for trial in trials)  # equal tokens, so no weights are needed
    return Candidate(trials, name or trials[0].label, loss, costs)


def _against(
    best: Candidate, other: Candidate, keys: Sequence[str], spread: SeedSpread
) -> Estimate:
    """Estimate the loss of `other` minus that of the best, seed by seed."""
    first, second = ([cell_of(cell.trials[0].row, keys)] for cell in (best, other))
    luck = spread.luck(first, second, len(best.trials))
    return paired(other.trials, best.trials, luck)


def _with(cell: Candidate, **changes: object) -> Candidate:
    return Candidate(**{**vars(cell), **changes})


def price(cell: Candidate, cost: str) -> float:
    """Return a number that is lower for a cheaper cell; infinite where the cost is not known."""
    value = cell.costs.get(cost)
    if not value:
        return math.inf
    return 1 / value if COSTS[cost].is_saved_by_more else value
