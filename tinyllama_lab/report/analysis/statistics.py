"""Paired comparison of held-out losses: intervals, tests, power.

Two settings (or averages of several) are compared on the same examples and the same seeds. The
difference would change with other examples and with other seeds. Both factors are crossed:
`d[s, i] = difference + seed[s] + example[i] + rest[s, i]`.

- `Sample`: what other examples would change. Examples that belong together are one cluster. The
  margin is that of the jackknife (MacKinnon and White 1985, HC3; Bell and McCaffrey 2002 for
  clusters) or of the studentized bootstrap (Efron 1981), whichever is wider on that side. The
  first is too narrow if differences are skewed, the second if their tails are heavy.
- `Luck`: what other seeds would change. Its variance is pooled over all settings with seeds
  (`tinyllama_lab.report.analysis.luck`), because two or three seeds of one comparison are too few.

Two rules combine the margins. The root of the sum of their squares (MOVER: Zou and Donner,
Statistics in Medicine 27, 2008) is too wide if both variances are known well. An interval with
Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946) is too narrow if one is known
poorly. So their squares are averaged, and MOVER's weight is (2 / degrees of freedom of the luck)³.
`python -m benchmarks.statistics` simulates the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]
Ids = NDArray[np.int64]
RESAMPLES = 2000
ALPHA = 0.05
ONE_SIDED = ALPHA / 2  # what is below a bound at this level has its 95 % interval below it
POWER = 0.8
METHODS = {"holm": "Holm", "fdr_bh": "Benjamini-Hochberg"}
_MOST = 100_000  # seeds or examples up to which a search goes
_LEAST_P = 1e-12  # smaller p-values are 0
_PRIOR_FREEDOM = 4.0  # a weak prior on the luck; chosen by simulation, so that the power is right
_SHARE_BORROWED = 0.6  # of what a setting may borrow, on average; chosen likewise
MOST_BORROWED = 12.0  # degrees of freedom from other settings, whose variances are never equal
LEAST_FREEDOM = 2.0  # degrees of freedom; with fewer, a variance is too uncertain to combine
_MANY = 1e9  # degrees of freedom; Student's t is then the normal distribution
_MORE_SEEDS = (3, 5, 10, 20, 50, 100)  # numbers that a plan of seeds and examples tries
FEW_CLUSTERS = 12  # with fewer, some resamples have two or three, and their pivots explode


@dataclass(frozen=True, eq=False)
class Sample:
    """What other held-out examples would change about a difference (nats per supervised token)."""

    error: float  # standard error, by jackknife
    rest: float  # the part of its square that would vanish with infinitely many seeds
    examples: int
    clusters: int
    plain_error: float  # linearized standard error, the unit of `pivots`
    pivots: Array  # `[resamples]` studentized deviations, sorted; empty with few clusters

    def margins(self, level: float) -> tuple[float, float]:
        """Return how far the interval of this level reaches below and above the difference."""
        tail = (1 - level) / 2
        reach = quantile(1 - tail, self.clusters - 1) * self.error
        if not len(self.pivots):
            return reach, reach
        places = np.array([1 - tail, tail]) * (len(self.pivots) - 1)
        high, low = np.interp(places, np.arange(len(self.pivots)), self.pivots)
        return max(reach, high * self.plain_error), max(reach, -low * self.plain_error)


@dataclass(frozen=True)
class Luck:
    """What other seeds would change about a difference, with one training run on each side."""

    variance: float = 0.0  # nats² per supervised token
    freedom: float = math.inf  # degrees of freedom of `variance`
    cells: float = 2.0  # settings that would contribute to `variance` if more seeds were run
    source: str = ""  # where `variance` is from, if not from seeds of these settings
    known: float = 0.0  # degrees of freedom that stay, whatever seeds are run


@dataclass(frozen=True)
class Estimate:
    """A difference of mean losses, nats per supervised token; below zero, the second is better."""

    difference: float
    sample: Sample
    luck: Luck
    seeds: int

    def margins(self, level: float) -> tuple[float, float]:
        """Return how far the interval of this level reaches below and above the difference."""
        by_sample = np.array(self.sample.margins(level))
        variances = self.sample.error**2, self.luck.variance / self.seeds
        freedoms = self.sample.clusters - 1, self.luck.freedom
        below, above = _with_luck(by_sample, (1 + level) / 2, variances, freedoms)
        return float(below), float(above)

    def interval(self, level: float = 1 - ALPHA) -> tuple[float, float]:
        """Return the confidence interval of the difference."""
        below, above = self.margins(level)
        return self.difference - below, self.difference + above

    def p_differs(self) -> float:
        """Return the two-sided p-value of the hypothesis that the difference is zero."""
        return 2 * min(self.p_below(0.0), self.p_below(0.0, above=True), 0.5)

    def p_below(self, bound: float, above: bool = False) -> float:
        """Return the p-value of the hypothesis that the difference is not below `bound`.

        It is the level at which one end of the interval touches the bound. With `above`, the
        hypothesis is that the difference is not above the bound.
        """
        distance = (self.difference - bound) * (-1 if above else 1)
        if distance > 0:
            return 1 - self._touches(distance, above)
        return self._touches(-distance, not above)

    def _touches(self, distance: float, upwards: bool) -> float:
        """Return the one-sided level at which the margin equals `distance`, by bisection."""
        low, high = _LEAST_P, 0.5
        if distance == 0:
            return high
        if self.margins(1 - 2 * low)[upwards] <= distance:
            return 0.0
        for _ in range(40):  # bisection of log p
            middle = math.sqrt(low * high)
            if self.margins(1 - 2 * middle)[upwards] > distance:
                low = middle
            else:
                high = middle
        return high

    def p_equivalent(self, margin: float) -> float:
        """Return the p-value of the hypothesis that the difference is outside ±`margin`.

        These are two one-sided tests (Schuirmann 1987).
        """
        return max(self.p_below(margin), self.p_below(-margin, above=True))

    def power(self, size: float, seeds: int, examples: int, alpha: float = ALPHA) -> float:
        """Return the power to show a difference of `size` with these seeds and examples.

        It is averaged over the values that the true variance between seeds may have, given its
        estimate, and over the estimates that a new study may then find.

        Args:
            size: nats per token.
            seeds: of the planned study.
            examples: held-out examples of the planned study.
            alpha: level of the two-sided test.
        """
        reach, error = self._planned(seeds, examples, alpha)
        return float(special.ndtr((size - reach) / error).mean())

    def power_equivalent(
        self, margin: float, seeds: int, examples: int, alpha: float = ALPHA
    ) -> float:
        """Return the power to show that equal settings are within ±`margin`; see `power`."""
        reach, error = self._planned(seeds, examples, alpha)
        inside = 2 * special.ndtr((margin - reach) / error) - 1
        return float(np.maximum(inside, 0.0).mean())

    def _planned(self, seeds: int, examples: int, alpha: float) -> tuple[Array, Array]:
        """Return how far the planned interval reaches, and the standard error; see `power`."""
        sample = self.sample
        # the part that is specific to seed and example shrinks with both numbers
        of_sample = sample.error**2 - sample.rest + sample.rest * self.seeds / seeds
        of_sample *= sample.examples / examples
        clusters = sample.clusters * examples / sample.examples
        by_sample = quantile(1 - alpha / 2, clusters - 1) * np.sqrt(of_sample)
        freedom = self._freedom(seeds)
        truths = _spread_of_variance(self.luck.freedom + _PRIOR_FREEDOM)[:, None]
        of_luck = self.luck.variance / seeds / truths
        error = np.sqrt(np.maximum(of_sample + of_luck, 1e-300))
        # [truths, estimates]: each true variance with each estimate that may then be found
        estimated = of_luck * _spread_of_variance(freedom)
        variances, freedoms = (of_sample, estimated), (clusters - 1, freedom)
        return _with_luck(by_sample, 1 - alpha / 2, variances, freedoms), error

    def with_larger_luck(self, chance: float = 0.05) -> Estimate:
        """Return the same estimate with a luck that the true one exceeds by this chance only."""
        if math.isinf(self.luck.freedom):
            return self
        # the lower quantile of a chi-squared variable over its degrees of freedom
        least = float(special.chdtri(self.luck.freedom, 1 - chance)) / self.luck.freedom
        return replace(self, luck=replace(self.luck, variance=self.luck.variance / least))

    def _freedom(self, seeds: int) -> float:
        """Return the degrees of freedom of the variance between seeds in a study with `seeds`."""
        if self.luck.known:
            return self.luck.known + seeds - 1
        if seeds == 1:
            return self.luck.freedom
        of_seeds = seeds - 1
        return of_seeds + _SHARE_BORROWED * min(MOST_BORROWED, of_seeds * (self.luck.cells - 2))

    def seeds_needed(self, size: float, alpha: float = ALPHA) -> int | None:
        """Return the seeds that show `size` on these examples; None if no number suffices."""
        examples = self.sample.examples
        return least_number(lambda seeds: self.power(size, seeds, examples, alpha), 2)

    def examples_needed(self, size: float, alpha: float = ALPHA) -> int | None:
        """Return the examples that show `size` with these seeds; None if no number suffices."""
        return self._examples(size, self.seeds, alpha)

    def both_needed(self, size: float, alpha: float = ALPHA) -> tuple[int, int] | None:
        """Return seeds and examples that show `size` if neither alone does; few seeds first."""
        for seeds in _MORE_SEEDS:
            if examples := self._examples(size, seeds, alpha):
                return seeds, max(examples, self.sample.examples)
        return None

    def _examples(self, size: float, seeds: int, alpha: float) -> int | None:
        least = math.ceil(2 * self.sample.examples / self.sample.clusters)  # two clusters
        return least_number(lambda examples: self.power(size, seeds, examples, alpha), least)


def compare(
    differences: Array, tokens: Array, luck: Luck | None = None, clusters: Ids | None = None
) -> Estimate:
    """Estimate the mean difference per token from the differences of every seed and example.

    Args:
        differences: `[seeds, examples]`, summed loss of the second minus that of the first.
        tokens: `[examples]`, supervised tokens of each example, by which the mean is weighted.
        luck: what other seeds would change; None estimates it from these seeds alone, and with
            one seed leaves it out.
        clusters: `[examples]`, equal for examples that belong together; None where none do.

    Raises:
        ValueError: fewer than two examples or clusters.
    """
    seeds, examples = differences.shape
    ids = np.arange(examples) if clusters is None else clusters
    if len(np.unique(ids)) < 2:
        raise ValueError("a comparison needs at least two examples that do not belong together")
    difference = float(differences.mean(axis=0).sum() / tokens.sum())
    # The mean per token is a ratio of two sums. Its first-order Taylor expansion is a sum over
    # examples (the delta method, or linearization).
    parts = (differences - difference * tokens) / tokens.mean()
    rest = 0.0
    if seeds > 1:
        # residuals of a two-way layout without replication: seeds and examples are crossed
        centred = parts - parts.mean(axis=0) - parts.mean(axis=1, keepdims=True) + parts.mean()
        rest = float((centred**2).sum() / ((seeds - 1) * (examples - 1)) / examples)
    if luck is None:
        by_seed = float(parts.mean(axis=1).var(ddof=1)) if seeds > 1 else 0.0
        luck = Luck(by_seed, seeds - 1 if seeds > 1 else math.inf)
    # The variance of a mean over examples contains `rest`, which `sample` has already; without
    # this, it would count twice.
    luck = replace(luck, variance=max(0.0, luck.variance - rest))
    sample = _sample(differences.mean(axis=0), tokens, ids, rest / seeds)
    return Estimate(difference, sample, luck, seeds)


def _sample(every: Array, tokens: Array, clusters: Ids, rest: float) -> Sample:
    """Return the sampling error of the mean over examples, by jackknife and bootstrap."""
    _, at = np.unique(clusters, return_inverse=True)
    count = int(at.max()) + 1
    sums: Array = np.bincount(at, every).astype(np.float64)
    weights: Array = np.bincount(at, tokens).astype(np.float64)
    total = weights.sum()
    left = sums - sums.sum() / total * weights
    few = count < FEW_CLUSTERS and count < len(tokens)
    # HC3 divides by 1 − leverage. With few true clusters that is too wide, and the square root
    # (HC2, Bell and McCaffrey 2002) is used.
    leverage = (1 - weights / total) ** (0.5 if few else 1.0)
    error = math.sqrt(((left / leverage) ** 2).sum()) / total
    plain = math.sqrt((left**2).sum() * count / (count - 1)) / total
    pivots = np.empty(0) if few or plain == 0 else _pivots(sums, weights, count)
    return Sample(error, min(rest, error**2), len(tokens), count, plain, pivots)


def _pivots(sums: Array, weights: Array, count: int) -> Array:
    """Return the studentized deviations of resampled means, sorted.

    If few clusters differ at all, as with right and wrong answers, some resamples contain none of
    these and have no spread. They get the spread of a single cluster, which keeps the interval
    finite.
    """
    # moments suffice: a matmul with the drawn counts gives every resample's mean and variance
    moments = np.stack([sums, weights, sums**2, sums * weights, weights**2], axis=1)
    a, b, aa, ab, bb = (_draws(count) @ moments).T
    means = a / b
    squares = aa - 2 * means * ab + means**2 * bb
    has_none = squares < 1e-9 * np.median(squares[squares > 0])  # rounding alone
    squares[has_none] = (sums[sums != 0] ** 2).min()
    errors = np.sqrt(squares * count / (count - 1)) / b
    return np.sort((means - sums.sum() / weights.sum()) / errors)


def resampled_means(sums: Array, tokens: Array, clusters: Ids | None) -> tuple[Array, int]:
    """Return means per token with other examples, `[resamples, settings]`, and the cluster count.

    Args:
        sums: `[settings, examples]`, summed over the tokens.
        tokens: `[examples]`.
        clusters: `[examples]`, equal for examples that belong together; None where none do.
    """
    ids = np.arange(len(tokens)) if clusters is None else clusters
    _, at = np.unique(ids, return_inverse=True)
    count = int(at.max()) + 1
    totals = np.stack([np.bincount(at, row) for row in (*sums, tokens)], axis=1)
    drawn = _draws(count) @ totals
    return drawn[:, :-1] / drawn[:, -1:], count


def quantile(p: float, freedom: float) -> float:
    """Return a quantile of Student's t, or of the normal distribution if `freedom` is infinite."""
    if math.isinf(freedom):
        return float(special.ndtri(p))
    return float(special.stdtrit(max(freedom, 1.0), p))


