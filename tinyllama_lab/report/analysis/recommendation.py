"""The recommendation in words: what the held-out rows recommend, and whether it is confirmed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.comparison import Comparison, Scored
from tinyllama_lab.report.analysis.confirmation import (
    Confirmation,
    RivalResult,
    make_confirmation,
    mean_loss,
)
from tinyllama_lab.report.analysis.contrasts import MOST_SEEDS
from tinyllama_lab.report.analysis.measure import between
from tinyllama_lab.report.analysis.ranking import RankedCell, chosen_of, price, rivals
from tinyllama_lab.report.analysis.settings import DEFAULTS, Settings
from tinyllama_lab.report.analysis.statistics import ALPHA, Estimate
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.analysis.tuned import untuned_sentence
from tinyllama_lab.report.text import counted, leading

MOST_NAMED = 5  # settings in a sentence
_LONGEST_LIST = 240  # characters of their names
PROVISIONAL = "not yet confirmed on rows and seeds that had no part in the choice"


@dataclass(frozen=True)
class Advice:
    """A recommendation in words.

    Attributes:
        sentences: what to take, why, and how sure that is.
        details: what it costs and what else is known, for those who read on.
    """

    sentences: list[str]
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CellRecommendation:
    """The settings compared with the best, best first, and the recommendation in words."""

    cells: list[RankedCell]
    advice: Advice


def recommend(
    comparison: Comparison,
    cells: Sequence[RankedCell],
    rows: Sequence[TrialRow],
    settings: Settings,
) -> CellRecommendation:
    """Return the settings, one of them chosen, and the recommendation in words.

    Args:
        comparison: the trials that are compared.
        cells: their settings, one chosen by the held-out rows.
        rows: the confirmation trials, as in `StudyRows.confirmation`.
        settings: how the trials are judged.
    """
    advised, taken = advise(cells, settings), list(cells)
    confirmation = make_confirmation(comparison, cells, rows, settings.cost)
    if confirmation is None:
        return CellRecommendation(taken, advised)
    margin = comparison.measure.margin(settings.margin)
    better = [rival for rival in confirmation.rivals if rival.overturns(margin)]
    if confirmation.lost or not any(rival.trials for rival in confirmation.rivals):
        advised = _provisional(advised, confirmation)
    elif better:
        winner = min(better, key=lambda rival: mean_loss(rival.trials))
        taken = [replace(cell, is_chosen=cell is winner.pair.rival) for cell in cells]
        advised = _overturned(winner, cells, settings)
        advised.details.extend(_cost_words(taken, winner.pair.rival, settings.cost))
    else:
        advised = _judged(advised, confirmation, cells, settings, margin)
    if untuned := untuned_sentence([trial.row for cell in cells for trial in cell.trials]):
        advised.sentences[-1] += f" {untuned}"
    return CellRecommendation(taken, advised)


def _provisional(heldout_advice: Advice, confirmation: Confirmation) -> Advice:
    """Say why the recommendation is not confirmed."""
    take, why, how_sure = heldout_advice.sentences
    reason_words = PROVISIONAL
    name = confirmation.chosen.beside(confirmation.chosen)
    if confirmation.problem:
        reason_words = f"its fresh runs cannot be compared ({confirmation.problem})"
    elif confirmation.lost:
        runs = counted(confirmation.lost + len(confirmation.trials), "fresh run")
        lost = f"{confirmation.lost} of {runs} of {name} ended without a score"
        take, reason_words = f"{take[:-1]}; but {lost}.", f"not confirmed, because {lost}"
    elif confirmation.trials:
        reason_words = "the fresh runs of its rivals have no score"
    return replace(heldout_advice, sentences=[take, why, f"{how_sure}; {reason_words}."])


def _judged(
    heldout_advice: Advice,
    confirmation: Confirmation,
    cells: Sequence[RankedCell],
    settings: Settings,
    margin: float,
) -> Advice:
    """Add what the confirmation says to the recommendation of the held-out rows."""
    within = f"{margin:g} {confirmation.trials[0].measure.unit}"
    outcomes = "; ".join(rival.outcome(margin, within) for rival in confirmation.rivals)
    details = _heldout(cells, settings.margin, confirmation.chosen)
    if more := _more_seeds(confirmation.rivals, margin):
        details.append(more)
    take = heldout_advice.sentences[0]
    if all(rival.is_settled(margin) and not rival.lost for rival in confirmation.rivals):
        take = f"Take {confirmation.chosen.in_full}."  # these rows leave no alternative
    sure = f"How sure: {_on(confirmation.trials)}, {_listed(confirmation)}: {outcomes}."
    why = f"Why: {_reason(cells, settings)}."
    return Advice([take, why, sure], [*details, *heldout_advice.details[1:]])


def _heldout(cells: Sequence[RankedCell], margin: float, chosen: RankedCell) -> list[str]:
    measure = cells[0].trials[0].measure
    within = f"{measure.margin(margin):g} {measure.unit}"
    return [
        f"The rule: of all settings whose loss is within {within} of the lowest, the cheapest.",
        f"{_heldout_losses(cells, chosen)} These rows made the choice.",
        "The other rows are other texts: compare their losses with each other, not with those of "
        "the held-out rows.",
    ]


def _on(trials: Sequence[Scored]) -> str:
    """Describe the rows and seeds of a setting's confirmation."""
    rows = counted(len(trials[0].losses), "other row")
    clusters = trials[0].clusters
    alike = len(trials[0].losses) if clusters is None else len(np.unique(clusters))
    if alike < len(trials[0].losses):
        rows += f" (they count as {alike}, since some are alike)"
    return f"on {rows} with {counted(len(trials), 'fresh seed')}"


