"""The effect of every swept key: each pair of its values is compared with all else equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from tinyllama_lab.config.axes import by_value, setting_label, short_name, show
from tinyllama_lab.report.analysis.comparison import Comparison, Scored, cell_of, shared_seeds
from tinyllama_lab.report.analysis.costs import mean_costs, moving_costs, noises
from tinyllama_lab.report.analysis.luck import seed_spread
from tinyllama_lab.report.analysis.measure import NATS, Measure
from tinyllama_lab.report.analysis.ran_with import (
    EnvironmentDifferences,
    environment_differences,
    weights_note,
)
from tinyllama_lab.report.analysis.settings import ALL_PAIRS, DEFAULTS, Settings
from tinyllama_lab.report.analysis.statistics import (
    ALPHA,
    LEAST_FREEDOM,
    ONE_SIDED,
    POWER,
    Array,
    Estimate,
    adjusted,
    compare,
)
from tinyllama_lab.report.analysis.tuned import RATE, rate_clause

MOST_SEEDS = 100  # larger numbers are not proposed: nobody would run them
_ROWS_FREEDOM = 4.0  # with less, by simulation, too few rows are promised to suffice
# the verdicts; tables and sentences replace them by words with the two values
UNCLEAR = "no difference shown"
EQUIVALENT = "equivalent within margin"
BETTER, WORSE = "better", "worse"
LOWER, HIGHER = "lower in this one run", "higher in this one run"  # one seed shows no more
DEPENDS = "depends on another setting"  # the average over the other settings would mislead
MOST_VALUES = 6  # values of a key whose pairs may all be compared; of more, only neighbours are
_STEPS = {  # by key, the note without and with train.max_steps
    "data.n": (
        "equal epochs: more rows also took more optimizer steps",
        "equal steps: more rows were seen less often each",
    ),
    "train.epochs": (
        "unequal steps: more epochs also took more optimizer steps",
        "equal steps: train.max_steps ends training, whatever the epochs",
    ),
    "train.batch_size": (
        "equal epochs: a larger batch took fewer optimizer steps",
        "equal steps: a larger batch also saw more rows",
    ),
}
WORDS = {  # what a reader calls a key
    "lora.r": "rank",
    "lora.targets": "target modules",
    "data.n": "training rows",
    "quant.kind": "quantization",
    "train.lr": "learning rate",
    "train.batch_size": "batch size",
    "train.epochs": "epochs",
}


@dataclass(frozen=True)
class Contrast:
    """Two values of one key on the same examples and seeds, with everything else equal.

    The estimate is the loss under `second` minus that under `first`.
    """

    key: str
    first: Any
    second: Any
    where: dict[str, Any]  # the other swept keys; empty for the average over all their values
    pairs: int  # of trials
    seeds: int
    estimate: Estimate
    costs: dict[str, tuple[float, float]]  # name of the cost: mean under first and second
    moved: frozenset[str] = frozenset()  # costs that change in one direction, beyond noise
    # how the environments of the two sides differ
    environments: EnvironmentDifferences = EnvironmentDifferences()
    note: str = ""
    rates: str = ""  # how the learning rates were chosen
    p: float = 1.0  # p-value of no difference, corrected for the number of contrasts
    p_equivalent: float = 1.0  # p-value of a difference beyond the margin, corrected likewise
    verdict: str = ""
    needed: str = field(default="", compare=False)  # what would show the margin, if unclear
    measure: Measure = NATS  # the unit of the estimate
    # one contrast for each value of another key, if the verdict depends on it
    levels: tuple[Contrast, ...] = ()

    @property
    def question(self) -> str:
        """The question in words: `rank: 8 → 16`, and where it was asked."""
        name = name_of(self.key)
        where = ", ".join(setting_label(*pair) for pair in self.where.items())
        return f"{name}: {show(self.first)} → {show(self.second)}" + (f" at {where}" * bool(where))


def name_of(key: str) -> str:
    """Return what a sentence calls a key."""
    return WORDS.get(key, short_name(key))


def main_effects(comparison: Comparison, settings: Settings = DEFAULTS) -> list[Contrast]:
    """Return one contrast for each pair of values of each swept key, averaged over all else.

    Args:
        comparison: the trials that are compared.
        settings: how they are judged; the cost has no effect.
    """
    contrasts = []
    for key, first, second, matched in matches(comparison, settings.pairs):
        contrast = contrast_of((key, first, second), {}, matched, comparison)
        notes = [contrast.note, *_lost_notes(comparison, key, (first, second))]
        contrasts.append(replace(contrast, note="; ".join(filter(None, notes))))
    return judged(contrasts, settings)


def with_parts(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Return the contrasts, each followed by those on which its verdict depends."""
    return [part for contrast in contrasts for part in (contrast, *contrast.levels)]


def simple_effects(comparison: Comparison, settings: Settings = DEFAULTS) -> list[Contrast]:
    """Return the contrasts in each combination of the other keys; empty without other keys.

    Arguments are those of `main_effects`.
    """
    contrasts = []
    for key, first, second, matched in matches(comparison, settings.pairs):
        for cell_pair in matched if len(comparison.keys) > 1 else []:
            trial = cell_pair[0][0]
            where = {k: trial.row.swept.get(k) for k in comparison.keys if k != key}
            contrasts.append(contrast_of((key, first, second), where, [cell_pair], comparison))
    return judged(contrasts, settings)


