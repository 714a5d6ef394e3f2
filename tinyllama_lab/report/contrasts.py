"""What a swept key does: every pair of its values, everything else equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from tinyllama_lab.report.comparable import Comparable, Scored, cell_of, shared_seeds
from tinyllama_lab.report.costs import Noise, mean_costs, moving_costs, noises
from tinyllama_lab.report.luck import SeedSpread, seed_spread
from tinyllama_lab.report.measure import NATS, Measure
from tinyllama_lab.report.ran_with import Apart, apart, weights_note
from tinyllama_lab.report.statistics import (
    ALPHA,
    ONE_SIDED,
    POWER,
    Array,
    Estimate,
    adjusted,
    compare,
)
from tinyllama_lab.report.tuned import RATE, rate_clause
from tinyllama_lab.swept import short_name, show

MARGIN = 0.02  # nats a token, 2 % of perplexity: smaller differences count as none
UNCLEAR = "no difference shown"
EQUIVALENT = "equivalent within margin"
BETTER, WORSE = "better", "worse"
LOWER, HIGHER = "lower in this one run", "higher in this one run"  # one seed proves no more
MOST_VALUES = 6  # of a key, whose pairs are all compared; of more only the neighbours
WORDS = {  # what a reader calls a key
    "lora.r": "rank",
    "lora.targets": "target modules",
    "data.n": "training rows",
    "quant.kind": "quantization",
    "train.lr": "learning rate",
}


@dataclass(frozen=True)
class Contrast:
    """Two values of one key, on the same examples and seeds, everything else equal.

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
    moved: frozenset[str] = frozenset()  # costs that go the same way in every pair
    apart: Apart = Apart()  # how the two sides did not run alike
    note: str = ""
    rates: str = ""  # how the learning rates were chosen
    p: float = 1.0  # that they differ, corrected for the number of contrasts
    p_equivalent: float = 1.0  # likewise
    verdict: str = ""
    needed: str = field(default="", compare=False)
    measure: Measure = NATS  # of the estimate

    @property
    def question(self) -> str:
        """`rank: 8 → 16`, and where."""
        name = WORDS.get(self.key, short_name(self.key))
        where = ", ".join(f"{short_name(k)}={show(v)}" for k, v in self.where.items())
        return f"{name}: {show(self.first)} → {show(self.second)}" + (f" at {where}" * bool(where))


def main_effects(
    found: Comparable, margin: float = MARGIN, correction: str = "holm"
) -> list[Contrast]:
    """One contrast for each pair of values of each swept key, averaged over all else."""
    contrasts, known = [], _known(found)
    for key, first, second, matched in _matches(found):
        contrast = _contrast((key, first, second), {}, matched, found, known)
        notes = [contrast.note, *_lost_notes(found, key, (first, second))]
        contrasts.append(replace(contrast, note="; ".join(filter(None, notes))))
    return judged(contrasts, margin, correction)


def simple_effects(
    found: Comparable, margin: float = MARGIN, correction: str = "holm"
) -> list[Contrast]:
    """The same, apart for every combination of the other keys; none where there is only one."""
    contrasts, known = [], _known(found)
    for key, first, second, matched in _matches(found):
        for one in matched if len(found.keys) > 1 else []:
            trial = one[0][0]
            where = {k: trial.row.swept.get(k) for k in found.keys if k != key}
            contrasts.append(_contrast((key, first, second), where, [one], found, known))
    return judged(contrasts, margin, correction)


def effects_at(
    found: Comparable, swept: Mapping[str, Any]
) -> dict[tuple[str, str, str], Estimate]:
    """By key and its two values as shown, the difference where all else is as in `swept`."""
    here, spread = {}, seed_spread(found)
    for key, first, second, matched in _matches(found):
        others = [(other, swept.get(other)) for other in found.keys if other != key]
        for one in matched if len(matched) > 1 else []:  # one is what the average is of
            trial = one[0][0]
            if all(trial.row.swept.get(other) == value for other, value in others):
                here[key, show(first), show(second)] = _estimate([one], found, spread)
    return here


def judged(contrasts: Sequence[Contrast], margin: float, correction: str) -> list[Contrast]:
    """Verdicts, corrected for the number of contrasts in this list."""
    margin = contrasts[0].measure.margin(margin) if contrasts else margin
    differ = adjusted([c.estimate.p_differs() for c in contrasts], correction)
    equal = adjusted([c.estimate.p_equivalent(margin) for c in contrasts], correction)
    found = []
    for contrast, p, same in zip(contrasts, differ, equal, strict=True):
        verdict = _verdict(contrast.estimate, p, same, contrast.seeds)
        needed = (
            _needed(contrast.estimate, margin, ALPHA / len(contrasts))
            if verdict == UNCLEAR and margin > 0
            else ""
        )
        found.append(replace(contrast, p=p, p_equivalent=same, verdict=verdict, needed=needed))
    return found


def _verdict(estimate: Estimate, p: float, same: float, seeds: int) -> str:
    if same < ONE_SIDED:
        return EQUIVALENT
    if p < ALPHA:
        is_lower = estimate.difference < 0
        if seeds == 1:
            return LOWER if is_lower else HIGHER
        return BETTER if is_lower else WORSE
    return UNCLEAR


