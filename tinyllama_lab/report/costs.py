"""What a setting costs beside another, and which differences are more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from tinyllama_lab.report.comparable import Scored

COSTS = {
    "time": "perf/train_seconds",
    "memory": "memory/train_peak_mib",
    "size": "size/adapter_mib",
    "decode": "perf/decode_tokens_per_s",  # the only one of which more is better
}


def mean_costs(pairs: Sequence[tuple[Scored, Scored]]) -> dict[str, tuple[float, float]]:
    """By name of the cost, its mean over the first and over the second of all pairs."""
    costs = {}
    for cost, metric in COSTS.items():
        sides = []
        for side in (0, 1):
            values = [pair[side].metric(metric) for pair in pairs]
            known = [value for value in values if value is not None]
            sides.append(fmean(known) if known else None)
        if sides[0] is not None and sides[1] is not None:
            costs[cost] = (sides[0], sides[1])
    return costs


def moving_costs(pairs: Sequence[tuple[Scored, Scored]]) -> frozenset[str]:
    """The costs that rise in every pair, or fall in every pair, by more than they spread."""
    return frozenset(cost for cost, metric in COSTS.items() if _moves(pairs, metric))


def _moves(pairs: Sequence[tuple[Scored, Scored]], metric: str) -> bool:
    spans = [(_span(first, metric), _span(second, metric)) for first, second in pairs]
    rises = all(before[1] < after[0] for before, after in spans)
    return rises or all(after[1] < before[0] for before, after in spans)


def _span(trial: Scored, metric: str) -> tuple[float, float]:
    """Lowest and highest of its repeats; one that was not measured tells nothing."""
    value = trial.metric(metric)
    if value is None:
        return -math.inf, math.inf
    low, high = trial.metric(f"{metric}_min"), trial.metric(f"{metric}_max")
    return value if low is None else low, value if high is None else high