def effects_at(
    comparison: Comparison, swept: Mapping[str, Any]
) -> dict[tuple[str, str, str], Estimate]:
    """Return the differences at the other keys' values in `swept`, by key and both values."""
    estimates = {}
    for key, first, second, matched in matches(comparison, ALL_PAIRS):
        others = [(other, swept.get(other)) for other in comparison.keys if other != key]
        # a single pair of cells is the main effect itself
        for cell_pair in matched if len(matched) > 1 else []:
            trial = cell_pair[0][0]
            if all(trial.row.swept.get(other) == value for other, value in others):
                estimates[key, show(first), show(second)] = mean_estimate([cell_pair], comparison)
    return estimates


def judged(contrasts: Sequence[Contrast], settings: Settings) -> list[Contrast]:
    """Return the contrasts with verdicts, corrected for the number of contrasts in this list."""
    # all contrasts of a comparison have one measure
    margin = contrasts[0].measure.margin(settings.margin) if contrasts else settings.margin
    differ = adjusted([c.estimate.p_differs() for c in contrasts], settings.correction)
    equal = adjusted([c.estimate.p_equivalent(margin) for c in contrasts], settings.correction)
    with_verdicts = []
    for contrast, p, same in zip(contrasts, differ, equal, strict=True):
        verdict = _verdict(contrast.estimate, p, same, contrast.seeds)
        needed = (
            # Bonferroni is on the safe side of every correction
            _needed(contrast.estimate, margin, ALPHA / len(contrasts))
            if verdict == UNCLEAR and margin > 0
            else ""
        )
        with_verdicts.append(
            replace(contrast, p=p, p_equivalent=same, verdict=verdict, needed=needed)
        )
    return with_verdicts


def _verdict(estimate: Estimate, p: float, same: float, seeds: int) -> str:
    # Equivalence is tested first: a difference that is real but within the margin does not matter.
    if same < ONE_SIDED:
        return EQUIVALENT
    if p < ALPHA:
        is_lower = estimate.difference < 0
        if seeds == 1:
            return LOWER if is_lower else HIGHER
        return BETTER if is_lower else WORSE
    return UNCLEAR


def _needed(estimate: Estimate, margin: float, alpha: float) -> str:
    """Say what would show a difference as large as the margin, four times out of five.

    Empty if such a study as this one looks large enough: it showed nothing, so its luck may well
    be larger than it looks.
    """
    sample = estimate.sample
    if estimate.luck.freedom < LEAST_FREEDOM:
        return "add a third seed first: two of these settings say too little to plan by"
    if estimate.power(margin, estimate.seeds, sample.examples, alpha) >= POWER:
        return ""
    seeds = estimate.seeds_needed(margin, alpha)
    seeds = seeds if seeds and seeds <= MOST_SEEDS else None
    # more rows alone are named only if they suffice with a luck larger than it looks, too
    examples = None
    if estimate.luck.freedom >= _ROWS_FREEDOM:
        examples = estimate.with_larger_luck().examples_needed(margin, alpha)
    ways = [f"{examples} held-out rows"] if examples else []
    ways += [f"{seeds} seeds in all"] if seeds else []
    if not ways:
        both = estimate.both_needed(margin, alpha)
        return (
            "{} seeds in all and {} held-out rows".format(*both)
            if both
            else f"more than {MOST_SEEDS} seeds, as far as these runs can tell"
        )
    if not examples:
        return f"{seeds} seeds in all; more held-out rows without more seeds may not be enough"
    return " or ".join(ways)


CellPair = tuple[list[Scored], list[Scored]]  # trials under the first and the second, seed by seed


def matches(
    comparison: Comparison, pairs: str = DEFAULTS.pairs, with_ends: bool = False
) -> Iterator[tuple[str, Any, Any, list[CellPair]]]:
    """Yield pairs of values of each key, with the cells that differ in that key alone.

    Args:
        comparison: the trials that are compared.
        pairs: of three or more numbers, whether `neighbours` or `all` are compared.
        with_ends: whether the first and the last value of a key are always a pair.

    Yields:
        The key, its first and its second value, and the pairs of cells.
    """
    for key in comparison.keys:
        sides: dict[str, dict[str, dict[Any, Scored]]] = {}  # by value, cell and seed
        for trial in comparison.trials:
            cells = sides.setdefault(show(trial.row.swept.get(key)), {})
            cells.setdefault(cell_of(trial.row, comparison.keys, key), {})[trial.seed] = trial
        for first, second in value_pairs(values_of(comparison, key), pairs, with_ends):
            if matched := _matched(sides[show(first)], sides[show(second)]):
                yield key, first, second, matched


def values_of(comparison: Comparison, key: str) -> list[Any]:
    """Return the distinct values of a key, numbers by size."""
    return in_order(trial.row.swept.get(key) for trial in comparison.trials)