def _more_seeds(rivals: Sequence[RivalResult], margin: float) -> str:
    """Say how many seeds would settle the choice if the difference on these rows is true."""
    open_ones = [r for r in rivals if r.estimate and not r.lost and not r.is_settled(margin)]
    needed = []
    for rival in open_ones:
        assert rival.estimate is not None
        distance = rival.pair.distance(rival.estimate.difference, margin)
        if distance <= 0:  # more of the same does not settle what is on the wrong side
            return ""
        needed.append(rival.estimate.seeds_needed(distance) or MOST_SEEDS + 1)
    if not needed:
        return ""
    if max(needed) > MOST_SEEDS:
        return "More fresh seeds would not settle it: the other rows are too few."
    return (
        "If the true difference is the one seen on the other rows, the same command with "
        f"confirm={max(needed)} (fresh seeds) settles it four times out of five."
    )


def _overturned(winner: RivalResult, cells: Sequence[RankedCell], settings: Settings) -> Advice:
    trials, taken = winner.trials, winner.pair.rival
    other = winner.pair.chosen.beside(taken)
    assert winner.estimate is not None
    low, high = winner.interval
    measure, base = trials[0].measure, _untrained(trials)
    before = f"this contradicts the held-out rows, which recommend {other}"
    if not winner.pair.claim:
        before = f"the held-out rows alone could not tell {other} and {taken.beside(taken)} apart"
    loss = f"{mean_loss(trials):.3f}{f' ({base})' if base else ''}"
    cheaper = ", and it is the cheaper one" if winner.pair.rival_is_cheaper else ""
    return Advice(
        [
            f"Take {taken.in_full}.",
            f"Why: {_on(trials)}, its loss is {loss}, "
            f"{measure.change(-winner.estimate.difference)} than that of {other} (95 % interval: "
            f"{between(-high, -low)}){cheaper}.",
            f"How sure: {before}; the findings below are those of the held-out rows.",
        ],
        _heldout(cells, settings.margin, taken),
    )


