"""All scores of written answers in one dictionary; what is not installed is left out.

The libraries behind them take seconds to import, so that happens when there is something to
score, long after a worker has started.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from tinyllama_lab.metrics import METRICS

# modules of this package, in the order in which their scores are computed
_MODULES = tuple(dict.fromkeys(m.library_module for m in METRICS.values() if m.library_module))
# an answer of the travel set begins with its intent
_INTENT = re.compile(r"\s*Intent:[ \t]*([^\n]*\S)")


def text_scores(
    answers: Sequence[str], references: Sequence[str], intents: Sequence[str] = ()
) -> dict[str, float]:
    """Scores by metric name, of at least one answer beside what should have been written.

    BLEU and chrF go from 0 to 100, the others from 0 to 1. Intents are scored only where every
    reference itself begins with its own: else no answer could be right or wrong.
    """
    scores: dict[str, float] = {}
    for metric in _metrics():
        found = metric.compute(predictions=list(answers), references=list(references))
        scores |= {f"eval/{name}": value for name, value in found.items()}
    if _name_intents(references, intents):
        scores["eval/intent_accuracy"] = intent_accuracy(answers, intents)
        scores["eval/intent_macro_f1"] = intent_macro_f1(answers, intents)
    return scores


def example_scores(
    answers: Sequence[str], references: Sequence[str], intents: Sequence[str] = ()
) -> list[dict[str, float]]:
    """Those of each answer whose mean is the score of all; the names without `eval/`."""
    found: dict[str, list[float]] = {}
    for metric in _metrics():
        found |= metric.each(answers, references)
    if _name_intents(references, intents):
        pairs = zip(answers, intents, strict=True)
        found["intent_accuracy"] = [float(read_intent(text) == intent) for text, intent in pairs]
    rows = zip(*found.values(), strict=True)
    scored = [{k: round(v, 6) for k, v in zip(found, row, strict=True)} for row in rows]
    return scored or [{} for _ in answers]


def _name_intents(references: Sequence[str], intents: Sequence[str]) -> bool:
    """Whether every reference begins with its own intent."""
    pairs = zip(references, intents, strict=bool(intents))
    return bool(intents) and all(intent and read_intent(text) == intent for text, intent in pairs)


def signatures() -> dict[str, str]:
    """How scores are computed, versions included; known once there are some."""
    return {name: text for metric in _metrics() for name, text in metric.signatures().items()}


def left_out() -> list[str]:
    """What cannot be computed here and why, a sentence a module."""
    return [
        f"{', '.join(_given_by(module))} left out: {found} is not installed"
        for module in _MODULES
        if isinstance(found := _load(module), str)
    ]


def _given_by(module: str) -> list[str]:
    return [metric.name for metric in METRICS.values() if metric.library_module == module]


def _metrics() -> Iterator[Any]:
    yield from (found for module in _MODULES if not isinstance(found := _load(module), str))


@cache
def _load(module: str) -> Any:
    """The metric of a module here, or the name of the library that it lacks."""
    try:
        return importlib.import_module(f"tinyllama_lab.core.evaluation.metrics.{module}").METRIC()
    except ModuleNotFoundError as error:
        return str(error.name).partition(".")[0]


def read_intent(answer: str) -> str | None:
    """The intent that an answer names on its first line, or None."""
    match = _INTENT.match(answer)
    return match.group(1) if match else None


def intent_accuracy(answers: Sequence[str], intents: Sequence[str]) -> float:
    """Share of answers that name the right intent; an answer without one is wrong."""
    right = [read_intent(a) == intent for a, intent in zip(answers, intents, strict=True)]
    return sum(right) / len(right)


def intent_macro_f1(answers: Sequence[str], intents: Sequence[str]) -> float:
    """Mean F1 of the intents that there are to find, the rare ones counting as much as others.

    An intent that only answers name is a miss of the right one, and no class of its own.
    """
    named = [read_intent(answer) for answer in answers]
    right = Counter(i for i, name in zip(intents, named, strict=True) if i == name)
    wanted, said = Counter(intents), Counter(named)
    return sum(2 * right[i] / (wanted[i] + said[i]) for i in wanted) / len(wanted)
