"""The recommendation in words: that of the held-out rows, and what its confirmation says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tinyllama_lab.report.analysis.candidates import (
    Advice,
    Candidate,
    advice,
    cost_words,
    heldout_losses,
    reason,
    untrained,
)
from tinyllama_lab.report.analysis.comparison import Comparison, Scored
from tinyllama_lab.report.analysis.confirmation import (
    Confirmation,
    RivalResult,
    make_confirmation,
    mean_loss,
)
from tinyllama_lab.report.analysis.measure import between
from tinyllama_lab.report.analysis.settings import Settings
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.report.analysis.tuned import untuned_sentence
from tinyllama_lab.report.text import counted

MOST_SEEDS = 100  # seeds up to which a larger confirmation is suggested
PROVISIONAL = "not yet confirmed on rows and seeds that had no part in the choice"


def recommend(
    comparison: Comparison,
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
    advised, taken = advice(cells, settings.cost, settings.margin), list(cells)
    confirmation = make_confirmation(comparison, cells, rows, settings.cost)
    if confirmation is None:
        return taken, advised
    margin = comparison.measure.margin(settings.margin)
    better = [rival for rival in confirmation.rivals if rival.overturns(margin)]
    if confirmation.lost or not any(rival.trials for rival in confirmation.rivals):
        advised = _provisional(advised, confirmation)
    elif better:
        winner = min(better, key=lambda rival: mean_loss(rival.trials))
        taken = [replace(cell, is_chosen=cell is winner.pair.rival) for cell in cells]
        advised = _overturned(winner, cells, settings)
        advised.details.extend(cost_words(taken, winner.pair.rival, settings.cost))
    else:
        advised = _judged(advised, confirmation, cells, settings, margin)
    if untuned := untuned_sentence([trial.row for cell in cells for trial in cell.trials]):
        advised.sentences[-1] += f" {untuned}"
    return taken, advised


def _provisional(heldout_advice: Advice, confirmation: Confirmation) -> Advice:
    """Say why the recommendation is not confirmed."""
    take, why, how_sure = heldout_advice.sentences
    reason_words, label = PROVISIONAL, confirmation.chosen.label
    if confirmation.problem:
        reason_words = f"its fresh runs cannot be compared ({confirmation.problem})"
    elif confirmation.lost:
        runs = counted(confirmation.lost + len(confirmation.trials), "fresh run")
        lost = f"{confirmation.lost} of {runs} of {label} ended without a score"
        take, reason_words = f"{take[:-1]}; but {lost}.", f"not confirmed, because {lost}"
    elif confirmation.trials:
        reason_words = "the fresh runs of its rivals have no score"
    return replace(heldout_advice, sentences=[take, why, f"{how_sure}; {reason_words}."])


def _judged(
    heldout_advice: Advice,
    confirmation: Confirmation,
    cells: Sequence[Candidate],
    settings: Settings,
    margin: float,
) -> Advice:
    """Add what the confirmation says to the recommendation of the held-out rows."""
    within = f"{margin:g} {confirmation.trials[0].measure.unit}"
    outcomes = "; ".join(rival.outcome(margin, within) for rival in confirmation.rivals)
    details = _heldout(cells, settings.margin)
    if more := _more_seeds(confirmation.rivals, margin):
        details.append(more)
    take = heldout_advice.sentences[0]
    if all(rival.is_settled(margin) and not rival.lost for rival in confirmation.rivals):
        take = f"Take {confirmation.chosen.label}."  # these rows leave no alternative
    sure = f"How sure: {_on(confirmation.trials)}, {_listed(confirmation)}: {outcomes}."
    why = f"Why: {reason(cells, settings.cost, settings.margin)}."
    return Advice([take, why, sure], [*details, *heldout_advice.details[1:]])


def _heldout(cells: Sequence[Candidate], margin: float) -> list[str]:
    measure = cells[0].trials[0].measure
    within = f"{measure.margin(margin):g} {measure.unit}"
    return [
        f"The rule: of all settings whose loss is within {within} of the lowest, the cheapest.",
        f"{heldout_losses(cells)} These rows made the choice.",
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


def _overturned(winner: RivalResult, cells: Sequence[Candidate], settings: Settings) -> Advice:
    trials, this, other = winner.trials, winner.pair.rival.label, winner.pair.chosen.label
    assert winner.estimate is not None
    low, high = winner.interval
    measure, base = trials[0].measure, untrained(trials)
    before = f"this contradicts the held-out rows, which recommend {other}"
    if not winner.pair.claim:
        before = f"the held-out rows alone could not tell {other} and {this} apart"
    loss = f"{mean_loss(trials):.3f}{f' ({base})' if base else ''}"
    cheaper = ", and it is the cheaper one" if winner.pair.rival_is_cheaper else ""
    return Advice(
        [
            f"Take {this}.",
            f"Why: {_on(trials)}, its loss is {loss}, "
            f"{measure.change(-winner.estimate.difference)} than that of {other} (95 % interval: "
            f"{between(-high, -low)}){cheaper}.",
            f"How sure: {before}; the answers below are those of the held-out rows.",
        ],
        _heldout(cells, settings.margin),
    )


def _listed(confirmation: Confirmation) -> str:
    """Return the loss of the recommended setting, and its difference from those of its rivals."""
    words, base = [], untrained(confirmation.trials)
    for rival in confirmation.rivals:
        if rival.estimate is None:
            continue
        measure = rival.trials[0].measure
        than = f"{measure.change(rival.estimate.difference)} than that of {rival.pair.rival.label}"
        seeds = len(rival.trials)
        shared = f"on {counted(seeds, 'seed')}, " * (seeds < len(confirmation.trials))
        words.append(f"{than} ({shared}{measure.interval_words(rival.estimate)})")
    known = f"{confirmation.loss:.3f}{f' ({base})' if base else ''}"
    return f"its loss is {known}, {' and '.join(words)}"
