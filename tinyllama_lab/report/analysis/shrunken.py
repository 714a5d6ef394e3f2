"""The loss to expect of the best of several settings, without the luck of being chosen.

The lowest of many measured losses was also helped most by its rows and seeds. The model is the
normal-normal one of empirical Bayes (James and Stein 1961; Efron and Morris 1973): true losses
vary around their mean with an unknown variance, and measured losses around the true ones with a
known variance. Each loss is pulled towards the mean by the share of the spread that the known
variance explains. If it explains all of the spread, all estimates are equal.

The variance of a training run is known poorly, so its upper confidence limit is used. With the
estimate itself, a part of the luck stayed in (`python -m benchmarks.statistics`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import special

from tinyllama_lab.report.analysis.comparison import Scored, cell_of
from tinyllama_lab.report.analysis.luck import SeedSpread
from tinyllama_lab.report.analysis.statistics import Array, Ids, compare

_SURE = 0.9  # one-sided confidence of the limit that is used for the luck of a run


def shrunken_losses(
    cells: Sequence[Sequence[Scored]], keys: Sequence[str], spread: SeedSpread
) -> list[float]:
    """Return the mean loss per token of every cell, each pulled towards the mean of all.

    Args:
        cells: trials by cell, in the same order of seeds.
        keys: the swept keys.
        spread: how much losses differ between seeds.
    """
    first = cells[0][0]
    losses = np.array([[trial.losses for trial in trials] for trials in cells])
    names = [cell_of(trials[0].row, keys) for trials in cells]
    return list(map(float, shrunken(losses, first.tokens, first.clusters, names, spread)))


def shrunken(
    losses: Array, tokens: Array, clusters: Ids | None, names: Sequence[str], spread: SeedSpread
) -> Array:
    """Return the shrunken mean losses, `[cells]`.

    Args:
        losses: `[cells, seeds, examples]`, summed over the tokens of an example.
        tokens: `[examples]`.
        clusters: `[examples]`, equal for examples that belong together; None where none do.
        names: of the cells, as in `spread`.
        spread: how much losses differ between seeds.
    """
    cells, seeds, _ = losses.shape
    means = losses.mean(axis=1).sum(axis=1) / tokens.sum()
    left = means - means.mean()
    total = float((left**2).sum())
    if cells < 2 or total == 0:
        return np.asarray(means)
    inflation = _inflation(spread.freedom)
    known = 0.0  # the variance of a cell's mean around that of all, by rows and seeds; summed
    for cell, name in enumerate(names):
        sample = compare(losses[cell] - losses.mean(axis=0), tokens, clusters=clusters).sample
        of_luck = spread.of_mean([name], seeds)[0] * (1 - 1 / cells)  # the mean contains the cell
        # `rest` is the part of the variance over seeds that `error` contains already
        known += sample.error**2 + max(0.0, of_luck - sample.rest) * inflation
    kept = max(0.0, 1 - known / total)  # positive-part James-Stein: never beyond the mean
    return np.asarray(means.mean() + kept * left)


def _inflation(freedom: float) -> float:
    """Return the ratio of the upper confidence limit of a variance to its estimate."""
    return 1.0 if np.isinf(freedom) else float(freedom / special.chdtri(freedom, _SURE))
