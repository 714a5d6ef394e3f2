"""The held-out loss as a function of a swept number: a curve, where it flattens, twice as much.

With three or more levels, the question is not which of two is better. The loss is fitted by a
power law `a + b·x^(−c)` and by a monotone step curve (isotonic regression). The one that predicts
each inner level better from the other levels is used (leave one level out). Three levels always
lie on a power law, so it cannot be checked there. Nothing is extrapolated beyond the largest level
unless the loss was shown to fall from the smallest to the largest.

Intervals combine resampled clusters of examples, the same resamples as everywhere, and the luck of
a training run from `luck.py`. The mean of all levels is held fixed in every resample: the band
shows what is known of the shape, not how hard these examples are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import special

from tinyllama_lab.config.axes import show, words
from tinyllama_lab.report.analysis.comparison import Comparison, Scored, cell_of, shared_seeds
from tinyllama_lab.report.analysis.contrasts import (
    are_numbers,
    mean_estimate,
    name_of,
    schedule_note,
    values_of,
)
from tinyllama_lab.report.analysis.luck import seed_spread
from tinyllama_lab.report.analysis.measure import NATS, Measure, between
from tinyllama_lab.report.analysis.statistics import (
    ALPHA,
    RESAMPLES,
    Array,
    Estimate,
    Ids,
    compare,
    quantile,
    resampled_means,
)

LEAST_LEVELS = 3
POWER_LAW, MONOTONE = "power law", "monotone curve"
NEITHER = "neither falls nor rises throughout"
# Settings of which more costs more, so that extrapolation is a question. For others, such as the
# learning rate, only the best value is of interest.
RESOURCES = ("data.n", "lora.r", "train.epochs", "train.max_steps")
# The grid of exponents c. Near 0 the law is a logarithm. Some exponents are below 0, so that the
# resamples of a logarithm scatter to both sides of it; without these, the interval holds the truth
# in only 72 to 92 % of studies.
_EXPONENTS = np.array([-0.1, -0.05, -0.02, *np.geomspace(0.02, 3.0, 50)])
_POINTS = 40  # points of a drawn curve
_ROUNDING = 1e-12  # sums of squares below it are rounding errors
_MOST_FREEDOM = 1e6  # stands for infinity, which the chi-square quantile cannot take


@dataclass(frozen=True, eq=False)
class ScalingCurve:
    """A fitted curve with the band of its resamples."""

    x: Array
    y: Array
    low: Array
    high: Array


@dataclass(frozen=True, eq=False)
class Scaling:
    """The loss over the levels of one key, in the unit of `measure`, and its interpretation."""

    key: str
    levels: list[float]
    losses: Array  # [levels], mean over all else
    low: Array  # [levels], ends of the 95 % intervals
    high: Array
    law: str  # `POWER_LAW`, `MONOTONE` or `NEITHER`
    curve: ScalingCurve
    note: str  # whether levels had equal epochs or equal steps; empty if that is clear
    whole: Estimate  # the loss of the largest level minus that of the smallest
    doubled: tuple[float, float, float] | None  # change at twice the largest, with its interval
    flat_from: float | None  # smallest level that was shown to be within the margin of the largest
    last_step: Estimate  # the loss of the second largest level minus that of the largest
    margin: float

    where: dict[str, Any]  # values of other keys, where the losses were not averaged over them
    measure: Measure = NATS

    @property
    def sentence(self) -> str:
        """Where the loss flattens, and what twice the largest level would bring."""
        schedule = [self.note.partition(":")[0]] if self.note else []
        where = [f"at {words(self.where)}"] if self.where else []
        aside = f" ({', '.join([*schedule, *where])})" if schedule or where else ""
        start = f"{name_of(self.key)}{aside}: "
        if self.law != NEITHER and self.key in RESOURCES:
            return f"{start}{_flat_words(self)}; {_doubled_words(self)}"
        best = show(self.levels[int(self.losses.argmin())])
        turns = f"the loss {NEITHER}, " if self.law == NEITHER else ""
        return f"{start}{turns}{'it' if turns else 'the loss'} is lowest at {best}"


def scalings(
    comparison: Comparison, margin: float, fixed: Mapping[str, dict[str, Any]]
) -> list[Scaling]:
    """Fit each swept positive number that has three or more levels in a full grid.

    Args:
        comparison: the trials that are compared.
        margin: nats per token.
        fixed: by key, values of other keys that are kept instead of averaging over them.
    """
    results, margin = [], comparison.measure.margin(margin)
    for key in comparison.keys:
        levels = values_of(comparison, key)
        is_curve = len(levels) >= LEAST_LEVELS and are_numbers(levels) and min(levels) > 0
        if not is_curve or key.startswith("eval."):
            continue
        where = fixed.get(key, {})
        if grid := _grid(comparison, key, levels, where):
            scaling = _scaling(comparison, key, [float(x) for x in levels], grid, margin)
            results.append(replace(scaling, where=where, measure=comparison.measure))
    return results


Grid = list[list[list[Scored]]]  # by level, cell, and seed; the cells in the same order


def _grid(
    comparison: Comparison, key: str, levels: Sequence[float], where: Mapping[str, Any]
) -> Grid | None:
    """Return the cells that were run at every level, on the seeds that most of them share."""
    by_rest: dict[str, dict[str, dict[object, Scored]]] = {}
    for trial in comparison.trials:
        if any(show(trial.row.swept.get(other)) != show(where[other]) for other in where):
            continue
        rest = by_rest.setdefault(cell_of(trial.row, comparison.keys, key), {})
        rest.setdefault(show(trial.row.swept.get(key)), {})[trial.seed] = trial
    whole = [rest for rest in by_rest.values() if len(rest) == len(levels)]
    common = [frozenset.intersection(*map(frozenset, rest.values())) for rest in whole]
    seeds = shared_seeds(common)
    ordered = sorted(seeds, key=str)
    kept = [rest for rest, shared in zip(whole, common, strict=True) if seeds and seeds <= shared]
    grid = [[[rest[show(x)][seed] for seed in ordered] for rest in kept] for x in levels]
    return grid if kept else None


def _scaling(
    comparison: Comparison, key: str, levels: list[float], grid: Grid, margin: float
) -> Scaling:
    losses, draws = _resampled(comparison, grid)
    x = np.array(levels)
    law = chosen_law(x, losses, draws)
    # a power law would go on falling, which a learning rate does not
    law = MONOTONE if law == POWER_LAW and key not in RESOURCES else law
    whole = mean_estimate(list(zip(grid[0], grid[-1], strict=True)), comparison)
    curve, doubled = fitted(x, losses, draws, law, falls_for_sure(whole))
    low, high = _interval(losses, draws)
    steps = [
        mean_estimate(list(zip(grid[-1], cells, strict=True)), comparison) for cells in grid[:-1]
    ]
    return Scaling(
        key=key,
        levels=levels,
        losses=losses,
        low=low,
        high=high,
        law=law,
        curve=curve,
        note=schedule_note(key, [t for cells in grid for seeds in cells for t in seeds]),
        whole=whole,
        doubled=doubled,
        flat_from=_flat_from(levels, steps, margin),
        last_step=steps[-1],
        margin=margin,
        where={},
    )


def falls_for_sure(whole: Estimate) -> bool:
    """Whether several seeds show the loss of the largest level to be below that of the smallest.

    Otherwise the slope that would be extrapolated may be noise.
    """
    return whole.seeds > 1 and whole.interval()[1] < 0


def _flat_from(levels: Sequence[float], steps: Sequence[Estimate], margin: float) -> float | None:
    """Return the smallest level that was shown to be within the margin of the largest, else None.

    Levels are tested from the largest downwards until one is not shown. A fixed order of tests
    needs no correction.

    Args:
        levels: ascending.
        steps: for each level but the last, its loss minus that of the last.
        margin: nats per token.
    """
    flat = None
    for level, step in zip(levels[-2::-1], steps[::-1], strict=True):
        if step.interval()[1] > margin:
            break
        flat = level
    return flat


def _resampled(comparison: Comparison, grid: Grid) -> tuple[Array, Array]:
    trials = np.array([[[t.losses for t in seeds] for seeds in cells] for cells in grid])
    first, seeds, spread = grid[0][0][0], trials.shape[2], seed_spread(comparison)
    deviations = trials.mean(axis=1) - trials.mean(axis=(0, 1))  # [levels, seeds, examples]
    luck, freedoms = np.empty(len(grid)), np.empty(len(grid))
    for level, cells in enumerate(grid):
        names = [cell_of(cell[0].row, comparison.keys) for cell in cells]
        variance, freedoms[level] = spread.of_mean(names, seeds)
        rest = compare(deviations[level], first.tokens, clusters=first.clusters).sample.rest
        luck[level] = max(0.0, variance - rest)
    sums = trials.mean(axis=(1, 2))
    return resampled(sums, first.tokens, first.clusters, luck, freedoms)


def resampled(
    sums: Array, tokens: Array, clusters: Ids | None, luck: Array, freedoms: Array
) -> tuple[Array, Array]:
    """Return mean losses `[levels]`, and what other studies would find, `[resamples, levels]`.

    Args:
        sums: `[levels, examples]`, summed over the tokens of an example.
        tokens: `[examples]`.
        clusters: `[examples]`, equal for those that belong together.
        luck: `[levels]`, variance of a level's mean loss over other seeds.
        freedoms: `[levels]`, degrees of freedom of `luck`.
    """
    losses = np.asarray(sums.sum(axis=1) / tokens.sum())
    means, count = resampled_means(sums, tokens, clusters)
    # percentile intervals ignore that few clusters make a t distribution; widen the resamples
    wider = quantile(1 - ALPHA / 2, count - 1) / quantile(1 - ALPHA / 2, math.inf)
    bounded, generator = np.minimum(freedoms, _MOST_FREEDOM), np.random.default_rng(0)
    # freedom/chi² is the distribution of a true variance relative to its estimate. All levels of a
    # resample have one draw, since their variances share the part that is pooled.
    unsure = np.sqrt(bounded / special.chdtri(bounded, generator.uniform(size=(RESAMPLES, 1))))
    lucky = unsure * np.sqrt(luck) * generator.normal(size=means.shape)
    moved = (means - losses) * wider + lucky
    # the mean over levels is held fixed, so that the draws vary in shape only
    return losses, losses + moved - moved.mean(axis=1, keepdims=True)


def _interval(values: Array, draws: Array) -> tuple[Array, Array]:
    """Return the 95 % interval of each column, widened to contain the value itself."""
    low, high = np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2], axis=0)
    return np.minimum(low, values), np.maximum(high, values)


def chosen_law(x: Array, losses: Array, draws: Array) -> str:
    """Return the law that describes the losses; `NEITHER` if they turn by more than noise.

    Args:
        x: `[levels]`, ascending.
        losses: `[levels]`.
        draws: `[resamples, levels]`, as `resampled` returns them.
    """
    falls = bool(losses[0] > losses[-1])
    steps = _monotone(losses[None], falls)[0]
    # the resamples, centred on the monotone curve: how far from monotone does noise make them?
    moved = draws - losses + steps
    turns_of_noise = ((moved - _monotone(moved, falls)) ** 2).sum(axis=1)
    turns = float(((losses - steps) ** 2).sum())
    if turns > _ROUNDING and (turns_of_noise >= turns).mean() < ALPHA:
        return NEITHER
    if len(x) == LEAST_LEVELS:
        return POWER_LAW
    errors = {POWER_LAW: 0.0, MONOTONE: 0.0}
    for level in range(1, len(x) - 1):
        others = np.delete(np.arange(len(x)), level)
        ours, theirs = x[others], losses[None, others]
        power = _power_at(x[[level]], *_power_law(ours, theirs), scale=ours[-1])[0, 0]
        # levels are usually spaced by factors, so steps are interpolated over the logarithm
        step = np.interp(math.log(x[level]), np.log(ours), _monotone(theirs, falls)[0])
        errors[POWER_LAW] += (power - losses[level]) ** 2
        errors[MONOTONE] += (step - losses[level]) ** 2
    return min(errors, key=lambda law: errors[law])


def fitted(
    x: Array, losses: Array, draws: Array, law: str, goes_on: bool
) -> tuple[ScalingCurve, tuple[float, float, float] | None]:
    """Return the curve with its band, and the change of the loss at twice the largest level.

    The change comes with its 95 % interval; it is None unless a power law is extrapolated.

    Args:
        x: `[levels]`, ascending.
        losses: `[levels]`.
        draws: `[resamples, levels]`, as `resampled` returns them.
        law: as `chosen_law` returns it.
        goes_on: whether a power law is extrapolated to twice the largest level.
    """
    rows = np.vstack([losses, draws])
    if law != POWER_LAW:
        levels = rows if law == NEITHER else _monotone(rows, bool(losses[0] > losses[-1]))
        return ScalingCurve(x, levels[0], *_interval(levels[0], levels[1:])), None
    at = np.geomspace(x[0], 2 * x[-1] if goes_on else x[-1], _POINTS)
    fits = _power_law(x, rows)
    every = _power_at(at, *fits, scale=x[-1])
    curve = ScalingCurve(at, every[0], *_interval(every[0], every[1:]))
    if not goes_on:
        return curve, None
    ends = _power_at(np.array([x[-1], 2 * x[-1]]), *fits, scale=x[-1])
    change = ends[:, 1] - ends[:, 0]
    low, high = np.quantile(change[1:], [ALPHA / 2, 1 - ALPHA / 2])
    return curve, (float(change[0]), float(low), float(high))


def _monotone(rows: Array, falls: bool) -> Array:
    """Isotonic regression of every row by the min-max formula (Robertson et al. 1988)."""
    values = -rows if falls else rows
    levels = values.shape[1]
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    best = np.full(values.shape, -np.inf)
    for start in range(levels):
        means = (sums[:, start + 1 :] - sums[:, [start]]) / np.arange(1, levels - start + 1)
        least = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
        best[:, start:] = np.maximum(best[:, start:], least)
    return -best if falls else best


def _power_law(x: Array, rows: Array) -> tuple[Array, Array, Array]:
    """Fit `a + b·(x/largest)^(−c)` to every row by least squares; returns `a`, `b` and `c`.

    The fit is linear for each exponent, so the best of a grid of exponents is taken. Each row may
    fall or rise: a resample that is forced to go the way of the losses would hide that they may
    not.
    """
    powers = (x / x[-1]) ** -_EXPONENTS[:, None]  # [exponents, levels]
    centred = powers - powers.mean(axis=1, keepdims=True)
    squares = (centred**2).sum(axis=1)
    products = rows @ centred.T  # [rows, exponents]
    best = (products**2 / squares).argmax(axis=1)  # the best explained sum of squares
    slopes = products[np.arange(len(rows)), best] / squares[best]
    return rows.mean(axis=1) - slopes * powers.mean(axis=1)[best], slopes, _EXPONENTS[best]


def _power_at(x: Array, start: Array, slope: Array, exponent: Array, *, scale: float) -> Array:
    """Return the losses of every fit at `x`, `[fits, x]`."""
    return start[:, None] + slope[:, None] * (x / scale) ** -exponent[:, None]


def _flat_words(scaling: Scaling) -> str:
    largest, before = show(scaling.levels[-1]), show(scaling.levels[-2])
    if scaling.flat_from is not None:
        return (
            f"{show(scaling.flat_from)} is enough, {largest} is not better by more than "
            f"{scaling.margin:g} {scaling.measure.unit}"
        )
    step = f"the loss of {before} is {scaling.measure.words(scaling.last_step)}"
    if scaling.last_step.interval()[0] > scaling.margin:
        return f"not flat yet at {largest} ({step})"
    return f"whether it is flat at {largest} was not shown ({step})"


def _doubled_words(scaling: Scaling) -> str:
    smallest, largest = show(scaling.levels[0]), show(scaling.levels[-1])
    if scaling.law != POWER_LAW:
        return f"steps fit the losses better than a power law, so nothing is said beyond {largest}"
    if scaling.doubled is None:
        why = (
            f"no fall of the loss from {smallest} to {largest} was shown "
            f"({scaling.measure.words(scaling.whole)})"
        )
        if scaling.whole.interval()[1] < 0:
            why = "one seed is too little to extrapolate from"
        return f"what {show(2 * scaling.levels[-1])} would bring is not known, since {why}"
    change, low, high = scaling.doubled
    checked = f"by a power law, which fits the {len(scaling.levels)} levels better than steps"
    if len(scaling.levels) == LEAST_LEVELS:
        checked = "by a power law, which cannot be checked with three levels"
    return (
        f"at {show(2 * scaling.levels[-1])}, twice the largest, the loss would be about "
        f"{scaling.measure.change(change)} (95 % interval: {between(low, high)}; extrapolated "
        f"{checked})"
    )
