"""How much the luck of a training run changes a loss, from all settings that were run with seeds.

The model is that of a randomized block design: `loss[cell, seed] = cell + seed + luck`. What a
seed does to every cell alike (its order of the rows) falls out of a difference on the same seeds;
the luck does not. Cells may differ in how lucky they can be (a high learning rate): where there
are enough of them, each one's variance is shrunk towards that of all (Smyth 2004: moderated t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import fmean

import numpy as np
from scipy import special

from tinyllama_lab.report.analysis.comparable import Comparable, Scored, shared_seeds
from tinyllama_lab.report.analysis.earlier import other_studies
from tinyllama_lab.report.analysis.measure import NATS, Measure
from tinyllama_lab.report.analysis.statistics import Array, Luck
from tinyllama_lab.report.analysis.tuned import RATE
from tinyllama_lab.report.text import counted
from tinyllama_lab.study.trial import Result

PRIOR = 0.03  # nats per token: standard deviation of a trial's loss over seeds
PRIOR_FREEDOM = 4.0  # how well that is known: spreads of 0.018 to 0.086 are in its 95 %
_LEAST_CELLS = 6  # of fewer, nobody can tell whether their variances differ
_ALIKE = 2.0  # numbers of training rows, and learning rates, up to this ratio are alike
_RARE = 0.001  # the chance that any cell is left out where all have one spread
_MOST_NAMED = 3  # studies in a sentence


@dataclass(frozen=True)
class Seeded:
    """The losses of studies whose settings were run with several seeds."""

    studies: Mapping[str, Mapping[str, Array]]  # by name, the losses of cells as in `of`
    are_alike: bool = True  # whether they trained with about as many rows and such a rate
    kind: str = "other learning rates or numbers of training rows"  # where they did not


@dataclass(frozen=True)
class SeedSpread:
    """The variance of a trial's loss over seeds (nats² a token), for every cell and for any."""

    typical: float
    freedom: float  # degrees of freedom of `typical`
    cells: int
    own: Mapping[str, float] = field(default_factory=dict)  # by cell
    own_freedom: float = math.inf
    source: str = ""
    word: str = "nats"  # what losses are given in
    measured: float = 1.0  # share of `typical` that comes from losses; the rest is assumed
    # by cell whose learning rate (or another setting) was tuned: the variance that the choice of
    # its value adds to its mean loss
    choice: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, losses: Mapping[str, Array], word: str = "nats") -> SeedSpread:
        """From the losses of cells, by name `[seeds]`, all on the same two or more seeds."""
        variances, typical, own_freedom, freedom = moderated(np.array(list(losses.values())))
        own = dict(zip(losses, variances.tolist(), strict=True))
        return cls(typical, freedom, len(losses), own, own_freedom, "measured in this study", word)

    @classmethod
    def of_others(cls, others: Seeded, measure: Measure = NATS) -> SeedSpread:
        """What other studies say of trials like theirs; without any, what is assumed.

        Each study is a block of its own, and their variances are pooled by degrees of freedom.
        With fewer of these than the assumed variance has, or where the runs were of another
        kind, the assumed one counts as one more study.

        Args:
            others: losses of other studies.
            measure: what the losses are given in.
        """
        assumed = (PRIOR * measure.scale) ** 2
        studies, left_out = without_outliers(others.studies, assumed)
        known = [_pooled(cells) for cells in studies.values()]
        freedom = sum(own for _, own in known)
        source = f"measured in {_source(studies)}" if known else "assumed, not measured here"
        source += left_out
        if not known or not others.are_alike or freedom < PRIOR_FREEDOM:
            known.append((assumed, PRIOR_FREEDOM))
        if studies and not others.are_alike:
            source += f"; of {others.kind}, so the assumed spread counts too"
        elif 0 < freedom < PRIOR_FREEDOM:
            source += "; so few that the assumed spread counts too"
        total = sum(own for _, own in known)
        typical = sum(variance * own for variance, own in known) / total
        return cls(typical, total, 0, source=source, word=measure.word, measured=freedom / total)

    def variance(self, cells: Sequence[str], seeds: int) -> float:
        """Of the mean loss of some cells over so many other seeds."""
        of_runs = sum(self.own.get(cell, self.typical) for cell in cells) / seeds
        of_choice = sum(self.choice.get(cell, 0.0) for cell in cells)
        return (of_runs + of_choice) / len(cells) ** 2

    def luck(self, first: Sequence[str], second: Sequence[str], seeds: int) -> Luck:
        """Of the mean of the second cells minus that of the first, on so many shared seeds.

        What the choice of tuned values adds is known better than the luck of a run, so that the
        degrees of freedom of the sum are more (Satterthwaite).
        """
        variance = seeds * sum(self.variance(side, seeds) for side in (first, second))
        runs = replace(self, choice={})
        of_runs = seeds * sum(runs.variance(side, seeds) for side in (first, second))
        known = all(cell in self.own for cell in (*first, *second))
        freedom = min(self.own_freedom, self.freedom) if known else self.freedom
        if variance > of_runs:
            freedom *= (variance / of_runs) ** 2 if of_runs else math.inf
        return Luck(variance, freedom, max(2, self.cells), "" if seeds > 1 else self.sentence)

    @property
    def sentence(self) -> str:
        """By how much two trials of one setting differ in loss, and how that is known.

        What a seed does to all settings alike is not counted: it falls out of every comparison.
        """
        deviation = math.sqrt(2 * self.typical)
        return (
            f"two runs of one setting differ by about {deviation:.2g} {self.word}, beside what "
            f"their seeds do to all settings alike ({self.source})"
        )


