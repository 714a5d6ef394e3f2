"""How many seeds and held-out rows a question needs, before anything is trained.

Power comes from `Estimate.power`, as in the report's sentence on what is needed. Here the
estimate is built from spreads that other studies measured, or that are assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
from scipy.optimize import brentq

from tinyllama_lab.report.analysis.comparison import Comparison
from tinyllama_lab.report.analysis.contrasts import CellPair, differences_of, matches, name_of
from tinyllama_lab.report.analysis.luck import SeedSpread, listed_studies
from tinyllama_lab.report.analysis.statistics import (
    ALPHA,
    Estimate,
    Luck,
    Sample,
    compare,
    least_number,
)
from tinyllama_lab.report.text import counted

MOST_ROWS = 100_000  # held-out rows that may be proposed while the size of the data is unknown
# Standard deviations of the difference of two settings, nats per token: the part that all seeds
# share (one cluster of rows), and the part of each pair of runs (one row). See `RowSpread`.
ASSUMED_SHARED, ASSUMED_OWN = 0.15, 0.15
_LARGEST = 1e6  # nats per token; upper bracket of a root search


@dataclass(frozen=True)
class RowSpread:
    """How the difference of two settings varies over held-out rows (nats² a token)."""

    shared: float  # variance over clusters of rows of the part that is the same for every seed
    own: float  # variance over rows of the part that differs from one pair of runs to the next
    source: str  # where it is from, as a clause of a sentence

    @property
    def sentence(self) -> str:
        """How much the difference varies from row to row, and how that is known."""
        deviation = math.sqrt(self.shared + self.own)
        return (
            f"the difference of two runs varies by {deviation:.2g} nats per token from one "
            f"held-out row to another (standard deviation; {self.source})"
        )


ASSUMED_ROWS = RowSpread(
    ASSUMED_SHARED**2,
    ASSUMED_OWN**2,
    "assumed: as between ranks 4 and 16 of SmolLM2 on the travel set",
)


@dataclass(frozen=True)
class Clusters:
    """The number of clusters among held-out rows: rows that belong together count as one."""

    rows: tuple[int, ...]  # numbers of rows for which clusters were counted, ascending
    counts: tuple[int, ...]  # the number of clusters among so many rows
    source: str = ""  # what was counted; empty if rows are assumed to be independent

    def __call__(self, rows: float) -> float:
        """Return the number of clusters of `rows` held-out rows.

        The counts are interpolated. Beyond the largest counted number, they grow at the rate
        between the last two.
        """
        counts = np.maximum.accumulate(self.counts)
        if rows <= self.rows[-1]:
            return float(np.interp(rows, (0, *self.rows), (0, *counts)))
        growth = 1.0  # the exponent of a power law; new rows cannot add more than one cluster each
        if len(counts) > 1:
            growth = math.log(counts[-1] / counts[-2]) / math.log(self.rows[-1] / self.rows[-2])
        return float(counts[-1] * (rows / self.rows[-1]) ** min(growth, 1.0))

    def sentence(self, rows: int) -> str:
        """Say as how many rows these count; empty where each counts as one."""
        if not self.source:
            return (
                "held-out rows are taken as independent, since nobody has read them here yet; "
                "where some have much the same answers, more are needed"
            )
        count = round(self(rows))
        if count >= rows:
            return ""
        return (
            f"{rows} held-out rows count as {count}: rows of one group, or with much the same "
            f"answer, are no more than one ({self.source})"
        )


INDEPENDENT = Clusters((1,), (1,))


def row_spread(studies: Mapping[str, Comparison], keys: Iterable[str] = ()) -> RowSpread:
    """Estimate the spread over rows from pairs of settings in other studies, else assume it.

    Args:
        studies: the comparable trials of each study, by its name.
        keys: pairs that differ in one of these are used if there are any; of these again, pairs
            with several seeds if there are any.
    """
    pairs = [
        (name, key, pair)
        for name, comparison in studies.items()
        if comparison.measure.is_per_token
        for key, _, _, matched in matches(comparison)
        for pair in matched
    ]
    wanted = set(keys)
    pairs = [(name, key, pair) for name, key, pair in pairs if key in wanted] or pairs
    pairs = [(name, key, pair) for name, key, pair in pairs if len(pair[0]) > 1] or pairs
    if not pairs:
        return ASSUMED_ROWS
    parts = [_parts(pair) for _, _, pair in pairs]
    shared, own = (fmean(column) for column in zip(*parts, strict=True))
    names, differing_keys = (
        list(dict.fromkeys(column)) for column in list(zip(*pairs, strict=True))[:2]
    )
    differ = " or ".join(name_of(key) for key in differing_keys)
    source = f"{listed_studies(names)}: {counted(len(pairs), 'pair')} of different {differ}"
    return RowSpread(shared, own, f"measured in {source}")


def _parts(pair: CellPair) -> tuple[float, float]:
    """Return `shared` and `own` of a `RowSpread`, estimated from one pair of settings."""
    trial = pair[0][0]
    estimate = compare(differences_of(pair), trial.tokens, None, trial.clusters)
    sample = estimate.sample
    # `rest` and `error` belong to a mean over rows and seeds; undo the division by their numbers
    own = sample.rest * sample.examples * estimate.seeds
    return (sample.error**2 - sample.rest) * sample.clusters, own


@dataclass(frozen=True)
class Design:
    """What decides the power of a grid's comparisons, apart from the numbers of seeds and rows."""

    seeds: SeedSpread
    rows: RowSpread
    seen_on: float  # held-out rows on which `seeds` was measured
    settings: int  # cells of the grid
    pairs: int  # pairs of cells that one comparison averages over
    comparisons: int  # verdicts of the grid, for which p-values are corrected
    clusters: Clusters = INDEPENDENT

    @property
    def alpha(self) -> float:
        """The level of one comparison, corrected for their number (Bonferroni)."""
        return ALPHA / self.comparisons

    def estimate(self, rows: int) -> Estimate:
        """Return an estimate with one seed on `rows` rows, of which only the variances matter."""
        rest = self.rows.own / self.pairs / rows
        clusters = max(2.0, self.clusters(rows))
        error = math.sqrt(self.rows.shared / clusters + rest)
        sample = Sample(error, rest, rows, round(clusters), error, np.empty(0))
        # A measured spread over seeds contains the noise of the rows it was measured on. An
        # assumed one does not, hence the factor `measured`.
        noise = self.seeds.measured * self.rows.own / self.seen_on
        of_run = max(0.0, 2 * self.seeds.typical - noise)
        luck = Luck(of_run / self.pairs, self.seeds.freedom, max(2, self.settings))
        return Estimate(0.0, sample, luck, 1)

    def shows_difference(self, size: float, seeds: int, rows: int) -> float:
        """Return the power to show a true difference of this size."""
        return self.estimate(rows).power(size, seeds, rows, self.alpha)

    def shows_equivalence(self, margin: float, seeds: int, rows: int) -> float:
        """Return the power to show that equal settings are within the margin."""
        return self.estimate(rows).power_equivalent(margin, seeds, rows, self.alpha)

    def smallest(self, seeds: int, rows: int, power: float) -> float:
        """Return the smallest difference that is shown with this power."""

        def lack(size: float) -> float:
            return self.shows_difference(size, seeds, rows) - power

        return float(brentq(lack, 0.0, _LARGEST, xtol=1e-6))


@dataclass(frozen=True)
class Bounds:
    """The numbers of seeds and held-out rows that may be proposed, both ends included."""

    seeds: tuple[int, int]
    rows: tuple[int, int]


def cheapest(
    power: Callable[[int, int], float],
    wanted: float,
    bounds: Bounds,
    cost: Callable[[int, int], float],
) -> tuple[int, int] | None:
    """Return the cheapest seeds and rows that reach the power; None if none within bounds do.

    Args:
        power: of a number of seeds and rows; it grows with both.
        wanted: the power to reach.
        bounds: what may be proposed.
        cost: of a number of seeds and rows; it grows with both.
    """
    least_rows, most_rows = bounds.rows
    if power(bounds.seeds[1], most_rows) < wanted:
        return None
    best: tuple[float, tuple[int, int]] | None = None
    for seeds in range(bounds.seeds[0], bounds.seeds[1] + 1):
        if best and cost(seeds, least_rows) >= best[0]:
            break  # cost grows with seeds, so no further number can be cheaper
        rows = least_number(partial(power, seeds), least_rows, wanted, most_rows)
        if rows is not None and (best is None or cost(seeds, rows) < best[0]):
            best = cost(seeds, rows), (seeds, rows)
    return best[1] if best else None
