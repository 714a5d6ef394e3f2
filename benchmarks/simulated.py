"""Simulated studies whose truth is known, for the benchmarks of the report.

Trials differ by example (heavy tails, skew, clusters, an effect that grows with length), by seed,
and by both. What the report says of them is its own code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from tinyllama_lab.report.analysis.luck import PRIOR, PRIOR_FREEDOM, SeedSpread
from tinyllama_lab.report.analysis.statistics import Array, Estimate, Ids, compare

CLUSTER = 4  # examples
LONGEST = 256  # label tokens


@dataclass(frozen=True)
class World:
    """What the truth is; standard deviations are nats per token."""

    examples: int = 64
    seeds: int = 3
    cells: int = 4  # settings, all run with these seeds
    of_seed: float = 0.02  # of a trial's loss
    from_prior: bool = True  # with one seed, `of_seed` is drawn from the prior
    wild: float = 1.0  # times `of_seed`, in the second setting
    wild_cells: int = 1  # so many have this spread, from the second on
    of_example: float = 0.1  # of a difference
    of_both: float = 0.05  # likewise
    tails: str = "normal"  # normal, t3, t5, skewed
    lengths: str = "even"  # even, log-normal
    growth: float = 0.0  # of the difference, at twice the mean length
    icc: float = 0.0  # share of the variance between examples that clusters of four share


@dataclass(frozen=True, eq=False)
class Draw:
    """One simulated study."""

    losses: Array  # [cells, seeds, examples], summed over the label tokens
    tokens: Array  # [examples]
    clusters: Ids  # [examples]

    @property
    def names(self) -> list[str]:
        """Of the cells."""
        return [str(cell) for cell in range(len(self.losses))]

    @property
    def means(self) -> Array:
        """`[cells, seeds]`, nats per token."""
        return np.asarray(self.losses.sum(axis=2) / self.tokens.sum())

    @cached_property
    def spread(self) -> SeedSpread:
        """What is known of the luck of a run."""
        cells, seeds, _ = self.losses.shape
        if seeds == 1:
            return SeedSpread(PRIOR**2, PRIOR_FREEDOM, cells)
        return SeedSpread.of(dict(zip(self.names, self.means, strict=True)))

    def estimate(self, first: int, second: int) -> Estimate:
        """The second cell beside the first, by the report's own functions."""
        return self._compare([first], [second])

    def half(self, low: tuple[int, int], high: tuple[int, int]) -> Estimate:
        """Half the difference of differences: the step `high` minus the step `low`."""
        return self._compare([low[1], high[0]], [low[0], high[1]])

    def _compare(self, first: list[int], second: list[int]) -> Estimate:
        names = [[str(cell) for cell in side] for side in (first, second)]
        luck = self.spread.luck(names[0], names[1], self.losses.shape[1])
        differences = self.losses[second].mean(axis=0) - self.losses[first].mean(axis=0)
        return compare(differences, self.tokens, luck, self.clusters)


def drawn(world: World, effects: Sequence[float], generator: np.random.Generator) -> Draw:
    """A study in which every cell but the first differs from it by its effect, on average."""
    tokens = lengths(world.lengths, world.examples, generator)
    ids = np.arange(world.examples)
    clusters = ids // CLUSTER if world.icc else ids
    shape = world.cells, world.seeds, world.examples
    luck = np.full((world.cells, 1, 1), world.of_seed)
    if world.seeds == 1 and world.from_prior:
        luck[:] = PRIOR * math.sqrt(PRIOR_FREEDOM / generator.chisquare(PRIOR_FREEDOM))
    luck[1 : 1 + world.wild_cells] *= world.wild
    losses = 2.0 + 0.05 * generator.normal(size=(1, world.seeds, 1))  # what a seed does to all
    losses = losses + luck * generator.normal(size=(*shape[:2], 1))
    losses = losses + world.of_both / math.sqrt(2) * generator.normal(size=shape)
    length, _ = population(world.lengths)
    for cell, effect in list(enumerate(effects))[1:]:
        shared = noise(world.tails, world.examples, generator)[clusters]
        own = noise(world.tails, world.examples, generator)
        mixed = math.sqrt(world.icc) * shared + math.sqrt(1 - world.icc) * own
        longer = world.growth * (tokens / length - 1)
        losses[cell] += effect + world.of_example * mixed + longer
    return Draw(losses * tokens, tokens, clusters)


def lengths(kind: str, count: int, generator: np.random.Generator) -> Array:
    """Label tokens of so many examples."""
    if kind == "even":
        return generator.integers(8, 90, count).astype(np.float64)
    return np.minimum(np.round(generator.lognormal(3.3, 0.7, count)) + 2, LONGEST)


@cache
def population(kind: str) -> tuple[float, float]:
    """The mean length of all examples that there could be, and of the length of a token's own."""
    many = lengths(kind, 1_000_000, np.random.default_rng(0))
    return float(many.mean()), float((many**2).mean() / many.mean())


def noise(tails: str, count: int, generator: np.random.Generator) -> Array:
    """Of mean 0 and standard deviation 1."""
    if tails == "skewed":
        return generator.exponential(size=count) - 1
    if tails == "normal":
        return generator.normal(size=count)
    freedom = int(tails[1:])
    return generator.standard_t(freedom, size=count) / math.sqrt(freedom / (freedom - 2))