@lru_cache(maxsize=2)
def seed_spread(found: Comparable) -> SeedSpread:
    """From the cells that have two or more seeds, else from other studies, else the prior."""
    choice = {
        name: choice_variance(fmean(trial.optimism for trial in trials))
        for name, trials in found.cells().items()
        if any(len(trial.finished) > 1 for trial in trials)
    }
    return replace(_seed_spread(found), choice=choice)


def choice_variance(optimism: float) -> float:
    """What the choice of a tuned value adds to the variance of a cross-fitted mean loss.

    Parts that were scored with different values share the rows and runs that chose them, which
    no variance between rows or seeds shows. The more the choice was luck, the larger are both
    this covariance and the optimism of the lowest loss. Half of its square is enough by
    simulation (`python -m benchmarks.tuned`).

    Args:
        optimism: the cross-fitted loss minus that of the chosen value, nats per token.
    """
    return optimism**2 / 2


def _seed_spread(found: Comparable) -> SeedSpread:
    if kept := with_seeds(found):
        return SeedSpread.of(kept, found.measure.word)
    if not found.trials:
        return SeedSpread.of_others(Seeded({}), found.measure)
    rows = [count for trial in found.trials if (count := _training_rows(trial))]
    rates = [rate for trial in found.trials if (rate := _rate(trial))]
    others = seeded(other_studies(found, _measured_as(found)), rows, rates)
    return replace(SeedSpread.of_others(others, found.measure), cells=len(found.cells()))


def with_seeds(found: Comparable) -> dict[str, Array]:
    """The losses of the cells that have two or more seeds, by name `[seeds]`, all on the same."""
    cells = {name: trials for name, trials in found.cells().items() if len(trials) > 1}
    seeds = shared_seeds([frozenset(trial.seed for trial in each) for each in cells.values()])
    return {
        name: np.array([_of_seed(trials, seed) for seed in sorted(seeds, key=str)])
        for name, trials in cells.items()
        if seeds <= {trial.seed for trial in trials}
    }


def seeded(
    studies: Mapping[str, Comparable], rows: Sequence[int], rates: Sequence[float]
) -> Seeded:
    """The cells of each study that have seeds: those that trained much alike, or else all.

    Args:
        studies: by name.
        rows: numbers of training rows that are asked about; of none, all are alike.
        rates: learning rates, likewise.
    """
    near = {
        name: replace(
            found,
            trials=[
                trial
                for trial in found.trials
                if _is_near(_training_rows(trial), rows) and _is_near(_rate(trial), rates)
            ],
        )
        for name, found in studies.items()
    }
    if alike := _with_seeds_each(near):
        return Seeded(alike)
    return Seeded(_with_seeds_each(studies), are_alike=False)


def _with_seeds_each(studies: Mapping[str, Comparable]) -> dict[str, Mapping[str, Array]]:
    return {name: cells for name, found in studies.items() if (cells := with_seeds(found))}


def _is_near(value: float | None, wanted: Sequence[float]) -> bool:
    """Whether it lies among the wanted ones, or is at most twice or half of one at their ends."""
    if not wanted:
        return True
    return bool(value and min(wanted) <= _ALIKE * value <= _ALIKE**2 * max(wanted))


def _rate(trial: Scored) -> float | None:
    rate = trial.settings.get(RATE)
    return float(rate) if isinstance(rate, int | float) else None


def _training_rows(trial: Scored) -> int | None:
    return trial.row.result.data.get("train_rows") if trial.row.result else None


def _measured_as(found: Comparable) -> Callable[[Result], bool]:
    """Whether the loss of a result is of the same held-out tokens, or text where that counts."""
    key = "eval_fingerprint" if found.measure.is_per_token else "eval_text_fingerprint"
    wanted = {trial.row.result.data.get(key) for trial in found.trials if trial.row.result}
    wanted.discard(None)
    return lambda result: result.data.get(key) in wanted


