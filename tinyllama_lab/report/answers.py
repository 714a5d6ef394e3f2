"""What a study came to, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from tinyllama_lab.report.comparable import ABSENT, Comparable, cell_of, comparable
from tinyllama_lab.report.contrasts import Contrast, main_effects
from tinyllama_lab.report.recommend import SAME_COST, candidates, sentence
from tinyllama_lab.report.settings import Settings
from tinyllama_lab.report.statistics import METHODS
from tinyllama_lab.report.table import Row
from tinyllama_lab.sources import shown
from tinyllama_lab.swept import show
from tinyllama_lab.trial import State

COST_NAMES = {
    "time": "training time",
    "memory": "peak memory",
    "size": "adapter size",
    "decode": "decode speed",
}
_CHOSEN_FOR = {"quant.kind": "memory"}
_MOST_SHOWN = 12  # answers on a terminal; the report has all


def answer(effect: Contrast, margin: float) -> str:
    """The question, the verdict, its numbers, and what it costs."""
    low, high = effect.estimate.interval()
    difference = effect.estimate.difference
    ratio = math.exp(min(difference, 700.0))
    text = (
        f"{effect.question}: {_verdict(effect, margin)}; held-out loss {difference:+.4f} nats a "
        f"token (95 % {low:+.4f} to {high:+.4f}), perplexity x {ratio:.3f}"
    )
    if costs := costs_in_words(effect):
        text += f"; {costs}"
    if effect.verdict == "no difference shown":
        text += f"; to show {margin:g} nats: {effect.needed}"
    return text + (f" ({effect.note})" if effect.note else "")


def _verdict(effect: Contrast, margin: float) -> str:
    first, second = show(effect.first), show(effect.second)
    if effect.verdict in ("better", "worse"):
        return f"{second} is {effect.verdict} than {first}"
    if effect.verdict == "no difference shown":
        return "no difference shown"
    return f"equivalent within {margin:g} nats"


def costs_in_words(effect: Contrast) -> str:
    """`training time x 2.01, adapter size x 4.00`; what stays the same is left out.

    But for what a setting is chosen for: that nothing is saved is an answer as well.
    """
    words = []
    for cost, (first, second) in effect.costs.items():
        if first <= 0 or second <= 0:
            continue
        is_more = abs(math.log(second / first)) > math.log(SAME_COST)
        if is_more and cost in effect.moved or cost == _CHOSEN_FOR.get(effect.key):
            words.append(f"{COST_NAMES[cost]} x {second / first:.2f}")
    return ", ".join(words)


def caveats(found: Comparable, effects: Sequence[Contrast], settings: Settings) -> list[str]:
    """What a reader must know before believing the answers."""
    notes = [*_skipped(found), *_chosen(found)]
    if effects:
        notes.append(
            f"verdicts are corrected for {len(effects)} comparisons "
            f"({METHODS[settings.correction]}), the 95 % intervals are not; "
            f"differences within {settings.margin:g} nats a token count as none"
        )
    seeds = {effect.seeds for effect in effects} or {len(cell) for cell in found.whole_cells()}
    if 1 in seeds:
        notes.append(
            "one seed: the intervals cover the choice of held-out examples, not the luck of a "
            "training run; add seed=0,1,2"
        )
    if 2 in seeds:
        notes.append("two seeds say little about how much seeds differ; three or more are better")
    return notes


def _chosen(found: Comparable) -> Iterator[str]:
    """On what the recommendation rests."""
    cells, whole = found.cells(), found.whole_cells()
    lost = {cell_of(row, found.keys) for row in found.lost} & cells.keys()
    if lost and len(lost) < len(cells):
        count = "1 setting" if len(lost) == 1 else f"{len(lost)} settings"
        yield f"{count} lost a run that failed, and cannot be recommended for the others"
    kept = [cell for name, cell in cells.items() if name not in lost] or list(cells.values())
    if len(whole) < len(kept):
        other = len(kept) - len(whole)
        yield f"not recommended, because run on other seeds: {other} of {len(kept)} settings"
    if any(len(cell) > len(whole[0]) for cell in kept):
        seeds = ", ".join(sorted(show(trial.seed) for trial in whole[0]))
        yield f"recommended on seed {seeds} alone: not every setting was run with the others"
    tried = len(whole) + len(_pruned(found))
    if tried > 1:
        yield (
            f"the best of {tried} settings was chosen by these held-out rows: on new ones "
            "expect a little less of it"
        )


def _pruned(found: Comparable) -> list[str]:
    return [text for text in found.left_out if f": {State.PRUNED}" in text]


def _skipped(found: Comparable) -> Sequence[str]:
    pruned = _pruned(found)
    absent = [text for text in found.left_out if text.endswith(ABSENT)]
    others = [text for text in found.left_out if text not in pruned and text not in absent]
    notes = [f"not compared: {len(pruned)} trials that were pruned"] if pruned else []
    if absent:
        notes.append(f"not compared: {len(absent)} trials that have no result yet")
    if others:
        some = "; ".join(others[:3])
        more = f"; and {len(others) - 3} more" if len(others) > 3 else ""
        notes.append(f"not compared: {some}{more}")
    return notes


def print_answers(rows: Sequence[Row], settings: Settings, console: Console) -> None:
    """The recommendation and the answers under the table."""
    found = comparable(rows)
    if not found.trials:
        for text in _skipped(found):
            _print(console, f"note: {text}", "dim")
        return
    cells = candidates(found, settings.cost, settings.margin, settings.correction)
    _print(console, sentence(cells, settings.cost, settings.margin), "bold")
    effects = main_effects(found, settings.margin, settings.correction)
    told = [answer(effect, settings.margin) for effect in effects]
    for text in told[:_MOST_SHOWN]:
        _print(console, f"  {text}")
    if len(told) > _MOST_SHOWN:
        _print(console, f"  and {len(told) - _MOST_SHOWN} more in the report")
    for text in caveats(found, effects, settings):
        _print(console, f"  note: {text}", "dim")


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(Text(shown(text, 2000)), style=style, soft_wrap=True)
