"""The luck of a training run: how much a loss varies over seeds, from all settings with seeds.

The model is that of a randomized block design: `loss[cell, seed] = cell + seed + luck`. What a
seed does to every cell alike (such as its order of the rows) cancels in a difference on the same
seeds; the luck does not. Cells may differ in their variance (a high learning rate varies more).
The variance of each cell borrows degrees of freedom from the others: the fewer, the more its runs
differ (a robust moderated t, as in Phipson et al. 2016, Annals of Applied Statistics 10).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import fmean

import numpy as np
from scipy import special

from tinyllama_lab.report.analysis.comparison import Comparison, Scored, shared_seeds
from tinyllama_lab.report.analysis.earlier import other_studies
from tinyllama_lab.report.analysis.measure import NATS, Measure
from tinyllama_lab.report.analysis.statistics import MOST_BORROWED, Array, Luck
from tinyllama_lab.report.analysis.tuned import RATE
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.trial import Result

PRIOR = 0.03  # assumed standard deviation of a trial's loss over seeds, nats per token
PRIOR_FREEDOM = 4.0  # of `PRIOR`; 95 % of the true spreads are then from 0.018 to 0.086
_STEEPNESS = 3  # how fast a cell borrows less as it differs; by simulation, as MOST_BORROWED
_SUSPECT = 0.02  # cells with a smaller p-value of the F test count less in the variance of others
_LEAST_WEIGHT = 1e-6  # the weight of a suspect cell, above zero to keep sums defined
_PASSES = 3  # rounds that find suspect cells; in the first, two wild cells hide each other
_ALIKE = 2.0  # numbers of training rows, and learning rates, up to this ratio are alike
_RARE = 0.001  # the chance that any cell is left out although all have one spread
_MOST_NAMED = 3  # studies in a sentence


@dataclass(frozen=True)
class Seeded:
    """Losses from other studies, of settings that were run with several seeds."""

    studies: Mapping[str, Mapping[str, Array]]  # by study, the losses as in `SeedSpread.of`
    are_alike: bool = True  # whether learning rates and numbers of training rows were similar
    kind: str = "other learning rates or numbers of training rows"  # the difference if not


@dataclass(frozen=True)
class SeedSpread:
    """The variance of a trial's loss over seeds (nats² per token), by cell and in general."""

    typical: float  # the variance of a cell that is not in `own`
    freedom: float  # degrees of freedom of `typical`
    cells: int  # number of cells in the study
    own: Mapping[str, float] = field(default_factory=dict)  # variances by cell
    own_freedom: Mapping[str, float] = field(default_factory=dict)  # their degrees of freedom
    source: str = ""  # where the variances are from, as a clause of a sentence
    word: str = "nats"  # the unit of the losses in short
    measured: float = 1.0  # share of `typical` that comes from losses; the rest is assumed
    # by tuned cell, the variance that the choice of its value adds to its mean loss
    choice: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, losses: Mapping[str, Array], word: str = "nats") -> SeedSpread:
        """Estimate the spread from the cells of a study.

        Args:
            losses: by cell, `[seeds]`; all cells have the same two or more seeds.
            word: the unit of the losses in short.
        """
        table = np.array(list(losses.values()))
        typical, freedom = pooled(table)
        own, own_freedom = (
            dict(zip(losses, values.tolist(), strict=True)) for values in moderated(table)
        )
        return cls(typical, freedom, len(losses), own, own_freedom, "measured in this study", word)

    @classmethod
    def of_others(cls, others: Seeded, measure: Measure = NATS) -> SeedSpread:
        """Estimate the spread from other studies; without any, assume it.

        Each study is a block of its own, and their variances are pooled by degrees of freedom. The
        assumed variance counts as one more study if the others have fewer degrees of freedom than
        it has, or if their runs were of another kind.

        Args:
            others: losses of other studies.
            measure: what the losses are given in.
        """
        assumed = (PRIOR * measure.scale) ** 2
        studies, left_out = without_outliers(others.studies, assumed)
        known = [_pooled(cells) for cells in studies.values()]
        freedom = sum(study_freedom for _, study_freedom in known)
        source = f"measured in {_source(studies)}" if known else "assumed, not measured here"
        source += left_out
        if not known or not others.are_alike or freedom < PRIOR_FREEDOM:
            known.append((assumed, PRIOR_FREEDOM))
        if studies and not others.are_alike:
            source += f"; of {others.kind}, so the assumed spread counts too"
        elif 0 < freedom < PRIOR_FREEDOM:
            source += "; so few that the assumed spread counts too"
        total = sum(study_freedom for _, study_freedom in known)
        typical = sum(variance * study_freedom for variance, study_freedom in known) / total
        return cls(typical, total, 0, source=source, word=measure.word, measured=freedom / total)

    def luck(self, first: Sequence[str], second: Sequence[str], seeds: int) -> Luck:
        """Return the luck of a difference: the mean of the second cells minus that of the first.

        Args:
            first: names of cells.
            second: names of cells.
            seeds: the number of seeds that all of them share.
        """
        weights = [(cell, 1 / len(side) ** 2) for side in (first, second) for cell in side]
        variance, freedom = self._weighted(weights, seeds)
        _, of_runs = replace(self, choice={})._weighted(weights, seeds)
        # the number of cells of equal variance that would have as many degrees of freedom
        cells = 1 + (self.cells - 1) * of_runs / self.freedom if self.own else self.cells
        source = "" if seeds > 1 else self.sentence
        return Luck(variance * seeds, freedom, max(2.0, cells), source)

    def of_mean(self, cells: Sequence[str], seeds: int) -> tuple[float, float]:
        """Return the variance of a mean loss of cells over other seeds; degrees of freedom."""
        return self._weighted([(cell, 1 / len(cells) ** 2) for cell in cells], seeds)

    def _weighted(self, weights: Sequence[tuple[str, float]], seeds: int) -> tuple[float, float]:
        """Return a weighted sum of variances, and its degrees of freedom (Welch-Satterthwaite).

        The degrees of freedom of the runs are at most those of the best known part, since the
        cells borrow from each other. The variance that the choice of tuned values adds counts as
        known.
        """
        parts = np.array([weight * self.own.get(cell, self.typical) for cell, weight in weights])
        freedoms = np.array([self.own_freedom.get(cell, self.freedom) for cell, _ in weights])
        of_runs, freedom = float(parts.sum()) / seeds, float(freedoms.max())
        if unsure := float((parts**2 / freedoms).sum()) / seeds**2:
            freedom = min(freedom, of_runs**2 / unsure)
        of_choice = sum(weight * self.choice.get(cell, 0.0) for cell, weight in weights)
        if of_choice:
            freedom *= (1 + of_choice / of_runs) ** 2 if of_runs else math.inf
        return of_runs + of_choice, freedom

    @property
    def sentence(self) -> str:
        """How much two trials of one setting differ in loss, and how that is known.

        What a seed does to all settings alike is not included: it cancels in every comparison.
        """
        deviation = math.sqrt(2 * self.typical)
        return (
            f"two runs of one setting differ by about {deviation:.2g} {self.word}, besides what "
            f"their seeds do to all settings alike ({self.source})"
        )


