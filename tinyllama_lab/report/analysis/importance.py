"""How much of the variance of the held-out loss each swept key accounts for by itself."""

from __future__ import annotations

import numpy as np

from tinyllama_lab.config.axes import short_name, show
from tinyllama_lab.report.analysis.comparison import SEED, Comparison

LEAST_TRIALS = 8  # with fewer, shares of variance say nothing


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
        between = sum(
            count * (losses[values == name].mean() - losses.mean()) ** 2
            for name, count in zip(names, counts, strict=True)
        )
        shares.append((key, float(between) / total))
    return sorted(shares, key=lambda each: -each[1])


def lead(comparison: Comparison) -> str | None:
    """Return the swept key that colours charts: the one with the largest share, else the first."""
    ranked = [key for key, _ in importances(comparison) if key != SEED]
    return next(iter([*ranked, *comparison.keys]), None)


def name_of(key: str) -> str:
    """Return what a chart calls a key."""
    return "seed (luck of a run)" if key == SEED else short_name(key)
