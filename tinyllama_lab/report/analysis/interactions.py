"""Whether what one setting does depends on another: differences of differences.

This is what a step of one key does at one value of another key, minus what it does at the other
value. Half of it is the mean of two pairs of cells, one of them reversed, so it has the same
interval as every other comparison. The tests are corrected among themselves.

Where the effect is positive at one value and negative at another, no average is reported: each
value of the other key gets its own verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinyllama_lab.config.axes import setting_label, show
from tinyllama_lab.report.analysis.comparison import Comparison, cell_of
from tinyllama_lab.report.analysis.contrasts import (
    DEPENDS,
    EQUIVALENT,
    CellPair,
    Contrast,
    contrast_of,
    judged,
    matches,
    mean_estimate,
    name_of,
    value_pairs,
    values_of,
)
from tinyllama_lab.report.analysis.measure import NATS, Measure
from tinyllama_lab.report.analysis.settings import ALL_PAIRS, DEFAULTS, Settings
from tinyllama_lab.report.analysis.statistics import ALPHA, Estimate, adjusted


@dataclass(frozen=True)
class Interaction:
    """How the effect of one step of `key` changes from the value `low` to `high` of `other`."""

    key: str
    first: Any
    second: Any
    other: str
    low: Any
    high: Any
    half: Estimate  # half the difference of differences
    p: float = 1.0  # corrected, of the hypothesis that there is no interaction
    measure: Measure = NATS

    @property
    def is_shown(self) -> bool:
        """Whether the effect differs by more than noise."""
        return self.p < ALPHA

    @property
    def sentence(self) -> str:
        """Both steps, and by how much the effect of the first changes over the second."""
        low, high = (2 * end for end in self.half.interval())
        low_label, high_label = (setting_label(self.other, end) for end in (self.low, self.high))
        return (
            f"{name_of(self.key)} {show(self.first)} → {show(self.second)}: from "
            f"{low_label} to {high_label} the difference changes by "
            f"{2 * self.half.difference:+.3f} {self.measure.unit} (95 % {low:+.3f} to {high:+.3f})"
        )


def interactions(comparison: Comparison, settings: Settings = DEFAULTS) -> list[Interaction]:
    """Test every two keys and every two pairs of their values for an interaction.

    The pairs are those that are compared, and the first with the last value of each key.

    Args:
        comparison: the trials that are compared.
        settings: how they are judged; only the correction and the pairs have an effect.
    """
    tests = [
        Interaction(key, first, second, other, low, high, half)
        for key, first, second, matched in matches(comparison, settings.pairs, with_ends=True)
        for other in comparison.keys[comparison.keys.index(key) + 1 :]
        for low, high, half in _halves(comparison, key, other, matched, settings.pairs)
    ]
    corrected = adjusted([test.half.p_differs() for test in tests], settings.correction)
    return [
        replace(test, p=p, measure=comparison.measure)
        for test, p in zip(tests, corrected, strict=True)
    ]


def _halves(
    comparison: Comparison, key: str, other: str, matched: Sequence[CellPair], pairs: str
) -> Iterator[tuple[Any, Any, Estimate]]:
    """Yield two values of `other`, and half of how much the difference changes between them."""
    by_value = _by_value(matched, other)
    rest = [swept_key for swept_key in comparison.keys if swept_key != key]
    for low, high in value_pairs(values_of(comparison, other), pairs, with_ends=True):
        first, second = (
            {cell_of(pair[0][0].row, rest, other): pair for pair in by_value.get(show(value), [])}
            for value in (low, high)
        )
        shared = [cell for cell in first if cell in second]
        if shared:
            # a reversed pair has the opposite sign: the mean is half of (second - first)
            turned = [first[cell][::-1] for cell in shared]
            half = mean_estimate([*turned, *(second[cell] for cell in shared)], comparison)
            yield low, high, half


def _by_value(matched: Sequence[CellPair], other: str) -> dict[str, list[CellPair]]:
    pairs: dict[str, list[CellPair]] = {}
    for pair in matched:
        pairs.setdefault(show(pair[0][0].row.swept.get(other)), []).append(pair)
    return pairs


def with_levels(
    comparison: Comparison,
    effects: Sequence[Contrast],
    tests: Sequence[Interaction],
    settings: Settings,
) -> list[Contrast]:
    """Give an effect one verdict for each value of another key, where the average hides these."""
    matched = {
        (key, show(first), show(second)): pairs
        for key, first, second, pairs in matches(comparison, ALL_PAIRS)
    }
    resolved = []
    for effect in effects:
        name = effect.key, show(effect.first), show(effect.second)
        for other in _others(effect, tests):
            levels = _levels(comparison, effect, other, matched[name])
            levels = judged(levels, settings)
            # the keys come with the clearest first, so the first whose parts disagree is shown
            if _hides(effect, levels, settings.margin):
                effect = replace(effect, verdict=DEPENDS, needed="", levels=tuple(levels))
                break
        resolved.append(effect)
    return resolved


def _others(effect: Contrast, tests: Sequence[Interaction]) -> list[str]:
    """Return the keys on which the effect was shown to depend, the smallest p-value first."""
    values = {show(effect.first), show(effect.second)}
    p_by_key: dict[str, float] = {}
    for test in tests:
        for key, pair, other in (
            (test.key, (test.first, test.second), test.other),
            (test.other, (test.low, test.high), test.key),
        ):
            if test.is_shown and key == effect.key and set(map(show, pair)) == values:
                p_by_key[other] = min(test.p, p_by_key.get(other, 1.0))
    return sorted(p_by_key, key=lambda other: p_by_key[other])


def _levels(
    comparison: Comparison, effect: Contrast, other: str, matched: Sequence[CellPair]
) -> list[Contrast]:
    by_value = _by_value(matched, other)
    step = effect.key, effect.first, effect.second
    return [
        contrast_of(step, {other: value}, by_value[show(value)], comparison)
        for value in values_of(comparison, other)
        if show(value) in by_value
    ]


def _hides(effect: Contrast, levels: Sequence[Contrast], margin: float) -> bool:
    """Whether the average misleads: its parts differ in sign, or exceed a margin that it keeps."""
    differences = [level.estimate.difference for level in levels]
    is_turned = min(differences) < 0 < max(differences)
    is_equal = effect.verdict == EQUIVALENT and max(map(abs, differences)) > effect.measure.margin(
        margin
    )
    return is_turned or is_equal