@lru_cache(maxsize=2)
def seed_spread(comparison: Comparison) -> SeedSpread:
    """Return the spread over seeds of a study, with the variance that its tuning adds."""
    choice = {
        name: choice_variance(fmean(trial.optimism for trial in trials))
        for name, trials in comparison.cells().items()
        if any(len(trial.finished) > 1 for trial in trials)
    }
    return replace(_seed_spread(comparison), choice=choice)


def choice_variance(optimism: float) -> float:
    """Return what the choice of a tuned value adds to the variance of a cross-fitted mean loss.

    Parts that were scored with different values share the rows and runs that chose them. No
    variance between rows or seeds shows this covariance. It grows with the luck of the choice, and
    so does the optimism of the lowest loss. Half of the square of the optimism suffices by
    simulation (`python -m benchmarks.tuned`).

    Args:
        optimism: the cross-fitted loss minus that of the chosen value, nats per token.
    """
    return optimism**2 / 2


def _seed_spread(comparison: Comparison) -> SeedSpread:
    """Estimate the spread from cells with several seeds, else from other studies or the prior."""
    if kept := with_seeds(comparison):
        return SeedSpread.of(kept, comparison.measure.word)
    if not comparison.trials:
        return SeedSpread.of_others(Seeded({}), comparison.measure)
    rows = [count for trial in comparison.trials if (count := _training_rows(trial))]
    rates = [rate for trial in comparison.trials if (rate := _rate(trial))]
    others = seeded(other_studies(comparison, _measured_as(comparison)), rows, rates)
    return replace(SeedSpread.of_others(others, comparison.measure), cells=len(comparison.cells()))


