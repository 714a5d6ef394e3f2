"""How often the report is right about twice the largest level, on studies whose truth is known.

    python -m benchmarks.doubling                  # the tables of docs/statistics.md, minutes
    python -m benchmarks.doubling --draws 50       # a quick look

The studies are those of `benchmarks.simulated`, each setting one level of a number. Whether
anything is said, the law, and the interval are the report's own code.
"""

from __future__ import annotations

import argparse
import gc
import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from benchmarks.simulated import Draw, World, drawn
from benchmarks.statistics import EXAMPLES
from tinyllama_lab.report.analysis.scaling import chosen_law, falls_for_sure, fitted, resampled
from tinyllama_lab.report.analysis.statistics import Array, compare

LEVELS = ((2.0, 8.0, 64.0), (4.0, 8.0, 16.0, 32.0), (1500.0, 3000.0, 6000.0))
SIZES = (0.02, 0.05, 0.1, 0.34)  # nats per token
_MOST_STUDIES = 30  # for each in which something is said


@dataclass(frozen=True)
class Fall:
    """How the true loss falls over the levels of a number."""

    levels: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0)
    size: float = 0.34  # from the smallest to the largest level, nats per token
    exponent: float = 0.5  # of the power law; 0 is a logarithm

    def at(self, levels: Array) -> Array:
        """The loss at these levels minus that of the smallest."""
        first, last = self.levels[0], self.levels[-1]
        if self.exponent == 0:
            return -self.size * np.log(levels / first) / math.log(last / first)
        shape = first**-self.exponent - levels**-self.exponent
        return -self.size * shape / (first**-self.exponent - last**-self.exponent)


def doubling_coverage(world: World, fall: Fall, draws: int) -> tuple[float, float]:
    """How often the report says what twice the largest level brings, and is right then.

    It is right where the interval holds what it does bring. Counted are the studies up to the
    one in which it says so for the `draws`-th time.
    """
    generator = np.random.default_rng(8)
    levels = np.array(fall.levels)
    effects = fall.at(levels).tolist()
    last, doubled = fall.at(levels[-1] * np.array([1.0, 2.0]))
    studies = said = held = 0
    while said < draws and studies < _MOST_STUDIES * draws:
        studies += 1
        study = drawn(replace(world, cells=len(levels)), effects, generator)
        change = doubled_by(study, levels)
        if change is not None:
            said += 1
            held += change[1] <= doubled - last <= change[2]
    return said / studies, held / max(said, 1)


def doubled_by(study: Draw, levels: Array) -> tuple[float, float, float] | None:
    """What the report says of twice the largest level; None where it says nothing.

    Args:
        study: each cell is a level.
        levels: ascending.
    """
    goes_on = falls_for_sure(study.estimate(0, len(levels) - 1))
    if not goes_on:
        return None
    spread, seeds = study.spread, study.losses.shape[1]
    luck, freedoms = np.array([spread.of_mean([name], seeds) for name in study.names]).T
    luck = np.maximum(0.0, luck - _rest(study))
    sums = study.losses.mean(axis=1)
    losses, draws = resampled(sums, study.tokens, study.clusters, luck, freedoms)
    law = chosen_law(levels, losses, draws)
    return fitted(levels, losses, draws, law, goes_on)[1]


def _rest(study: Draw) -> Array:
    """`[cells]`, the part of the variance over seeds that is noise of the examples."""
    apart = study.losses - study.losses.mean(axis=0)
    samples = [compare(each, study.tokens, clusters=study.clusters).sample for each in apart]
    return np.array([sample.rest for sample in samples])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=300, help="answers a number")
    draws = parser.parse_args().draws
    gc.freeze()
    _print_rows(draws)
    _print_sizes(draws)


def _print_rows(draws: int) -> None:
    print("Coverage of what twice the largest of four levels brings, under a power law:\n")
    _row("seeds", *(f"{count} rows" for count in EXAMPLES))
    print("|---" * (len(EXAMPLES) + 1) + "|")
    for seeds in (2, 3, 5):
        worlds = [World(examples=count, seeds=seeds) for count in EXAMPLES]
        rates = [doubling_coverage(world, Fall(), draws)[1] for world in worlds]
        _row(f"{seeds} seeds", *(f"{right:.1%}" for right in rates))


def _print_sizes(draws: int) -> None:
    print(
        "\nThe same by the fall from the smallest to the largest level, and how often it is said"
    )
    print("(64 rows, 3 seeds, luck of 0.03):\n")
    _row("levels and law", *(f"{size:g} nats" for size in SIZES))
    print("|---" * (len(SIZES) + 1) + "|")
    for levels, (law, exponent) in product(LEVELS, (("power law", 0.5), ("logarithm", 0.0))):
        falls = [Fall(levels, size, exponent) for size in SIZES]
        pairs = [doubling_coverage(World(of_seed=0.03), fall, draws) for fall in falls]
        name = f"{', '.join(f'{level:g}' for level in levels)}; {law}"
        _row(name, *(f"{right:.1%} ({said:.0%})" for said, right in pairs))


def _row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
