"""Contrasts as rows of the page's tables of verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tinyllama_lab.config.axes import short_name, show
from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.comparison import Comparison
from tinyllama_lab.report.analysis.contrasts import (
    BETTER,
    DEPENDS,
    EQUIVALENT,
    HIGHER,
    LOWER,
    MOST_VALUES,
    UNCLEAR,
    WORSE,
    Contrast,
    simple_effects,
    with_parts,
)
from tinyllama_lab.report.analysis.measure import percent
from tinyllama_lab.report.analysis.settings import Settings

MOST_SIMPLE = 400  # contrasts; each takes milliseconds, for the search of what would be needed
KINDS = {  # by verdict: CSS class, symbol, word
    BETTER: ("better", "▼", "better"),
    WORSE: ("worse", "▲", "worse"),
    LOWER: ("lower", "▽", "lower in one run"),
    HIGHER: ("higher", "△", "higher in one run"),
    EQUIVALENT: ("same", "≈", "equivalent"),
    UNCLEAR: ("unclear", "?", UNCLEAR),
    DEPENDS: ("depends", "⇅", DEPENDS),
}


@dataclass(frozen=True)
class VerdictLine:
    """One contrast as a table row; every field is text for a reader."""

    question: str
    difference: str
    interval: str
    perplexity: str
    p: str
    kind: str
    symbol: str
    words: str
    costs: list[str]
    needed: str
    pairs: str
    note: str


def verdict_lines(contrasts: Sequence[Contrast], margin: float) -> list[VerdictLine]:
    """Return a table row for each contrast, and below it one for each part it depends on."""
    return [_line(contrast, margin) for contrast in with_parts(contrasts)]


def verdict_words(contrast: Contrast, margin: float) -> str:
    """Return the verdict in a few words, without numbers but the margin."""
    first, second = show(contrast.first), show(contrast.second)
    measure = contrast.measure
    if contrast.verdict == DEPENDS:
        return f"{_what_depends(contrast)} depends on {short_name(_other(contrast))}"
    return {
        BETTER: f"{second} is better than {first}",
        WORSE: f"{second} is worse than {first}",
        LOWER: f"{second}'s loss is lower than {first}'s in this one run",
        HIGHER: f"{second}'s loss is higher than {first}'s in this one run",
        EQUIVALENT: f"equivalent within {measure.margin(margin):g} {measure.unit}",
    }.get(contrast.verdict, contrast.verdict)


def _other(contrast: Contrast) -> str:
    """Return the key on which the verdict depends."""
    (key,) = contrast.levels[0].where
    return key


def _what_depends(contrast: Contrast) -> str:
    """Say what changes: which value is better, or only the size of the step."""
    verdicts = {level.verdict for level in contrast.levels}
    is_turned = {BETTER, WORSE} <= verdicts or {LOWER, HIGHER} <= verdicts
    return "which is better" if is_turned else "what this step does"


def _line(contrast: Contrast, margin: float) -> VerdictLine:
    difference, measure = contrast.estimate.difference, contrast.measure
    low, high = contrast.estimate.interval()
    kind, symbol, _ = KINDS[contrast.verdict]
    p = contrast.p_equivalent if kind == "same" else contrast.p  # of the test behind the verdict
    seeds = "1 seed" if contrast.seeds == 1 else f"{contrast.seeds} seeds"
    pairs = "1 pair" if contrast.pairs == 1 else f"{contrast.pairs} pairs"
    return VerdictLine(
        question=contrast.question,
        difference=f"{difference:+.4f}",
        interval=f"{low:+.4f} to {high:+.4f}",
        perplexity=percent(contrast.estimate) if measure.is_per_token else "–",
        p="–" if kind == "depends" else "< 0.001" if p < 0.001 else f"{p:.3f}",
        kind=kind,
        symbol=symbol,
        words=verdict_words(contrast, margin),
        costs=_costs(contrast),
        needed=contrast.needed,
        pairs=f"{pairs}, {seeds}",
        note=contrast.note,
    )


def _costs(contrast: Contrast) -> list[str]:
    """Return the costs before and after: `25 → 50 s of training`."""
    words = []
    for cost, (before, after) in contrast.costs.items():
        kind = COSTS[cost]
        words.append(f"{kind.shown(before).removesuffix(kind.unit)} → {kind.shown(after)}")
    return words


def simple_lines(comparison: Comparison, settings: Settings) -> tuple[list[VerdictLine], int]:
    """Return rows for the contrasts in every combination of the other keys, and their number.

    There are no rows if the number exceeds `MOST_SIMPLE`.
    """
    number = _number_of_simple(comparison)
    if number > MOST_SIMPLE:
        return [], number
    contrasts = simple_effects(comparison, settings)
    return verdict_lines(contrasts, settings.margin), len(contrasts)


def _number_of_simple(comparison: Comparison) -> int:
    """Return an upper bound of the number of simple contrasts, without computing them."""
    if len(comparison.keys) < 2:
        return 0
    cells, total = len(comparison.cells()), 0
    for key in comparison.keys:
        values = len({show(trial.row.swept.get(key)) for trial in comparison.trials})
        pairs = math.comb(values, 2) if values <= MOST_VALUES else values - 1
        total += pairs * math.ceil(cells / values)
    return total