def _with_luck(
    by_sample: Array,
    p: float,
    variances: tuple[float, Array | float],
    freedoms: tuple[float, float],
) -> Array:
    """Return the margins of the examples, widened by what other seeds would change.

    Args:
        by_sample: the margins of the examples.
        p: the probability below the upper end of the interval, such as 0.975.
        variances: of the difference, by its examples and by the luck.
        freedoms: the degrees of freedom of the two.
    """
    of_sample, of_luck = variances
    clusters, luck = max(freedoms[0], 1.0), freedoms[1]
    by_luck = quantile(p, luck) * np.sqrt(of_luck)
    if luck < LEAST_FREEDOM:
        # Such a variance is often far too small by chance, so the margins are added. Their sum is
        # wider than the root of the sum of their squares.
        return np.asarray(by_sample + by_luck)
    both = of_sample + of_luck
    together = both**2 / np.maximum(of_sample**2 / clusters + of_luck**2 / luck, 1e-300)
    satterthwaite = special.stdtrit(np.clip(together, 1.0, _MANY), p) ** 2 * both
    satterthwaite -= quantile(p, clusters) ** 2 * of_sample
    share = min(1.0, (LEAST_FREEDOM / luck) ** 3)
    added = share * by_luck**2 + (1 - share) * np.maximum(satterthwaite, 0.0)
    return np.asarray(np.sqrt(by_sample**2 + added))


