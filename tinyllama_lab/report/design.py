"""How many seeds and held-out rows a question needs, before anything is trained.

Power comes from `Estimate.power`, as in the sentence of a report that says what is needed. Here
the estimate is made of spreads that other studies measured, or that are assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
from scipy.optimize import brentq

from tinyllama_lab.report.comparable import Comparable
from tinyllama_lab.report.contrasts import Pair, differences_of, matches, name_of
from tinyllama_lab.report.luck import SeedSpread, listed_studies
from tinyllama_lab.report.statistics import (
    ALPHA,
    Estimate,
    Luck,
    Sample,
    compare,
    least_number,
)
from tinyllama_lab.report.text import counted

MOST_SEEDS = 100
MOST_ROWS = 100_000  # held out, where nobody knows yet how many there are
# standard deviations of the difference of two settings on one held-out row, nats per token
ASSUMED_SHARED, ASSUMED_OWN = 0.18, 0.15
_REFERENCE = 1000  # rows; any number, `Estimate.power` converts it
_LARGEST = 1e6  # nats per token; no difference is larger


@dataclass(frozen=True)
class RowSpread:
    """How the difference of two settings varies over held-out rows (nats² a token, of one row)."""

    shared: float  # the part that is the same for every seed
    own: float  # the part that each pair of runs has for itself
    independent: float  # clusters for each row: rows that belong together are one cluster
    source: str

    @property
    def sentence(self) -> str:
        """By how much the difference varies from row to row, and how that is known."""
        deviation = math.sqrt(self.shared + self.own)
        return (
            f"the difference of two runs varies by {deviation:.2g} nats per token from one "
            f"held-out row to another (standard deviation; {self.source})"
        )


ASSUMED_ROWS = RowSpread(
    ASSUMED_SHARED**2,
    ASSUMED_OWN**2,
    1.0,
    "assumed: as between ranks 4 and 16 of SmolLM2 on the travel set",
)


def row_spread(studies: Mapping[str, Comparable], keys: Iterable[str] = ()) -> RowSpread:
    """From pairs of settings of other studies, else the assumed one.

    Pairs that differ in one of `keys` count if there are any, else all; with several seeds if
    there are any.
    """
    pairs = [
        (name, key, pair)
        for name, found in studies.items()
        if found.measure.is_per_token
        for key, _, _, matched in matches(found)
        for pair in matched
    ]
    wanted = set(keys)
    pairs = [each for each in pairs if each[1] in wanted] or pairs
    pairs = [each for each in pairs if len(each[2][0]) > 1] or pairs
    if not pairs:
        return ASSUMED_ROWS
    parts = [_parts(pair) for _, _, pair in pairs]
    shared, own, independent = (fmean(column) for column in zip(*parts, strict=True))
    names, asked = (list(dict.fromkeys(column)) for column in list(zip(*pairs, strict=True))[:2])
    differ = " or ".join(name_of(key) for key in asked)
    source = f"{listed_studies(names)}: {counted(len(pairs), 'pair')} of different {differ}"
    return RowSpread(shared, own, independent, f"measured in {source}")


def _parts(pair: Pair) -> tuple[float, float, float]:
    """The three numbers of a `RowSpread`, from one pair of settings."""
    trial = pair[0][0]
    estimate = compare(differences_of(pair), trial.tokens, None, trial.clusters)
    sample = estimate.sample
    own = sample.rest * sample.examples * estimate.seeds
    shared = (sample.error**2 - sample.rest) * sample.examples
    return shared, own, sample.clusters / sample.examples


@dataclass(frozen=True)
class Design:
    """What decides the power of a grid's comparisons, but for seeds and rows."""

    seeds: SeedSpread
    rows: RowSpread
    seen_on: float  # held-out rows whose noise is in what was measured of `seeds`
    settings: int
    pairs: int  # of settings that one comparison averages over
    comparisons: int

    @property
    def alpha(self) -> float:
        """The level of one comparison, corrected for their number."""
        return ALPHA / self.comparisons

    @property
    def estimate(self) -> Estimate:
        """A comparison with one seed on so many rows that only its variances matter."""
        rest = self.rows.own / self.pairs / _REFERENCE
        error = math.sqrt(self.rows.shared / _REFERENCE + rest)
        clusters = max(2, round(self.rows.independent * _REFERENCE))
        sample = Sample(error, rest, _REFERENCE, clusters, error, np.empty(0))
        noise = self.seeds.measured * self.rows.own / self.seen_on
        of_run = max(0.0, 2 * self.seeds.typical - noise)
        luck = Luck(of_run / self.pairs, self.seeds.freedom, max(2, self.settings))
        return Estimate(0.0, sample, luck, 1)

    def shows_difference(self, size: float, seeds: int, rows: int) -> float:
        """The chance that a true difference of this size is shown."""
        return self.estimate.power(size, seeds, rows, self.alpha)

    def shows_equivalence(self, margin: float, seeds: int, rows: int) -> float:
        """The chance that equal settings are shown to be within the margin."""
        return self.estimate.power_equivalent(margin, seeds, rows, self.alpha)

    def smallest(self, seeds: int, rows: int, power: float) -> float:
        """The smallest difference that is shown with this power."""
        estimate = self.estimate

        def lack(size: float) -> float:
            return estimate.power(size, seeds, rows, self.alpha) - power

        return float(brentq(lack, 0.0, _LARGEST, xtol=1e-6))


@dataclass(frozen=True)
class Bounds:
    """Which numbers of seeds and held-out rows may be proposed, both ends included."""

    seeds: tuple[int, int]
    rows: tuple[int, int]


def cheapest(
    power: Callable[[int, int], float],
    wanted: float,
    bounds: Bounds,
    cost: Callable[[int, int], float],
) -> tuple[int, int] | None:
    """Seeds and rows that have the power at the least cost; None where none within bounds do.

    Args:
        power: of so many seeds and rows; it grows with both.
        wanted: the least power.
        bounds: what may be proposed.
        cost: of so many seeds and rows; it grows with both.
    """
    least_rows, most_rows = bounds.rows
    if power(bounds.seeds[1], most_rows) < wanted:
        return None
    best: tuple[float, tuple[int, int]] | None = None
    for seeds in range(bounds.seeds[0], bounds.seeds[1] + 1):
        if best and cost(seeds, least_rows) >= best[0]:
            break
        rows = least_number(partial(power, seeds), least_rows, wanted, most_rows)
        if rows is not None and (best is None or cost(seeds, rows) < best[0]):
            best = cost(seeds, rows), (seeds, rows)
    return best[1] if best else None