def with_seeds(comparison: Comparison) -> dict[str, Array]:
    """Return the losses `[seeds]` of the cells with two or more seeds, by name, on equal seeds."""
    cells = {name: trials for name, trials in comparison.cells().items() if len(trials) > 1}
    seeds = shared_seeds([frozenset(trial.seed for trial in cell) for cell in cells.values()])
    return {
        name: np.array([_of_seed(trials, seed) for seed in sorted(seeds, key=str)])
        for name, trials in cells.items()
        if seeds <= {trial.seed for trial in trials}
    }


def seeded(
    studies: Mapping[str, Comparison], rows: Sequence[int], rates: Sequence[float]
) -> Seeded:
    """Return the cells with seeds of each study: those that trained much alike, or else all.

    Args:
        studies: by name.
        rows: numbers of training rows that are asked about; if empty, any number is alike.
        rates: learning rates that are asked about; likewise.
    """
    near = {
        name: replace(
            study,
            trials=[
                trial
                for trial in study.trials
                if _is_near(_training_rows(trial), rows) and _is_near(_rate(trial), rates)
            ],
        )
        for name, study in studies.items()
    }
    if alike := _with_seeds_each(near):
        return Seeded(alike)
    return Seeded(_with_seeds_each(studies), are_alike=False)


def _with_seeds_each(studies: Mapping[str, Comparison]) -> dict[str, Mapping[str, Array]]:
    return {name: cells for name, study in studies.items() if (cells := with_seeds(study))}


def _is_near(value: float | None, wanted: Sequence[float]) -> bool:
    """Whether a value is from half of the smallest to twice the largest of the wanted ones."""
    if not wanted:
        return True
    return bool(value and min(wanted) <= _ALIKE * value <= _ALIKE**2 * max(wanted))


def _rate(trial: Scored) -> float | None:
    rate = trial.settings.get(RATE)
    return float(rate) if isinstance(rate, int | float) else None


def _training_rows(trial: Scored) -> int | None:
    return trial.row.result.data.get("train_rows") if trial.row.result else None


def _measured_as(comparison: Comparison) -> Callable[[Result], bool]:
    """Return a predicate: whether a result was scored on the same held-out tokens (or text)."""
    key = "eval_fingerprint" if comparison.measure.is_per_token else "eval_text_fingerprint"
    wanted = {trial.row.result.data.get(key) for trial in comparison.trials if trial.row.result}
    wanted.discard(None)
    return lambda result: result.data.get(key) in wanted


def without_outliers(
    studies: Mapping[str, Mapping[str, Array]], assumed: float
) -> tuple[dict[str, Mapping[str, Array]], str]:
    """Drop cells whose runs differ far more than all others, and return a remark about them.

    A cell that nearly diverged would dominate the mean. The test is that of Smyth (2004): the sum
    of squares that a cell adds, against the variance of the rest, with the assumed variance as one
    more study. The rest must keep at least as many degrees of freedom as the cell has.

    Args:
        studies: by name, the losses of cells as in `SeedSpread.of`.
        assumed: the variance that is expected.
    """
    kept, count = dict(studies), 0
    level = _RARE / max(1, sum(map(len, studies.values())))
    while outlier := _outlier(kept, assumed, level):
        name, cell = outlier
        kept[name] = _without(kept[name], cell)
        count += 1
    return kept, f", {counted(count, 'setting')} of far larger spread left out" * bool(count)


def _outlier(
    studies: Mapping[str, Mapping[str, Array]], assumed: float, level: float
) -> tuple[str, str] | None:
    """Return study and name of the most extreme cell; None if none is extreme at this level."""
    sums = {name: _sum(cells) for name, cells in studies.items()}
    squares, freedom = (sum(pair[n] for pair in sums.values()) for n in (0, 1))
    chances = []
    for name, cells in studies.items():
        for cell in cells if len(cells) > 2 else ():
            rest, left = _sum(_without(cells, cell))
            added, cell_freedom = sums[name][0] - rest, sums[name][1] - left
            others = freedom - cell_freedom + PRIOR_FREEDOM
            variance = (squares - added + PRIOR_FREEDOM * assumed) / others
            if cell_freedom <= freedom - cell_freedom:
                ratio = added / cell_freedom / variance
                chances.append((special.fdtrc(cell_freedom, others, ratio), name, cell))
    chance, name, cell = min(chances, default=(1.0, "", ""))
    return (name, cell) if chance < level else None