def without_outliers(
    studies: Mapping[str, Mapping[str, Array]], assumed: float
) -> tuple[dict[str, Mapping[str, Array]], str]:
    """Without cells whose runs differ far more than all others, and a remark about them.

    One that nearly diverged would decide the mean. The test is that of Smyth (2004): the sum of
    squares that a cell adds against the variance of the rest, with the assumed variance as one
    study more. The rest keeps at least as many degrees of freedom as a cell has.

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
    """The study and name of the cell that stands out most; None where none does at this level."""
    sums = {name: _sum(cells) for name, cells in studies.items()}
    squares, freedom = (sum(pair[n] for pair in sums.values()) for n in (0, 1))
    chances = []
    for name, cells in studies.items():
        for cell in cells if len(cells) > 2 else ():
            rest, left = _sum(_without(cells, cell))
            added, own = sums[name][0] - rest, sums[name][1] - left
            others = freedom - own + PRIOR_FREEDOM
            variance = (squares - added + PRIOR_FREEDOM * assumed) / others
            if own <= freedom - own:
                chances.append((special.fdtrc(own, others, added / own / variance), name, cell))
    chance, name, cell = min(chances, default=(1.0, "", ""))
    return (name, cell) if chance < level else None


def _without(cells: Mapping[str, Array], name: str) -> dict[str, Array]:
    return {other: row for other, row in cells.items() if other != name}


def _pooled(cells: Mapping[str, Array]) -> tuple[float, float]:
    """The variance of a study's cells, and its degrees of freedom."""
    _, typical, _, freedom = moderated(np.array(list(cells.values())))
    return typical, freedom


def _sum(cells: Mapping[str, Array]) -> tuple[float, float]:
    """The sum of squares of a study's cells, and its degrees of freedom."""
    variance, freedom = _pooled(cells)
    return variance * freedom, freedom


def _seeds(cells: Mapping[str, Array]) -> int:
    return len(next(iter(cells.values())))


def _source(studies: Mapping[str, Mapping[str, Array]]) -> str:
    """`the studies ranks, lengths: 5 settings with 3 seeds each`."""
    settings = counted(sum(map(len, studies.values())), "setting")
    seeds = sorted({_seeds(cells) for cells in studies.values()})
    several = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    return f"{listed_studies([*studies])}: {settings} with {several} seeds each"


def listed_studies(names: Sequence[str]) -> str:
    """`the studies ranks, lengths`; of many the first."""
    noun = "the study" if len(names) == 1 else "the studies"
    more = len(names) - _MOST_NAMED
    return f"{noun} {', '.join(names[:_MOST_NAMED])}" + f" and {more} more" * (more > 0)


def _of_seed(trials: Sequence[Scored], seed: object) -> float:
    return next(trial.loss for trial in trials if trial.seed == seed)


def moderated(losses: Array) -> tuple[Array, float, float, float]:
    """Variances over seeds of `[cells, seeds]` losses.

    Returns:
        The shrunk variance of each cell, that of all, and the degrees of freedom of both.
    """
    cells, seeds = losses.shape
    left = losses - losses.mean(axis=1, keepdims=True)
    if cells > 1:
        left = left - left.mean(axis=0)
    freedom = max(cells - 1, 1) * (seeds - 1)
    pooled = float((left**2).sum() / freedom)
    each, own = (left**2).sum(axis=1) * cells / freedom, freedom / cells
    if cells < _LEAST_CELLS or not (each > 0).all():
        return np.full(cells, pooled), pooled, freedom, freedom
    centre, prior = _prior(np.log(each), own)
    if math.isinf(prior):
        return np.full(cells, pooled), pooled, freedom, freedom
    return (prior * centre + own * each) / (prior + own), pooled, prior + own, freedom


def _prior(logs: Array, freedom: float) -> tuple[float, float]:
    """Where variances come from: their centre, and degrees of freedom; infinite if all are one."""
    errors = logs - special.digamma(freedom / 2) + math.log(freedom / 2)
    more = float(errors.var(ddof=1)) - float(special.polygamma(1, freedom / 2))
    if more <= 0:
        return math.exp(float(errors.mean())), math.inf
    low, high = 1e-3, 1e6
    for _ in range(80):  # trigamma falls; find where it is `more`
        middle = math.sqrt(low * high)
        low, high = (middle, high) if special.polygamma(1, middle) > more else (low, middle)
    prior = 2 * low
    centre = float(errors.mean()) + float(special.digamma(prior / 2)) - math.log(prior / 2)
    return math.exp(centre), prior