def _listed(confirmation: Confirmation) -> str:
    """Return the loss of the recommended setting, and its difference from those of its rivals."""
    words, base = [], _untrained(confirmation.trials)
    for rival in confirmation.rivals:
        if rival.estimate is None:
            continue
        measure = rival.trials[0].measure
        than = f"{measure.change(rival.estimate.difference)} than that of {rival.pair.names[1]}"
        seeds = len(rival.trials)
        shared = f"on {counted(seeds, 'seed')}, " * (seeds < len(confirmation.trials))
        words.append(f"{than} ({shared}{measure.interval_words(rival.estimate)})")
    known = f"{confirmation.loss:.3f}{f' ({base})' if base else ''}"
    return f"its loss is {known}, {' and '.join(words)}"


def advise(cells: Sequence[RankedCell], settings: Settings = DEFAULTS) -> Advice:
    """Return the recommendation of the held-out rows, unconfirmed; empty if none is chosen."""
    if not cells:
        return Advice(["No recommendation: no trial is done and can be compared."])
    chosen = chosen_of(cells)
    if chosen is None:
        return Advice([])
    if len(cells) == 1:
        unit, base = chosen.trials[0].measure.unit, _untrained(chosen.trials)
        loss = f"held-out loss {chosen.loss:.3f} {unit}{base and f' ({base})'}"
        only = f"Only one setting, {chosen.in_full}: {loss}."
        return Advice([only], _cost_words(cells, chosen, settings.cost))
    best = next(cell for cell in cells if cell.is_best)
    cheapest = next(cell for cell in cells if cell.is_cheapest)
    take = f"Take {chosen.in_full}"
    if not (chosen.is_best or chosen.is_within_margin):
        take += f", or {best.beside(chosen, is_whole=True)} if cost does not matter"
    elif chosen.is_best and cheapest is not chosen:
        take += f", or {cheapest.beside(chosen, is_whole=True)} to save cost"
    sure = (
        f"provisional; expect a loss of about {chosen.expected:.3f} for {chosen.beside(chosen)} "
        "on rows as hard as these"
    )
    return Advice(
        [f"{take}.", f"Why: {_reason(cells, settings)}.", f"How sure: {sure}"],
        [
            _heldout_losses(cells, chosen),
            *_cost_words(cells, chosen, settings.cost),
            *_as_good(cells, settings.margin, chosen),
        ],
    )


def _reason(cells: Sequence[RankedCell], settings: Settings) -> str:
    """Say in short why the held-out rows recommend the chosen setting."""
    best = next(cell for cell in cells if cell.is_best)
    chosen = next(cell for cell in cells if cell.is_chosen)
    cost, within = settings.cost, _within(chosen, settings.margin)
    if chosen.is_best:
        lowest = f"its held-out loss is the lowest of {len(cells)} settings"
        return f"{lowest}; {_others(cells, settings.margin)}"
    which = "the cheaper one" if len(cells) == 2 else "the cheapest such setting"
    spent = f" ({_costs_of(chosen, cost)})" if cost in chosen.costs else ""
    verb = "was shown to be" if chosen.is_within_margin else "is"
    apart = "" if chosen.is_within_margin else ", and the two cannot be told apart"
    return (
        f"its held-out loss {verb} within {within} of the lowest, that of {best.beside(chosen)}"
        f"{apart}; it is {which}{spent}"
    )


def _others(cells: Sequence[RankedCell], margin: float) -> str:
    """Compare the other settings with the one with the lowest loss, which is chosen."""
    best = next(cell for cell in cells if cell.is_best)
    cheapest = next(cell for cell in cells if cell.is_cheapest)
    if cheapest is not best:
        above = f"its loss is more than {_within(best, margin)} higher"
        return f"{cheapest.beside(best)} is cheaper, but {above}, which may be chance"
    if others := [cell for cell in rivals(cells) if cell is not best]:
        tied = [cell for cell in others if cell.p_worse >= ALPHA]
        known = f"{_labels(tied, best)} may be as good"
        if not tied:
            known = f"{_labels(others, best)} is worse by less than {_within(best, margin)}"
        verb = "is" if len(tied or others) == 1 else "are"
        return f"{known}, and {verb} no cheaper beyond noise"
    rest = "every other setting" if len(cells) > 2 else cells[1].beside(best)
    if len(best.trials) > 1:
        return f"{rest} was shown to be worse"
    return f"{rest} is worse by more than two runs of one setting are assumed to differ"


