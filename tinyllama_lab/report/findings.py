"""The recommendation and the findings of a study in sentences, and their output on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from tinyllama_lab.config.axes import show, words
from tinyllama_lab.config.command import chat_command
from tinyllama_lab.errors import shown
from tinyllama_lab.metrics import COSTS
from tinyllama_lab.report.analysis.analysis import Analysis
from tinyllama_lab.report.analysis.comparison import Comparison
from tinyllama_lab.report.analysis.contrasts import (
    BETTER,
    DEPENDS,
    HIGHER,
    LOWER,
    UNCLEAR,
    WORSE,
    Contrast,
    effects_at,
)
from tinyllama_lab.report.analysis.costs import SAME_COST
from tinyllama_lab.report.analysis.measure import Measure, between, way
from tinyllama_lab.report.analysis.ranking import MOST_IN_FULL, RankedCell, chosen_of
from tinyllama_lab.report.analysis.recommendation import CellRecommendation
from tinyllama_lab.report.analysis.statistics import Estimate
from tinyllama_lab.report.analysis.text_scores import shown_on_terminal
from tinyllama_lab.report.caveats import caveats, method_notes, not_compared
from tinyllama_lab.report.verdicts import verdict_words
from tinyllama_lab.study.study import StudyFolder

_CHOSEN_FOR = {"quant.kind": "memory"}
_INTERVAL = (
    "95 % interval: what other rows and other seeds could have shown as well; where it reaches "
    "from lower to higher, chance alone may be the reason for the difference."
)
_SHORTENED = (
    "A value that ends with ~ and six characters is shortened; the page lists it in full, and so "
    "does config.yaml of its trials."
)
_MOST_SHOWN = 12  # findings on a terminal; the page has all


def explained(recommended: CellRecommendation, measure: Measure) -> list[str]:
    """Return the details below the recommendation, and explanations of its units for newcomers."""
    chosen = chosen_of(recommended.cells)
    words = [_SHORTENED] if chosen and chosen.is_shortened else []
    words += [measure.explained, *([_INTERVAL] if len(recommended.cells) > 1 else [])]
    return [*recommended.advice.details, *words]


def findings(
    comparison: Comparison, effects: Sequence[Contrast], cells: Sequence[RankedCell], margin: float
) -> list[str]:
    """Return one sentence for each effect.

    With several swept keys, an effect is an average over the values of the others. The sentence
    then adds the effect at their recommended values.

    Args:
        comparison: the trials that are compared.
        effects: the main effects.
        cells: the settings, one of them chosen by the recommendation.
        margin: nats per token.
    """
    chosen = [cell for cell in cells if cell.is_chosen]
    count = len(effects)
    if not chosen or len(comparison.keys) < 2:
        return [finding(effect, margin, comparisons=count) for effect in effects]
    swept = chosen[0].trials[0].row.swept
    here = effects_at(comparison, swept)
    sentences = []
    for effect in effects:
        if effect.levels:  # the finding lists every value of the other key itself
            sentences.append(finding(effect, margin, comparisons=count))
            continue
        name = effect.key, show(effect.first), show(effect.second)
        others = _other_values(swept, [key for key in comparison.keys if key != effect.key])
        at_recommended = _at_recommended(here[name], others) if name in here else ""
        sentences.append(finding(effect, margin, at_recommended, count))
    return sentences


def _other_values(swept: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the recommended values of keys; of many, only that they are the recommended ones."""
    if len(keys) >= MOST_IN_FULL:
        return "the recommended values of the other settings"
    return words({key: swept[key] for key in keys})


def _at_recommended(estimate: Estimate, others: str) -> str:
    size, ends = estimate.difference, estimate.interval()
    return f"; at {others} alone {abs(size):.3f} {way(size)} ({between(*ends)})"