@lru_cache(maxsize=512)
def _spread_of_variance(freedom: float) -> Array:
    """Return equally likely values of an estimated variance relative to the true one."""
    if math.isinf(freedom):
        return np.ones(1)
    chances = (np.arange(64) + 0.5) / 64
    return np.asarray(special.chdtri(freedom, 1 - chances) / freedom)


def adjusted(p_values: Sequence[float], method: str = "holm") -> list[float]:
    """Return p-values corrected for their number: `holm` or `fdr_bh` (Benjamini and Hochberg)."""
    if len(p_values) < 2:
        return list(p_values)
    from statsmodels.stats.multitest import multipletests  # late: most of a second of imports

    return [float(p) for p in multipletests(p_values, alpha=ALPHA, method=method)[1]]


@lru_cache(maxsize=8)
def _draws(count: int) -> Array:
    """Return how often each cluster is drawn, `[resamples, clusters]`; equal in every report."""
    generator = np.random.default_rng(0)  # a fixed seed: the same study has the same intervals
    even = np.full(count, 1 / count)
    return generator.multinomial(count, even, size=RESAMPLES).astype(np.float64)


def least_number(
    power: Callable[[int], float], least: int, wanted: float = POWER, most: int = _MOST
) -> int | None:
    """Return the smallest number with enough power; None if `most` is too few.

    Args:
        power: of a number; it grows with the number.
        least: the smallest number that is tried.
        wanted: the power to reach.
        most: the largest number that is tried.
    """
    high = least
    while power(high) < wanted:
        if high >= most:
            return None
        high = min(2 * high, most)
    low = max(least, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if power(middle) < wanted else (low, middle)
    return high
