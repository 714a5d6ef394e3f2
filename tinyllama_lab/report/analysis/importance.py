"""How much of the variance of the held-out loss each swept key accounts for by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyllama_lab.config.axes import short_name, show
from tinyllama_lab.metrics import HELDOUT_LOSS
from tinyllama_lab.report.analysis.comparison import SEED, Comparison
from tinyllama_lab.report.analysis.contrasts import are_numbers
from tinyllama_lab.report.analysis.statistics import Array
from tinyllama_lab.report.analysis.trial_rows import TrialRow, ranked_by

LEAST_TRIALS = 8  # with fewer, shares of variance say nothing
_QUARTERS = (0.25, 0.5, 0.75)


def importances(comparison: Comparison) -> list[tuple[str, float]]:
    """Return every key and its share of the variance of the held-out loss, largest first.

    The share is eta squared: the sum of squares between the means of a key's values, over the
    total. Shares add up to at most one in a full grid; in a partial one they overlap.
    """
    losses = np.array([trial.loss for trial in comparison.trials])
    total = float(((losses - losses.mean()) ** 2).sum()) if len(losses) else 0.0
    if not total:
        return []
    keys = [*comparison.keys, SEED]
    shares = []
    for key in keys:
        values = np.array([show(trial.settings.get(key)) for trial in comparison.trials])
        names, counts = np.unique(values, return_counts=True)
        if len(names) < 2 or counts.min() < 2:  # a value with one trial explains it entirely
            continue
        shares.append((key, _share(values, losses)))
    return sorted(shares, key=lambda each: -each[1])


def _share(values: Array, losses: Array) -> float:
    """Return eta squared of losses that are not all equal, grouped by value."""
    names, counts = np.unique(values, return_counts=True)
    between = sum(
        count * (losses[values == name].mean() - losses.mean()) ** 2
        for name, count in zip(names, counts, strict=True)
    )
    return float(between / ((losses - losses.mean()) ** 2).sum())


def by_importance(rows: Sequence[TrialRow]) -> list[str]:
    """Return the swept keys of rows, those first that tell good trials from bad ones.

    They are ordered by the share of the variance that their values explain beyond chance (epsilon
    squared), and otherwise as in the rows. Keys with one value in these rows come last.
    """
    trials = [row for row in rows if not row.is_base]
    metric = ranked_by(rows) or HELDOUT_LOSS
    scored = [(row, loss) for row in trials if (loss := row.metric(metric)) is not None]
    losses = np.array([loss for _, loss in scored])
    says_nothing = len(losses) < LEAST_TRIALS or bool(np.ptp(losses) == 0)

    def rank(key: str) -> tuple[bool, float]:
        is_constant = len({show(row.swept.get(key)) for row in trials}) < 2
        values = [row.swept.get(key) for row, _ in scored]
        return is_constant, 0.0 if says_nothing else -_share_beyond_chance(values, losses)

    return sorted(dict.fromkeys(key for row in trials for key in row.swept), key=rank)


def _share_beyond_chance(values: Sequence[Any], losses: Array) -> float:
    """Return epsilon squared; a number with many values, as a search draws, counts by quarter."""
    groups = np.array([show(value) for value in values])
    if are_numbers(values) and len(set(groups)) > len(_QUARTERS) + 1:
        groups = np.searchsorted(np.quantile(values, _QUARTERS), values)
    trials, levels = len(losses), len(np.unique(groups))
    if levels in (1, trials):
        return 0.0
    return 1 - (1 - _share(groups, losses)) * (trials - 1) / (trials - levels)


def lead(comparison: Comparison) -> str | None:
    """Return the swept key that colours charts: the one with the largest share, else the first."""
    ranked = [key for key, _ in importances(comparison) if key != SEED]
    return next(iter([*ranked, *comparison.keys]), None)


def name_of(key: str) -> str:
    """Return what a chart calls a key."""
    return "seed (luck of a run)" if key == SEED else short_name(key)