def _as_good(cells: Sequence[RankedCell], margin: float, chosen: RankedCell) -> list[str]:
    """Name the settings that may be the best, and those that were shown to be close enough."""
    best = next(cell for cell in cells if cell.is_best)
    others, name = [cell for cell in rivals(cells) if cell is not best], best.beside(chosen)
    tied = [cell for cell in others if cell.p_worse >= ALPHA]
    close = [cell for cell in others if cell.p_worse < ALPHA]
    words = []
    if len(others) > 1 and tied:
        words.append(f"This study cannot tell {name} apart from {_labels(tied, chosen)}.")
    if len(others) > 1 and close:
        verb, within = "was" if len(close) == 1 else "were", _within(best, margin)
        listed = re.sub("^the ", "The ", _labels(close, chosen))
        words.append(f"{listed} {verb} shown to be within {within} of {name}.")
    return words


def _heldout_losses(cells: Sequence[RankedCell], chosen: RankedCell) -> str:
    """Return the lowest loss, and that of the setting that competes with it."""
    best = next(cell for cell in cells if cell.is_best)
    others = [cell for cell in cells if cell is not best and (cell.is_chosen or cell.is_cheapest)]
    runs, other = len(best.trials), (others or cells[1:])[0]
    assert other.estimate is not None
    many = f"mean of {runs} runs" if runs > 1 else "one run"
    base = _untrained(best.trials)
    return (
        f"Held-out loss, {best.trials[0].measure.unit} ({many}): "
        f"{best.beside(chosen)} {best.loss:.3f}; {other.beside(chosen)} {other.loss:.3f} "
        f"({_tested(other.estimate, cells)}){base and f'; {base}'}."
    )


def _tested(estimate: Estimate, cells: Sequence[RankedCell]) -> str:
    """Return the difference, with the simultaneous interval for all settings, which decides."""
    others = len(cells) - 1
    measure = cells[0].trials[0].measure
    ends = between(*estimate.interval(1 - ALPHA / others))
    together = f" for all {others} comparisons together" if others > 1 else ""
    return f"{measure.change(estimate.difference)}, 95 % interval{together}: {ends}"


def _cost_words(cells: Sequence[RankedCell], chosen: RankedCell, cost: str) -> list[str]:
    """Say what the chosen setting costs, and the best one; if it is the best, the cheapest one."""
    best = next(cell for cell in cells if cell.is_best)
    if cost not in chosen.costs:
        return []
    other = best if chosen is not best else min(cells, key=lambda cell: price(cell, cost))
    shown_cells = [chosen, other] if other is not chosen and cost in other.costs else [chosen]
    listed = [f"{cell.beside(chosen)}: {_costs_of(cell, cost)}" for cell in shown_cells]
    return [f"Cost: {'; '.join(listed)}."]


def _costs_of(cell: RankedCell, cost: str) -> str:
    """Return the cost that was asked for, and the adapter's size, which is easy to picture."""
    names = [name for name in dict.fromkeys((cost, "size")) if name in cell.costs]
    return ", ".join(COSTS[name].shown(cell.costs[name]) for name in names)


def _within(cell: RankedCell, margin: float) -> str:
    measure = cell.trials[0].measure
    return f"{measure.margin(margin):g} {measure.unit}"


def _untrained(trials: Sequence[Scored]) -> str:
    """Return the loss of the base on the rows that these trials were scored on."""
    trial = trials[0]
    loss = trial.metric(trial.measure.metric.replace("eval/", "base/"))
    return f"before training: {loss:.3f}" if loss is not None else ""


def _labels(cells: Sequence[RankedCell], chosen: RankedCell) -> str:
    """Join up to five names, fewer if they are long, and count the rest."""
    names = [cell.beside(chosen) for cell in cells]
    first = leading(names[:MOST_NAMED], _LONGEST_LIST)
    if more := len(names) - len(first):
        return f"{', '.join(first)} and {more} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
