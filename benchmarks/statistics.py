"""How often the report is right, on simulated studies whose truth is known.

    python -m benchmarks.statistics                 # the tables of docs/statistics.md, minutes
    python -m benchmarks.statistics --draws 200     # a quick look
    python -m benchmarks.statistics --only power    # one of them

The studies are those of `benchmarks.simulated`. Everything else is the report's own code.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np

from benchmarks.simulated import World, drawn, population
from tinyllama_lab.report.analysis.luck import PRIOR
from tinyllama_lab.report.analysis.settings import MARGIN
from tinyllama_lab.report.analysis.shrunken import shrunken
from tinyllama_lab.report.analysis.statistics import ALPHA, ONE_SIDED, adjusted, compare

SIZE = 0.03  # nats per token, where there is an effect


def coverage(world: World, draws: int, second: int = 1) -> float:
    """How often the 95 % interval holds the true difference of a setting to the first."""
    generator = np.random.default_rng(1)
    length, of_token = population(world.lengths)
    truth = SIZE + world.growth * (of_token / length - 1)
    held = 0
    for _ in range(draws):
        study = drawn(world, [0.0] * second + [SIZE], generator)
        low, high = study.estimate(0, second).interval()
        held += low <= truth <= high
    return held / draws


def false_winners(world: World, draws: int) -> float:
    """How often at least one of equal settings is said to differ from another.

    The smallest p-value decides, so Holm's correction is that of Bonferroni.
    """
    generator = np.random.default_rng(2)
    pairs = list(combinations(range(world.cells), 2))
    wrong = 0
    for _ in range(draws):
        study = drawn(world, [0.0] * world.cells, generator)
        intervals = [study.estimate(*pair).interval(1 - ALPHA / len(pairs)) for pair in pairs]
        wrong += any(low > 0 or high < 0 for low, high in intervals)
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


def taken(world: World, effects: Sequence[float], draws: int) -> dict[str, float]:
    """How often three rules take a setting that is truly worse than the best by over the margin.

    The first setting is the cheapest. `report` is the rule of the recommendation, `cheapest` takes
    the cheapest that cannot be told apart from the lowest, and `lowest` the lowest loss.
    """
    generator = np.random.default_rng(9)
    wrong = dict.fromkeys(("report", "cheapest", "lowest"), 0)
    others, bound = world.cells - 1, min(effects) + MARGIN
    for _ in range(draws):
        study = drawn(world, effects, generator)
        means = study.means.mean(axis=1)
        best = int(means.argmin())
        tied, near = [best], [best]
        for cell in range(world.cells):
            if cell == best:
                continue
            estimate = study.estimate(best, cell)
            is_close = estimate.p_below(MARGIN) * others < ONE_SIDED
            if 2 * estimate.p_below(0.0, above=True) * others >= ALPHA or is_close:
                tied.append(cell)
                near += [cell] * bool(is_close or means[cell] - means[best] <= MARGIN)
        picks = {"report": min(near), "cheapest": min(tied), "lowest": best}
        for rule, pick in picks.items():
            wrong[rule] += effects[pick] > bound
    return {rule: count / draws for rule, count in wrong.items()}


def power(world: World, size: float, draws: int) -> tuple[float, float]:
    """How often a difference of this size is shown, and how often the report says it would be."""
    generator = np.random.default_rng(4)
    shown, promised = 0, 0.0
    for _ in range(draws):
        estimate = drawn(world, (0.0, size), generator).estimate(0, 1)
        shown += estimate.p_differs() < ALPHA
        promised += estimate.power(size, world.seeds, world.examples)
    return shown / draws, promised / draws


def price(world: World, draws: int) -> float:
    """How much wider the interval is, in the median, than with one variance for all settings."""
    generator = np.random.default_rng(8)
    widths = []
    for _ in range(draws):
        study = drawn(world, [0.0] * world.cells, generator)
        shared = replace(study.spread, own={}, own_freedom={}).luck(["0"], ["1"], world.seeds)
        differences = study.losses[1] - study.losses[0]
        estimates = study.estimate(0, 1), compare(differences, study.tokens, shared)
        widths.append([sum(estimate.margins(1 - ALPHA)) for estimate in estimates])
    ours, theirs = np.median(widths, axis=0)
    return float(ours / theirs) - 1


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
HARD_SHAPES = ("heavier tails (t3)", "skewed", "clusters of 4, icc 0.5")
EFFECTS = ((0.0, -0.03), (0.0, -0.06), (0.0, -0.03, -0.06, -0.07), (0.0, -0.15))
LUCK = (0.0, 0.02, 0.05, 0.1)
LUCK_OF_ONE = (0.01, 0.03, 0.05, 0.07)
POWER_OF = ((2, 2), (2, 3), (4, 1), (4, 2), (4, 3), (4, 5))  # settings, seeds
LUCK_OF_FEW = (0.0, 0.05, 0.1)
# settings, how many of them have a larger spread, and how many times as large it is
WILD = (
    *((cells, 1, 5.0) for cells in (3, 4, 5, 6, 12)),
    *((cells, 1, 10.0) for cells in (4, 12)),
    *((cells, 2, 5.0) for cells in (5, 12)),
)


def main() -> None:
    """Print the tables."""
    tables = {
        "shapes": _print_shapes,
        "luck": _print_luck,
        "wild": _print_wild,
        "price": _print_price,
        "errors": _print_errors,
        "taken": _print_taken,
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
    print("\nCoverage, 64 rows, one seed, by the luck of a run:\n")
    _head("", [f"sd from the prior ({PRIOR:g})", *(f"sd {luck:g}" for luck in LUCK_OF_ONE)])
    fixed = [World(seeds=1, from_prior=False, of_seed=luck) for luck in LUCK_OF_ONE]
    _line("one seed", [one, *(coverage(world, draws) for world in fixed)])


def _print_wild(draws: int) -> None:
    print("\nA setting of larger spread: coverage, and equal settings called different:\n")
    _head("settings and seeds", ["with a wild setting", "between calm ones", "false winner"])
    for seeds, (cells, wild_cells, wild) in product((2, 3, 5), WILD):
        world = World(seeds=seeds, cells=cells, wild=wild, wild_cells=wild_cells)
        name = f"{seeds} seeds, {cells} settings, sd x {wild:g} in {wild_cells}"
        rates = [coverage(world, draws), coverage(world, draws, cells - 1)]
        _line(name, [*rates, false_winners(world, draws)])


def _print_price(draws: int) -> None:
    print("\nHow much wider the interval is than with one variance for all settings, sd 0.1:\n")
    _head("settings", ["2 seeds", "3 seeds", "5 seeds"])
    for cells in (4, 12):
        worlds = [World(cells=cells, seeds=seeds, of_seed=0.1) for seeds in (2, 3, 5)]
        _line(f"{cells} settings", [price(world, draws) for world in worlds])


def _print_errors(draws: int) -> None:
    print("\nSettings that are equal, and one of them called better; the true best left out:\n")
    _head("settings and seeds", ["false winner", "best left out"])
    for cells, seeds in product((2, 3, 5), (1, 2, 3, 5)):
        world = World(cells=cells, seeds=seeds)
        rates = [false_winners(world, draws), lost_winners(world, draws)]
        _line(f"{cells} settings, {seeds} seed{'s' * (seeds > 1)}", rates)
    print("\nFalse winners, 16 rows, by the luck of a run:\n")
    _head("settings, rows and seeds", [f"sd {luck:g}" for luck in LUCK_OF_FEW])
    for cells, shape, seeds in product((2, 5), HARD_SHAPES, (2, 3)):
        world = World(examples=16, cells=cells, seeds=seeds, **SHAPES[shape])
        worlds = [replace(world, of_seed=luck) for luck in LUCK_OF_FEW]
        name = f"{cells} settings, {shape}, {seeds} seeds"
        _line(name, [false_winners(each, draws) for each in worlds])


def _print_taken(draws: int) -> None:
    print("\nA setting is taken that is truly worse than the best by more than the margin:\n")
    _head("true losses, the cheapest first, and seeds", ["the report", "cheapest", "lowest loss"])
    for effects, seeds in product(EFFECTS, (2, 3, 5)):
        world = World(examples=32, cells=len(effects), seeds=seeds, of_seed=0.03)
        rates = taken(world, effects, draws)
        _line(f"{', '.join(f'{e:g}' for e in effects)}; {seeds} seeds", list(rates.values()))


def _print_power(draws: int) -> None:
    print("\nA difference that is shown, and how often the report says that it would be:\n")
    _head("difference, settings and seeds", ["shown", "promised"])
    for size, (cells, seeds) in product((0.03, 0.06, 0.1), POWER_OF):
        name = f"{size:g} nats, {cells} settings, {seeds} seed{'s' * (seeds > 1)}"
        _line(name, power(World(cells=cells, seeds=seeds), size, draws))


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
