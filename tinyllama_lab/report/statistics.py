"""Paired comparison of held-out losses: intervals, tests, power.

Two trials (or averages of several) are compared on the same examples, and where there are seeds,
on the same seeds. Their differences vary with the seed, with the example, and with both:
`d[s, i] = difference + seed[s] + example[i] + rest[s, i]`, both factors crossed. The part of the
examples is bootstrapped; two to five seeds are too few for that, so their part is the variance
between them, and Welch and Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946) pay
for not knowing it well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

Array = NDArray[np.float64]
RESAMPLES = 2000
ALPHA = 0.05
ONE_SIDED = ALPHA / 2  # then what is within a margin has its 95 % interval within it
POWER = 0.8
METHODS = {"holm": "Holm", "fdr_bh": "Benjamini-Hochberg"}
_MOST = 100_000  # seeds or examples; nobody has more


@dataclass(frozen=True)
class Spread:
    """Variances of a difference (nats² a label token²): between seeds, examples, and the rest."""

    seed: float
    example: float
    rest: float
    seeds: int
    examples: int

    def error(self, seeds: int, examples: int) -> float:
        """The standard error that so many seeds and examples would give."""
        parts = self.seed / seeds, self.example / examples, self.rest / (seeds * examples)
        return math.sqrt(sum(parts))

    def freedom(self, seeds: int, examples: int) -> float:
        """Degrees of freedom of that error; infinite where nothing varies."""
        rest = self.rest / (seeds * examples)
        by_seed, by_example = self.seed / seeds + rest, self.example / examples + rest
        unsure = by_example**2 / (examples - 1)
        if seeds > 1:
            unsure += by_seed**2 / (seeds - 1) + rest**2 / ((seeds - 1) * (examples - 1))
        return math.inf if not unsure else self.error(seeds, examples) ** 4 / unsure


@dataclass(frozen=True)
class Estimate:
    """A difference of mean losses in nats a label token; below zero, the second is better."""

    difference: float
    spread: Spread

    @property
    def error(self) -> float:
        """The standard error."""
        return self.spread.error(self.spread.seeds, self.spread.examples)

    @property
    def freedom(self) -> float:
        """Its degrees of freedom."""
        return self.spread.freedom(self.spread.seeds, self.spread.examples)

    def interval(self, level: float = 1 - ALPHA) -> tuple[float, float]:
        """The confidence interval of the difference."""
        reach = float(stats.t.ppf((1 + level) / 2, self.freedom)) * self.error
        return self.difference - reach, self.difference + reach

    def p_differs(self) -> float:
        """Of the hypothesis that the difference is zero, two-sided."""
        return 2 * min(self.p_below(0.0), self.p_below(0.0, above=True), 0.5)

    def p_below(self, bound: float, above: bool = False) -> float:
        """Of the hypothesis that the difference is not below `bound` (or not above it)."""
        distance = (self.difference - bound) * (-1 if above else 1)
        if self.error == 0:
            return 0.0 if distance < 0 else 1.0
        return float(stats.t.cdf(distance / self.error, self.freedom))

    def p_equivalent(self, margin: float) -> float:
        """Two one-sided tests (Schuirmann 1987): that it is not within plus or minus `margin`."""
        return max(self.p_below(margin), self.p_below(-margin, above=True))

    def power(self, size: float, seeds: int, examples: int, alpha: float = ALPHA) -> float:
        """The chance to show a true difference of `size` with so many seeds and examples."""
        error = self.spread.error(seeds, examples)
        if error == 0:
            return 1.0
        freedom = min(self.spread.freedom(seeds, examples), 1e6)
        # the side that is right: the other adds nothing, and overflows
        right = {"alpha": alpha / 2, "alternative": "larger"}
        return float(TTestPower().power(size / error, nobs=1, df=freedom, **right))

    def seeds_needed(self, size: float, alpha: float = ALPHA) -> int | None:
        """Seeds to show `size` on these examples; None with one seed, or if none would do."""
        if self.spread.seeds < 2:
            return None
        examples = self.spread.examples
        return _least(lambda seeds: self.power(size, seeds, examples, alpha), 2)

    def examples_needed(self, size: float, alpha: float = ALPHA) -> int | None:
        """Examples to show `size` with these seeds; None if no number would do."""
        return _least(lambda examples: self.power(size, self.spread.seeds, examples, alpha), 2)


def compare(differences: Array, tokens: Array) -> Estimate:
    """Estimate the mean difference a token from those of every seed and example.

    Args:
        differences: `[seeds, examples]`, summed loss of the second minus that of the first.
        tokens: `[examples]`, label tokens of each example; the mean weighs by them.

    Raises:
        ValueError: fewer than two examples.
    """
    seeds, examples = differences.shape
    if examples < 2:
        raise ValueError("a comparison needs at least two examples")
    difference = float(differences.mean(axis=0).sum() / tokens.sum())
    # what each example adds to the ratio of two sums, linear around it (Taylor)
    parts = (differences - difference * tokens) / tokens.mean()
    rest = 0.0
    if seeds > 1:
        centred = parts - parts.mean(axis=0) - parts.mean(axis=1, keepdims=True) + parts.mean()
        rest = float((centred**2).sum() / ((seeds - 1) * (examples - 1)))
    by_example = _bootstrapped_variance(differences.mean(axis=0), tokens) * examples
    by_seed = float(parts.mean(axis=1).var(ddof=1)) if seeds > 1 else 0.0
    spread = Spread(
        seed=max(0.0, by_seed - rest / examples),
        example=max(0.0, by_example - rest / seeds),
        rest=rest,
        seeds=seeds,
        examples=examples,
    )
    return Estimate(difference, spread)


def adjusted(p_values: Sequence[float], method: str = "holm") -> list[float]:
    """P-values corrected for their number: `holm` or `fdr_bh` (Benjamini and Hochberg)."""
    if not p_values:
        return []
    return [float(p) for p in multipletests(p_values, alpha=ALPHA, method=method)[1]]


def _bootstrapped_variance(sums: Array, tokens: Array) -> float:
    """Of the mean a token, over examples drawn with replacement."""
    weights = _draws(len(tokens))
    means = (weights @ sums) / (weights @ tokens)
    return float(means.var(ddof=1)) * len(tokens) / (len(tokens) - 1)


@lru_cache(maxsize=8)
def _draws(examples: int) -> Array:
    """How often each example is drawn, `[resamples, examples]`; the same in every report."""
    generator = np.random.default_rng(0)
    even = np.full(examples, 1 / examples)
    return generator.multinomial(examples, even, size=RESAMPLES).astype(np.float64)


def _least(power: Callable[[int], float], least: int) -> int | None:
    """The smallest number with enough power, which grows with it."""
    high = least
    while power(high) < POWER:
        if high >= _MOST:
            return None
        high *= 2
    low = max(least, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if power(middle) < POWER else (low, middle)
    return high