def finding(effect: Contrast, margin: float, here: str = "", comparisons: int = 1) -> str:
    """Return the sentence on one effect: question, verdict with its numbers, and costs.

    Args:
        effect: a contrast with its verdict.
        margin: nats per token.
        here: a clause on the effect at the recommended values of the other keys.
        comparisons: for how many verdicts this one is corrected.
    """
    rates = f", {effect.rates}" if effect.rates else ""
    text = f"{effect.question}: {_verdict(effect, margin, comparisons)}{rates}{here}"
    if costs := costs_in_words(effect):
        text += f"; {costs}"
    if effect.needed:
        text += (
            f"; to show a difference of {effect.measure.margin(margin):g} {effect.measure.unit}: "
            f"{effect.needed}"
        )
    return text + (f" ({effect.note})" if effect.note else "")


def _verdict(effect: Contrast, margin: float, comparisons: int) -> str:
    """Return the verdict with its numbers; if it depends on another key, one verdict per value."""
    measure = effect.measure
    verdict, numbers = verdict_words(effect, margin), effect.estimate
    if effect.verdict == DEPENDS:
        levels = [
            f"at {words(level.where)}, {verdict_words(level, margin)} "
            f"({measure.words(level.estimate)})"
            for level in effect.levels
        ]
        return f"{verdict}: {'; '.join(levels)}"
    if effect.verdict in (BETTER, WORSE):
        change = measure.change(numbers.difference)
        return f"{verdict}, its loss {change} ({measure.interval_words(numbers)})"
    if effect.verdict in (LOWER, HIGHER):
        size = f"by {abs(numbers.difference):.3f} {measure.unit}"
        verdict = verdict.replace(" in this one run", f" {size} in this one run")
        return f"{verdict} ({measure.interval_words(numbers)}); {numbers.luck.source}"
    low, high = numbers.interval()
    if effect.verdict == UNCLEAR and comparisons > 1 and (low > 0 or high < 0):
        # the interval, which is not corrected, leaves zero out
        verdict += f" after correction for {comparisons} comparisons"
    return f"{verdict} ({measure.words(numbers)})"


def costs_in_words(effect: Contrast) -> str:
    """Return the ratios of the costs that differ: `training time x 2.01, adapter size x 4.00`.

    The memory of a quantization is given even if it stays the same, since it is the reason to
    quantize.
    """
    words = []
    for cost, (first, second) in effect.costs.items():
        if first <= 0 or second <= 0:
            continue
        is_more = abs(math.log(second / first)) > math.log(SAME_COST)
        if is_more and cost in effect.moved or cost == _CHOSEN_FOR.get(effect.key):
            words.append(f"{COSTS[cost].label} x {second / first:.2f}")
    return ", ".join(words)


def print_findings(study: StudyFolder, analysis: Analysis, console: Console) -> None:
    """Print the recommendation, the findings and the notes below the table."""
    comparison, settings = analysis.comparison, analysis.settings
    if not comparison.trials:
        for text in not_compared(comparison):
            _print(console, f"note: {text}", "dim")
        return
    effects, recommended = analysis.effects, analysis.recommendation
    for text in recommended.advice.sentences:
        _print(console, text, "bold")
    if any(cell.is_chosen for cell in recommended.cells):
        _print(console, f"Talk to it: {chat_command(study)}", "bold")
    for text in explained(recommended, comparison.measure):
        _print(console, f"  {text}", "dim")
    sentences = findings(comparison, effects, recommended.cells, settings.margin)
    sentences += [scaling.sentence for scaling in analysis.scalings]
    for text in sentences[:_MOST_SHOWN]:
        _print(console, f"  {text}")
    if len(sentences) > _MOST_SHOWN:
        _print(console, f"  and {len(sentences) - _MOST_SHOWN} more in the report")
    for verdict in islice(shown_on_terminal(analysis.text_verdicts), _MOST_SHOWN):
        _print(console, f"  {verdict.sentence}")
    notes = caveats(comparison, effects, recommended.cells)
    for text in (*notes, *method_notes(comparison, effects, settings)):
        _print(console, f"  note: {text}", "dim")


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(Text(shown(text, 2000)), style=style, soft_wrap=True)
