"""How often the report is right about tuned settings, on simulated studies whose truth is known.

    python -m benchmarks.tuned                 # the table of docs/statistics.md, a minute
    python -m benchmarks.tuned --draws 100     # a quick look

Every candidate of the tuning is a simulated setting of `benchmarks.simulated`. The choice between
candidates, the losses and the intervals are the report's own code.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from benchmarks.simulated import Draw, World, drawn
from tinyllama_lab.report.analysis.cross_fit import cross_fitted, first_half, ranking
from tinyllama_lab.report.analysis.luck import choice_variance
from tinyllama_lab.report.analysis.statistics import ALPHA, Array, Estimate, compare

RUNG_ROWS = 16  # as in a sweep
ROWS = 32


@dataclass(frozen=True)
class Tuned:
    """The candidates of a study's settings; the best of each setting have the same true loss."""

    candidates: tuple[int, ...]  # of each setting
    apart: float = 0.0  # nats per token: how much worse each candidate is than the one before
    is_halved: bool = False  # the worst of three is ended at half of its steps

    @property
    def effects(self) -> list[float]:
        """The true loss of each candidate minus that of the best."""
        return [number * self.apart for count in self.candidates for number in range(count)]

    def contests(self, study: Draw) -> Iterator[list[dict[str, Array]]]:
        """Of each setting, for each seed the losses of the candidates that finished."""
        ends = np.cumsum(self.candidates)
        for first, last in zip([0, *ends], ends, strict=False):
            yield [self._finished(losses) for losses in study.losses[first:last].swapaxes(0, 1)]

    def _finished(self, losses: Array) -> dict[str, Array]:
        """By value; at worst, a rung's rows say exactly what they say at the end."""
        kept = {str(value): own for value, own in enumerate(losses)}
        if self.is_halved and len(kept) == 3:
            del kept[max(kept, key=lambda value: float(kept[value][:RUNG_ROWS].sum()))]
        return kept


@dataclass(frozen=True)
class Rates:
    """Of many studies that ask for the difference between the first two settings."""

    bias: float  # nats per token
    coverage: float
    false_verdicts: float
    lowest_bias: float  # where each seed takes the lowest of its losses
    lowest_coverage: float


def rates(tuned: Tuned, world: World, draws: int) -> Rates:
    """How far off and how often right the report is; the true difference is zero."""
    generator = np.random.default_rng(9)
    cells = replace(world, cells=sum(tuned.candidates))
    pairs = []
    for _ in range(draws):
        study = drawn(cells, tuned.effects, generator)
        half = first_half(study.tokens, study.clusters)
        contests = list(tuned.contests(study))
        fitted = [cross_fitted(each, half) for each in contests]
        lowest = [[min(own.values(), key=np.sum) for own in each] for each in contests]
        chosen = [_chosen(each) for each in contests]
        pairs.append((_estimate(study, fitted, chosen), _estimate(study, lowest, lowest)))
    ours, theirs = zip(*pairs, strict=True)
    return Rates(
        fmean(each.difference for each in ours),
        fmean(_holds_zero(each) for each in ours),
        fmean(each.p_differs() < ALPHA for each in ours),
        fmean(each.difference for each in theirs),
        fmean(_holds_zero(each) for each in theirs),
    )


def _chosen(contests: Sequence[dict[str, Array]]) -> list[Array]:
    """The losses of the value that the setting is named by, for each seed."""
    order = ranking([{value: own.sum() for value, own in each.items()} for each in contests])
    return [next(each[value] for value in order if value in each) for each in contests]


def _estimate(
    study: Draw, losses: Sequence[Sequence[Array]], chosen: Sequence[Sequence[Array]]
) -> Estimate:
    """The second setting minus the first."""
    found, named = (replace(study, losses=np.array(each)) for each in (losses, chosen))
    optimism = (found.means - named.means).mean(axis=1)
    choice = dict(zip(found.names, map(choice_variance, optimism.tolist()), strict=True))
    luck = replace(found.spread, choice=choice).luck(["0"], ["1"], found.losses.shape[1])
    return compare(found.losses[1] - found.losses[0], found.tokens, luck, found.clusters)


def _holds_zero(estimate: Estimate) -> bool:
    low, high = estimate.interval()
    return low <= 0 <= high


STUDIES = {
    "1 and 3, equal": Tuned((1, 3)),
    "1 and 2, equal": Tuned((1, 2)),
    "3 and 3, equal": Tuned((3, 3)),
    "1 and 3, of 4 settings": Tuned((1, 3, 1, 1)),
    "3 and 3, of 4 settings": Tuned((3, 3, 3, 3)),
    "1 and 3, 0.02 apart, of 4 settings": Tuned((1, 3, 1, 1), apart=0.02),
    "3 and 3, 0.02 apart, of 4 settings": Tuned((3, 3, 3, 3), apart=0.02),
    "3 and 3, 0.1 apart, of 4 settings": Tuned((3, 3, 3, 3), apart=0.1),
    "1 and 3, halved": Tuned((1, 3), is_halved=True),
    "3 and 3, halved": Tuned((3, 3), is_halved=True),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=500, help="simulated studies a number")
    draws = parser.parse_args().draws
    gc.freeze()
    head = ("candidates of the two settings", "seeds", "bias", "coverage", "false verdict")
    print("| " + " | ".join([*head, "lowest taken: bias", "coverage"]) + " |")
    print("|---" * 7 + "|")
    for name, tuned in STUDIES.items():
        _print(name, tuned, 3, draws)
    for seeds in (1, 2, 5):
        for name in ("1 and 3, of 4 settings", "3 and 3, of 4 settings"):
            _print(name, STUDIES[name], seeds, draws)


def _print(name: str, tuned: Tuned, seeds: int, draws: int) -> None:
    found = rates(tuned, World(examples=ROWS, seeds=seeds), draws)
    print(
        f"| {name} | {seeds} | {found.bias:+.4f} | {found.coverage:.1%} "
        f"| {found.false_verdicts:.1%} | {found.lowest_bias:+.4f} "
        f"| {found.lowest_coverage:.1%} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
