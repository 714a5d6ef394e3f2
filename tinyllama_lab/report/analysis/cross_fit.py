"""The loss of a tuned setting, free of the luck that chose its value.

The lowest of several measured losses is too low: the same rows and the same training runs chose
it and score it. The bias does not cancel in a difference: a setting with a flat curve has several
chances of a low loss, and a setting with one good value has one. Cross-fitting (Chernozhukov et
al. 2018, "Double/debiased machine learning") removes it: for each seed and each half of the
held-out rows, the value is chosen by the other seeds on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from tinyllama_lab.report.analysis.statistics import Array, Ids

Mask = NDArray[np.bool_]
# one setting and seed: the losses `[examples]` of the candidates that finished, by tuned value
Contest = Mapping[str, Array]


def ranking(contests: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the tuned values of one setting, best first, by their mean loss over contests.

    A value that was ended in a contest was behind the others there, so it gets the loss of the
    worst value that finished. Of equal values, the one that finished more often comes first.

    Args:
        contests: for each seed, the losses of the values that finished.
    """
    scored = [contest for contest in contests if contest]

    def rank(value: str) -> tuple[float, int]:
        losses = [contest.get(value, max(contest.values())) for contest in scored]
        return fmean(losses), -sum(value in contest for contest in scored)

    return sorted({value: None for contest in scored for value in contest}, key=rank)


def cross_fitted(contests: Sequence[Contest], half: Mask) -> list[Array]:
    """Return the cross-fitted losses of a setting for each of its seeds, `[examples]`.

    No row and no seed scores a choice that it took part in. With one seed, only the rows are kept
    apart: the luck of its training runs stays in the choice.

    Args:
        contests: for each seed, the summed losses of the values that finished; at least one.
        half: `[examples]`, true for the rows of the first half.
    """
    fitted = []
    for number, contest in enumerate(contests):
        # a single seed must choose for itself, so only the halves of the rows are crossed
        others = [other for at, other in enumerate(contests) if at != number] or [contest]
        by_second, by_first = (_chosen(contest, others, rows) for rows in (~half, half))
        fitted.append(np.where(half, contest[by_second], contest[by_first]))
    return fitted


def _chosen(contest: Contest, others: Sequence[Contest], rows: Mask) -> str:
    """Return the best value by the other seeds on these rows, among those that finished here."""
    losses = [
        {value: float(examples[rows].sum()) for value, examples in other.items()}
        for other in others
    ]
    order = [*ranking(losses), *sorted(contest)]  # the others may have finished none of these
    return next(value for value in order if value in contest)


def first_half(tokens: Array, clusters: Ids | None) -> Mask:
    """Split the held-out rows; clusters stay whole, and both halves have about as many tokens.

    Args:
        tokens: `[examples]`.
        clusters: `[examples]`, equal for rows that belong together; None where none do.

    Returns:
        `[examples]`, true for the rows of the first half.
    """
    ids = np.arange(len(tokens)) if clusters is None else clusters
    _, at = np.unique(ids, return_inverse=True)
    sizes = np.bincount(at, tokens)
    is_first = np.zeros(len(sizes), dtype=bool)
    ahead = 0.0  # tokens of the first half minus those of the second
    # Greedy partition: each cluster goes to the smaller half, the largest clusters first. The sort
    # is stable and nothing is random, so a study always has the same halves.
    for cluster in np.argsort(-sizes, kind="stable"):
        is_first[cluster] = ahead <= 0
        ahead += sizes[cluster] if ahead <= 0 else -sizes[cluster]
    return is_first[at]