def in_order(values: Iterable[Any]) -> list[Any]:
    """Return the distinct values, numbers by size."""
    return sorted({show(value): value for value in values}.values(), key=_order)


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether all values are numbers; `true` and `false` are not."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def value_pairs(
    values: Sequence[Any], pairs: str = DEFAULTS.pairs, with_ends: bool = False
) -> list[tuple[Any, Any]]:
    """Return the pairs of a key's ordered values that are compared; arguments as in `matches`."""
    if len(values) <= MOST_VALUES and (pairs == ALL_PAIRS or not are_numbers(values)):
        return list(combinations(values, 2))
    ends = [(values[0], values[-1])] if with_ends and len(values) > 2 else []
    return [*zip(values, values[1:], strict=False), *ends]


def _order(value: Any) -> tuple[bool, bool, float, str]:
    """Sort numbers by size, and `none` before other words, which are compared with it."""
    is_word, number, text = by_value(value)
    return is_word, text not in ("none", "False", "null"), number, text


def _matched(
    first: dict[str, dict[Any, Scored]], second: dict[str, dict[Any, Scored]]
) -> list[CellPair]:
    """Return pairs of cells, each on the seeds that most pairs share."""
    shared = {c: frozenset(first[c]) & frozenset(second[c]) for c in first if c in second}
    seeds = shared_seeds(list(shared.values()))
    ordered = sorted(seeds)
    return [
        ([first[cell][seed] for seed in ordered], [second[cell][seed] for seed in ordered])
        for cell, cell_seeds in shared.items()
        if seeds and seeds <= cell_seeds
    ]


def contrast_of(
    step: tuple[str, Any, Any],
    where: dict[str, Any],
    matched: Sequence[CellPair],
    comparison: Comparison,
) -> Contrast:
    """Return the contrast of some pairs of cells, without a verdict.

    Args:
        step: the key and its two values.
        where: what the pairs share of the other keys.
        matched: the pairs, as `matches` yields them.
        comparison: the trials that are compared.
    """
    key, first, second = step
    seeds = len(matched[0][0])
    trials = [two for pair in matched for two in zip(*pair, strict=True)]
    environments = environment_differences(key, (first, second), trials)
    every = [trial for two in trials for trial in two]
    notes = (schedule_note(key, every), weights_note(key, trials), environments.always)
    return Contrast(
        key=key,
        first=first,
        second=second,
        where=where,
        pairs=len(matched) * seeds,
        seeds=seeds,
        estimate=mean_estimate(matched, comparison),
        costs=mean_costs(trials),
        moved=moving_costs(key, trials, noises(comparison)),
        environments=environments,
        note="; ".join(filter(None, notes)),
        rates=_rates(key, (first, second), trials),
        measure=comparison.measure,
    )


def _rates(key: str, values: Sequence[Any], trials: Sequence[Sequence[Scored]]) -> str:
    sides = []
    for value, side in zip(values, zip(*trials, strict=True), strict=True):
        losses: dict[Any, list[float]] = {}
        for trial in side:
            losses.setdefault(trial.settings.get(RATE), []).append(trial.loss)
        sides.append((value, losses))
    return rate_clause(key, trials[0][0].row.tuned, sides)


def mean_estimate(matched: Sequence[CellPair], comparison: Comparison) -> Estimate:
    """Estimate the mean difference over some pairs of cells."""
    trial = matched[0][0][0]
    # Averaged over pairs before the variance is estimated, so that what the pairs share by having
    # the same examples and seeds is part of it.
    differences = np.mean([differences_of(pair) for pair in matched], axis=0)
    cells = [
        [cell_of(side[0].row, comparison.keys) for side in sides]
        for sides in zip(*matched, strict=True)
    ]
    luck = seed_spread(comparison).luck(cells[0], cells[1], len(matched[0][0]))
    return compare(differences, trial.tokens, luck, trial.clusters)


def differences_of(pair: CellPair) -> Array:
    """Return the loss under the second value minus that under the first, `[seeds, examples]`."""
    return np.stack([b.losses - a.losses for a, b in zip(*pair, strict=True)])


def _lost_notes(comparison: Comparison, key: str, values: Sequence[Any]) -> Iterator[str]:
    """Yield a note if runs with a value have no score: it may look good without its bad runs."""
    for value in values:
        lost = sum(show(row.swept.get(key)) == show(value) for row in comparison.lost)
        kept = sum(show(t.row.swept.get(key)) == show(value) for t in comparison.trials)
        if lost:
            yield f"{lost} of {lost + kept} runs with {show(value)} ended without a score"


def schedule_note(key: str, trials: Sequence[Scored]) -> str:
    """Say whether all trials took the same number of optimizer steps or of epochs."""
    if key not in _STEPS:
        return ""
    with_set_steps = sum(bool(trial.settings.get("train.max_steps")) for trial in trials)
    if with_set_steps == len(trials):
        return _STEPS[key][1]
    if with_set_steps == 0:
        return _STEPS[key][0]
    return "equal steps where train.max_steps is set, else equal epochs: two questions in one"