def _needed(estimate: Estimate, margin: float, alpha: float) -> str:
    """What would show a difference as large as the margin, four times out of five."""
    own = estimate.sample
    if estimate.power(margin, estimate.seeds, own.examples, alpha) >= POWER:
        return "these would do, four times out of five"
    seeds = estimate.seeds_needed(margin, alpha)
    examples = estimate.examples_needed(margin, alpha)
    ways = [f"{examples} examples"] if examples else []
    ways += [f"{seeds} seeds"] if seeds else []
    if not ways:
        both = estimate.both_needed(margin, alpha)
        return "{} seeds and {} examples".format(*both) if both else "no number of runs would do"
    if not examples:
        return f"{seeds} seeds; no number of examples would do"
    return " or ".join(ways)


Pair = tuple[list[Scored], list[Scored]]  # trials under the first and the second, seed by seed


def _matches(found: Comparable) -> Iterator[tuple[str, Any, Any, list[Pair]]]:
    """Pairs of values of each key, with the cells that differ in that key alone."""
    for key in found.keys:
        values: dict[str, Any] = {}
        sides: dict[str, dict[str, dict[Any, Scored]]] = {}  # by value, cell and seed
        for trial in found.trials:
            value = trial.row.swept.get(key)
            values[show(value)] = value
            cells = sides.setdefault(show(value), {})
            cells.setdefault(cell_of(trial.row, found.keys, key), {})[trial.seed] = trial
        ordered = sorted(values.values(), key=_order)
        near = zip(ordered, ordered[1:], strict=False)
        for first, second in combinations(ordered, 2) if len(ordered) <= MOST_VALUES else near:
            if matched := _matched(sides[show(first)], sides[show(second)]):
                yield key, first, second, matched


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size; `none` before other words, because it is what they are compared with."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0, float(value), ""
    return 1, float(show(value) not in ("none", "False", "null")), show(value)


def _matched(
    first: dict[str, dict[Any, Scored]], second: dict[str, dict[Any, Scored]]
) -> list[Pair]:
    """Pairs of cells, each on the seeds that most of them share."""
    shared = {c: frozenset(first[c]) & frozenset(second[c]) for c in first if c in second}
    seeds = shared_seeds(list(shared.values()))
    ordered = sorted(seeds)
    return [
        ([first[cell][seed] for seed in ordered], [second[cell][seed] for seed in ordered])
        for cell, own in shared.items()
        if seeds and seeds <= own
    ]


def _known(found: Comparable) -> tuple[SeedSpread, dict[str, Noise]]:
    """How much the losses of equal trials differ, and their costs."""
    return seed_spread(found), noises(found)


def _contrast(
    asked: tuple[str, Any, Any],
    where: dict[str, Any],
    matched: Sequence[Pair],
    found: Comparable,
    known: tuple[SeedSpread, dict[str, Noise]],
) -> Contrast:
    key, first, second = asked
    spread, noise = known
    seeds = len(matched[0][0])
    trials = [two for pair in matched for two in zip(*pair, strict=True)]
    ran_apart = apart(key, (first, second), trials)
    notes = (_schedule_note(key, matched), weights_note(key, trials), ran_apart.always)
    return Contrast(
        key=key,
        first=first,
        second=second,
        where=where,
        pairs=len(matched) * seeds,
        seeds=seeds,
        estimate=_estimate(matched, found, spread),
        costs=mean_costs(trials),
        moved=moving_costs(trials, noise),
        apart=ran_apart,
        note="; ".join(filter(None, notes)),
        rates=_rates(key, (first, second), trials),
        measure=found.measure,
    )


def _rates(key: str, values: Sequence[Any], trials: Sequence[Sequence[Scored]]) -> str:
    sides = zip(values, zip(*trials, strict=True), strict=True)
    rates = [(value, [trial.settings.get(RATE) for trial in side]) for value, side in sides]
    return rate_clause(key, trials[0][0].row.tuned, rates)


def _estimate(matched: Sequence[Pair], found: Comparable, spread: SeedSpread) -> Estimate:
    """Of the mean difference over some pairs of cells."""
    trial = matched[0][0][0]
    differences = np.mean([_differences(pair) for pair in matched], axis=0)
    cells = [
        [cell_of(side[0].row, found.keys) for side in sides]
        for sides in zip(*matched, strict=True)
    ]
    luck = spread.luck(cells[0], cells[1], len(matched[0][0]))
    return compare(differences, trial.tokens, luck, trial.clusters)


def _differences(pair: Pair) -> Array:
    """`[seeds, examples]`."""
    return np.stack([b.losses - a.losses for a, b in zip(*pair, strict=True)])


def _lost_notes(found: Comparable, key: str, values: Sequence[Any]) -> Iterator[str]:
    """A value may look good because its bad runs have no score."""
    for value in values:
        lost = sum(show(row.swept.get(key)) == show(value) for row in found.lost)
        kept = sum(show(t.row.swept.get(key)) == show(value) for t in found.trials)
        if lost:
            yield f"{lost} of {lost + kept} runs with {show(value)} ended without a score"


def _schedule_note(key: str, matched: Sequence[Pair]) -> str:
    """More rows mean more updates, unless their number is set: two different questions."""
    if key != "data.n":
        return ""
    trials = [trial for pair in matched for side in pair for trial in side]
    with_set_steps = sum(bool(trial.settings.get("train.max_steps")) for trial in trials)
    if with_set_steps == len(trials):
        return "equal updates: both took the same number of optimizer steps"
    if with_set_steps == 0:
        return "equal epochs: more rows also took more optimizer steps"
    return "equal updates where train.max_steps is set, else equal epochs: two questions in one"
