"""How often the report is right, on simulated studies whose truth is known.

    python -m benchmarks.statistics                 # the tables of docs/statistics.md, minutes
    python -m benchmarks.statistics --draws 200     # a quick look
    python -m benchmarks.statistics --only power    # one of them

Trials are simulated as they differ: by example (heavy tails, skew, clusters, an effect that grows
with length), by seed, and by both. Everything else is the report's own code.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np

from tinyllama_lab.report.analysis.luck import PRIOR, PRIOR_FREEDOM, SeedSpread
from tinyllama_lab.report.analysis.shrunken import shrunken
from tinyllama_lab.report.analysis.statistics import ALPHA, Array, Estimate, Ids, adjusted, compare

SIZE = 0.03  # nats per token, where there is an effect
CLUSTER = 4  # examples
LONGEST = 256  # label tokens


@dataclass(frozen=True)
class World:
    """What the truth is; standard deviations are nats per token."""

    examples: int = 64
    seeds: int = 3
    cells: int = 4  # settings, all run with these seeds
    of_seed: float = 0.02  # of a trial's loss; drawn from the prior where there is one seed
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

    @property
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
    luck = world.of_seed
    if world.seeds == 1:
        luck = PRIOR * math.sqrt(PRIOR_FREEDOM / generator.chisquare(PRIOR_FREEDOM))
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


def coverage(world: World, draws: int) -> float:
    """How often the 95 % interval holds the true difference."""
    generator = np.random.default_rng(1)
    length, of_token = population(world.lengths)
    truth = SIZE + world.growth * (of_token / length - 1)
    held = 0
    for _ in range(draws):
        low, high = drawn(world, (0.0, SIZE), generator).estimate(0, 1).interval()
        held += low <= truth <= high
    return held / draws


def false_winners(world: World, draws: int) -> float:
    """How often at least one of equal settings is said to differ from another."""
    generator = np.random.default_rng(2)
    wrong = 0
    for _ in range(draws):
        study = drawn(world, [0.0] * world.cells, generator)
        pairs = [study.estimate(*pair) for pair in combinations(range(world.cells), 2)]
        wrong += min(adjusted([each.p_differs() for each in pairs])) < ALPHA
    return wrong / draws


def lost_winners(world: World, draws: int) -> float:
    """How often the best is not among those that cannot be told apart from what looks best.

    One setting is better than the others by the margin.
    """
    generator = np.random.default_rng(3)
    wrong, others = 0, world.cells - 1
    for _ in range(draws):
        study = drawn(world, [0.0] + [-0.02] + [0.0] * (others - 1), generator)
        means = study.losses.sum(axis=(1, 2))
        best = int(means.argmin())
        if best != 1:
            p_worse = study.estimate(best, 1).p_below(0.0, above=True)
            wrong += 2 * p_worse * others < ALPHA  # two-sided, as in the recommendation
    return wrong / draws


def power(world: World, size: float, draws: int) -> tuple[float, float]:
    """How often a difference of this size is shown, and how often the report says it would be."""
    generator = np.random.default_rng(4)
    shown, promised = 0, 0.0
    for _ in range(draws):
        estimate = drawn(world, (0.0, size), generator).estimate(0, 1)
        shown += estimate.p_differs() < ALPHA
        promised += estimate.power(size, world.seeds, world.examples)
    return shown / draws, promised / draws


def bias_of_the_best(world: World, effects: Sequence[float], draws: int) -> tuple[float, float]:
    """How much too low the lowest loss is on average: as measured, and its shrunken estimate."""
    generator = np.random.default_rng(5)
    truth = np.array(effects) - np.mean(effects)
    raw, kept = [], []
    for _ in range(draws):
        study = drawn(world, effects, generator)
        measured = study.means.mean(axis=1)
        names, spread = study.names, study.spread
        estimates = shrunken(study.losses, study.tokens, study.clusters, names, spread)
        best = int(measured.argmin())
        raw.append(measured[best] - measured.mean() - truth[best])
        kept.append(estimates[best] - measured.mean() - truth[best])
    return float(np.mean(raw)), float(np.mean(kept))


def false_interactions(world: World, draws: int) -> float:
    """How often a difference of differences is shown where effects only add up.

    The settings are two rows of a grid, whose columns are the levels of the other key.
    """
    generator = np.random.default_rng(6)
    columns = world.cells // 2
    effects = [SIZE * (column + row) for row in range(2) for column in range(columns)]
    wrong = 0
    for _ in range(draws):
        study = drawn(world, effects, generator)
        halves = [
            study.half((0, columns), (column, columns + column)) for column in range(1, columns)
        ]
        wrong += min(adjusted([half.p_differs() for half in halves])) < ALPHA
    return wrong / draws


def interaction_coverage(world: World, size: float, draws: int) -> float:
    """How often the interval holds a difference of differences of this size; a grid as above."""
    generator = np.random.default_rng(7)
    columns, held = world.cells // 2, 0
    effects = [size * (cell == columns + 1) for cell in range(world.cells)]
    for _ in range(draws):
        study = drawn(world, effects, generator)
        low, high = study.half((0, columns), (1, columns + 1)).interval()
        held += 2 * low <= size <= 2 * high
    return held / draws


EXAMPLES = (16, 32, 64, 128)
SHAPES: dict[str, dict[str, Any]] = {
    "as usual": {},
    "heavy tails (t5)": {"tails": "t5"},
    "heavier tails (t3)": {"tails": "t3"},
    "skewed": {"tails": "skewed"},
    "log-normal lengths": {"lengths": "log-normal"},
    "log-normal lengths, skewed": {"lengths": "log-normal", "tails": "skewed"},
    "grows with length": {"growth": 0.05},
    "grows with log-normal length": {"growth": 0.05, "lengths": "log-normal"},
    "clusters of 4, icc 0.2": {"icc": 0.2},
    "clusters of 4, icc 0.5": {"icc": 0.5},
    "clusters of 4, icc 0.5, t5, log-normal": {"icc": 0.5, "tails": "t5", "lengths": "log-normal"},
}
LUCK = (0.0, 0.02, 0.05, 0.1)


def main() -> None:
    """Print the tables."""
    tables = {
        "shapes": _print_shapes,
        "luck": _print_luck,
        "errors": _print_errors,
        "power": _print_power,
        "best": _print_best,
        "interactions": _print_interactions,
    }
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=2000, help="simulated studies a number")
    parser.add_argument("--only", nargs="+", choices=tables, default=list(tables))
    arguments = parser.parse_args()
    gc.freeze()  # statsmodels collects garbage at every correction
    for name in arguments.only:
        tables[name](arguments.draws)


def _print_shapes(draws: int) -> None:
    print("Coverage of the 95 % interval, three seeds:\n")
    _head("held-out differences", [f"{count} rows" for count in EXAMPLES])
    for name, shape in SHAPES.items():
        _line(name, [coverage(World(examples=count, **shape), draws) for count in EXAMPLES])


def _print_luck(draws: int) -> None:
    print("\nCoverage, 64 rows, by the luck of a run (standard deviation of a trial's loss):\n")
    _head("settings and seeds", [f"sd {luck:g}" for luck in LUCK])
    for cells, seeds in product((2, 4, 12), (2, 3, 5)):
        worlds = [World(cells=cells, seeds=seeds, of_seed=luck) for luck in LUCK]
        _line(f"{cells} settings, {seeds} seeds", [coverage(world, draws) for world in worlds])
    one = coverage(World(seeds=1), draws)
    print(f"\nOne seed, sd drawn from the prior (about {PRIOR:g}): {one:.1%}")


def _print_errors(draws: int) -> None:
    print("\nSettings that are equal, and one of them called better; the true best left out:\n")
    _head("settings and seeds", ["false winner", "best left out"])
    for cells, seeds in product((2, 3, 5), (1, 2, 3, 5)):
        world = World(cells=cells, seeds=seeds)
        rates = [false_winners(world, draws), lost_winners(world, draws)]
        _line(f"{cells} settings, {seeds} seed{'s' * (seeds > 1)}", rates)


def _print_power(draws: int) -> None:
    print("\nA difference that is shown, and how often the report says that it would be:\n")
    _head("difference and seeds", ["shown", "promised"])
    for size, seeds in product((0.03, 0.06, 0.1), (1, 2, 3, 5)):
        _line(
            f"{size:g} nats, {seeds} seed{'s' * (seeds > 1)}",
            power(World(seeds=seeds), size, draws),
        )


def _print_best(draws: int) -> None:
    print("\nThe lowest of 12 losses minus its true value (nats per token):\n")
    heads = ["equal: as measured", "shrunken", "0 to 0.6 apart: as measured", "shrunken"]
    _head("seeds and rows", heads)
    apart = np.linspace(0.0, 0.6, 12).tolist()
    for seeds, examples in product((1, 2, 3), EXAMPLES):
        world = World(examples=examples, seeds=seeds, cells=12)
        biases = [
            bias
            for effects in ([0.0] * 12, apart)
            for bias in bias_of_the_best(world, effects, draws)
        ]
        name = f"{seeds} seed{'s' * (seeds > 1)}, {examples} rows"
        print("| " + " | ".join([name, *(f"{bias:+.4f}" for bias in biases)]) + " |", flush=True)


def _print_interactions(draws: int) -> None:
    print("\nDifferences of differences: one is shown where there is none; the interval holds:\n")
    _head("grid and seeds", ["false interaction", "coverage"])
    for columns, seeds in product((2, 4), (1, 2, 3, 5)):
        world = World(cells=2 * columns, seeds=seeds)
        rates = [false_interactions(world, draws), interaction_coverage(world, 0.1, draws)]
        _line(f"2 x {columns}, {seeds} seed{'s' * (seeds > 1)}", rates)


def _head(name: str, columns: Sequence[str]) -> None:
    print("| " + " | ".join([name, *columns]) + " |")
    print("|---" * (len(columns) + 1) + "|")


def _line(name: str, rates: Sequence[float]) -> None:
    print("| " + " | ".join([name, *(f"{rate:.1%}" for rate in rates)]) + " |", flush=True)


if __name__ == "__main__":
    main()
