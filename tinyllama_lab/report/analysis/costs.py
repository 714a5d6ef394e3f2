"""What a setting costs compared with another, and which differences are more than noise.

Trials of a pack share time and memory, so their costs are counted: the FLOPs of their own tokens,
and the memory that the planner predicts for one of them alone. Measured costs (the seconds of a
trial that trained alone, decoding speed) have noise, which is estimated from trials of one cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

import numpy as np

from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.comparison import Comparison, Scored
from tinyllama_lab.report.analysis.statistics import ALPHA, quantile

_OF_MODEL = ("model.", "quant.", "lora.")  # keys that decide what a model computes
SAME_COST = 1.05  # costs whose ratio is at most this count as equal


@dataclass(frozen=True)
class Noise:
    """How much a cost differs between trials of the same setting."""

    deviation: float = 0.0  # standard deviation of its logarithm; 0 if it is counted
    freedom: float = math.inf  # degrees of freedom of `deviation`

    def ratio(self, pairs: int) -> float:
        """Return the largest ratio of two means over `pairs` trials each that may be noise."""
        # the difference of two means of logarithms has the variance 2·deviation²/pairs
        reach = quantile(1 - ALPHA / 2, self.freedom) * self.deviation * math.sqrt(2 / pairs)
        return max(SAME_COST, math.exp(min(reach, 700.0)))  # exp(710) overflows


@lru_cache(maxsize=2)
def noises(comparison: Comparison) -> dict[str, Noise]:
    """Return the noise of every cost; for measured costs, from trials of the same cell."""
    known = {cost: Noise() for cost in COSTS}
    measured = [cost for cost in COSTS.values() if cost.log_deviation]
    for cost in measured:
        squares, freedom = 0.0, 0
        for trials in comparison.cells().values():
            values = [value for trial in trials if (value := cost_of(trial, cost.name))]
            if len(values) > 1:
                squares += float(np.var(np.log(values))) * len(values)
                freedom += len(values) - 1
        # with one degree of freedom the t quantile is 12.7, and hardly any ratio exceeds the noise
        if freedom > 1:
            known[cost.name] = Noise(math.sqrt(squares / freedom), freedom)
        else:
            known[cost.name] = Noise(cost.log_deviation)
    return known


def cost_of(trial: Scored, cost: str) -> float | None:
    """Return what a trial cost; None where its own share is not known."""
    if cost == "time" and trial.is_packed:
        return None
    value = trial.metric(COSTS[cost].metric)
    if value is None and cost == "memory" and not trial.is_packed:
        return trial.metric("memory/train_peak_mib")  # older results predict none; it ran alone
    return value


def mean_costs(pairs: Sequence[tuple[Scored, Scored]]) -> dict[str, tuple[float, float]]:
    """Return by cost its mean over the first and over the second trials of all pairs."""
    costs = {}
    for cost in COSTS:
        sides = []
        for side in (0, 1):
            values = [cost_of(pair[side], cost) for pair in pairs]
            known = [value for value in values if value is not None]
            sides.append(fmean(known) if known else None)
        if sides[0] is not None and sides[1] is not None:
            costs[cost] = (sides[0], sides[1])
    return costs


def moving_costs(
    key: str, pairs: Sequence[tuple[Scored, Scored]], noise: Mapping[str, Noise]
) -> frozenset[str]:
    """Return the costs that move the same way in every pair, and on average beyond noise.

    How fast a model writes depends on the model alone: for other keys, a difference is the load
    of the machine.
    """
    may_move = [cost for cost in COSTS if cost != "decode" or key.startswith(_OF_MODEL)]
    return frozenset(cost for cost in may_move if _moves(pairs, cost, noise[cost]))


def _moves(pairs: Sequence[tuple[Scored, Scored]], cost: str, noise: Noise) -> bool:
    # where a measurement was repeated, all repeats of one side must lie beyond those of the other
    spans = [(_span(first, cost), _span(second, cost)) for first, second in pairs]
    rises = all(before[1] < after[0] for before, after in spans)
    if not rises and not all(after[1] < before[0] for before, after in spans):
        return False
    ratios = [_ratio(first, second, cost) for first, second in pairs]
    return abs(fmean(ratios)) > math.log(noise.ratio(len(pairs)))


def _ratio(first: Scored, second: Scored, cost: str) -> float:
    before, after = cost_of(first, cost), cost_of(second, cost)
    return math.log(after / before) if before and after else 0.0


def _span(trial: Scored, cost: str) -> tuple[float, float]:
    """Return the lowest and highest of its repeats; infinite bounds if it was not measured."""
    value = cost_of(trial, cost)
    if value is None:
        return -math.inf, math.inf
    low, high = (trial.metric(f"{COSTS[cost].metric}_{end}") for end in ("min", "max"))
    return value if low is None else low, value if high is None else high