def _without(cells: Mapping[str, Array], name: str) -> dict[str, Array]:
    return {other: row for other, row in cells.items() if other != name}


def _pooled(cells: Mapping[str, Array]) -> tuple[float, float]:
    """Return the variance of a study's cells, and its degrees of freedom."""
    return pooled(np.array(list(cells.values())))


def _sum(cells: Mapping[str, Array]) -> tuple[float, float]:
    """Return the sum of squares of a study's cells, and its degrees of freedom."""
    variance, freedom = _pooled(cells)
    return variance * freedom, freedom


def _seeds(cells: Mapping[str, Array]) -> int:
    return len(next(iter(cells.values())))


def _source(studies: Mapping[str, Mapping[str, Array]]) -> str:
    """Describe the studies: `the studies ranks, lengths: 5 settings with 3 seeds each`."""
    settings = counted(sum(map(len, studies.values())), "setting")
    seeds = sorted({_seeds(cells) for cells in studies.values()})
    several = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    return f"{listed_studies([*studies])}: {settings} with {several} seeds each"


def listed_studies(names: Sequence[str]) -> str:
    """List up to three studies by name, and count the rest: `the studies ranks, lengths`."""
    noun = "the study" if len(names) == 1 else "the studies"
    more = len(names) - _MOST_NAMED
    return f"{noun} {', '.join(names[:_MOST_NAMED])}" + f" and {more} more" * (more > 0)


def _of_seed(trials: Sequence[Scored], seed: object) -> float:
    return next(trial.loss for trial in trials if trial.seed == seed)


def pooled(losses: Array) -> tuple[float, float]:
    """Return one variance over seeds of all cells `[cells, seeds]`; its degrees of freedom."""
    cells, seeds = losses.shape
    left = losses - losses.mean(axis=1, keepdims=True)
    if cells > 1:
        left = left - left.mean(axis=0)  # what a seed does to all cells alike is not luck
    freedom = max(cells - 1, 1) * (seeds - 1)
    return float((left**2).sum() / freedom), freedom


def moderated(losses: Array) -> tuple[Array, Array]:
    """Return the variance over seeds of each cell, and its degrees of freedom, `[cells]` each.

    Args:
        losses: `[cells, seeds]`.
    """
    cells = len(losses)
    if cells == 1:
        variance, freedom = pooled(losses)
        return np.array([variance]), np.array([freedom])
    left = losses - losses.mean(axis=1, keepdims=True)
    weights = np.ones(cells)
    for _ in range(_PASSES):
        variances, freedoms, chances = np.array(
            [_beside_others(left, weights, cell) for cell in range(cells)]
        ).T
        weights = np.clip(chances / _SUSPECT, _LEAST_WEIGHT, 1.0)
    return variances, freedoms


def _beside_others(left: Array, weights: Array, cell: int) -> tuple[float, float, float]:
    """Return a cell's variance, its degrees of freedom, and the p-value of so wide a spread.

    Args:
        left: `[cells, seeds]`, losses minus the mean of their cell.
        weights: `[cells]`, how much each cell counts for the others.
        cell: its row.
    """
    freedom = left.shape[1] - 1
    others, share = np.delete(left, cell, axis=0), np.delete(weights, cell)
    share = share / share.sum()
    count = 1 / float((share**2).sum())  # effective number of others (Kish)
    of_seed = share @ others  # estimated from the others, so that a wild cell cannot hide in it
    variance = float(((left[cell] - of_seed) ** 2).sum()) / freedom
    others_freedom, rest, chance = (count - 1) * freedom, 0.0, 1.0
    if others_freedom > _LEAST_WEIGHT:
        rest = float((share @ (others - of_seed) ** 2).sum()) / freedom / (1 - 1 / count)
        ratio = variance * count / (count + 1) / rest if rest > 0 else math.inf
        chance = float(special.fdtrc(freedom, others_freedom, ratio)) if variance > 0 else 1.0
    # with fewer seeds a wild cell looks calm more often, so the p-value must be higher
    trust = min(1.0, chance * (freedom + 1)) ** _STEEPNESS
    variance *= count / (count + trust)  # the mean of the others has a variance too
    borrowed = trust * min(others_freedom, MOST_BORROWED)
    total = borrowed + freedom
    return (borrowed * rest + freedom * variance) / total, total, chance
