"""Computes all text metrics; those whose library is not installed are left out.

The libraries take seconds to import, so they are imported only when there is something to score.
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
    completions: Sequence[str], references: Sequence[str], intents: Sequence[str] = ()
) -> dict[str, float]:
    """Return the corpus scores of at least one completion, by metric name.

    BLEU and chrF go from 0 to 100, the others from 0 to 1. Intents are scored only if every
    reference begins with its own intent: only then is a completion expected to name one.
    """
    scores: dict[str, float] = {}
    for metric in _metrics():
        values = metric.compute(predictions=list(completions), references=list(references))
        scores |= {f"eval/{name}": value for name, value in values.items()}
    if _name_intents(references, intents):
        scores["eval/intent_accuracy"] = intent_accuracy(completions, intents)
        scores["eval/intent_macro_f1"] = intent_macro_f1(completions, intents)
    return scores


def example_scores(
    completions: Sequence[str], references: Sequence[str], intents: Sequence[str] = ()
) -> list[dict[str, float]]:
    """Return each completion's scores, by metric name without `eval/`.

    Only metrics whose corpus score is the mean of these scores are included.
    """
    columns: dict[str, list[float]] = {}
    for metric in _metrics():
        columns |= metric.per_example(completions, references)
    if _name_intents(references, intents):
        pairs = zip(completions, intents, strict=True)
        columns["intent_accuracy"] = [float(read_intent(text) == intent) for text, intent in pairs]
    rows = zip(*columns.values(), strict=True)
    scores = [{k: round(v, 6) for k, v in zip(columns, row, strict=True)} for row in rows]
    return scores or [{} for _ in completions]


def _name_intents(references: Sequence[str], intents: Sequence[str]) -> bool:
    """Return whether every reference begins with its own intent."""
    pairs = zip(references, intents, strict=bool(intents))
    return bool(intents) and all(intent and read_intent(text) == intent for text, intent in pairs)


def signatures() -> dict[str, str]:
    """Return how scores are computed, with versions; call it after scoring."""
    return {name: text for metric in _metrics() for name, text in metric.signatures().items()}


def left_out() -> list[str]:
    """Return a sentence for every module whose metrics cannot be computed here."""
    return [
        f"{', '.join(_metric_names(module))} left out: {missing_library} is not installed"
        for module in _MODULES
        if isinstance(missing_library := _load(module), str)
    ]


def _metric_names(module: str) -> list[str]:
    return [metric.name for metric in METRICS.values() if metric.library_module == module]


def _metrics() -> Iterator[Any]:
    yield from (metric for module in _MODULES if not isinstance(metric := _load(module), str))


@cache
def _load(module: str) -> Any:
    """Return the metric of a module, or the name of the library that it lacks."""
    try:
        return importlib.import_module(f"tinyllama_lab.core.evaluation.metrics.{module}").METRIC()
    except ModuleNotFoundError as error:
        return str(error.name).partition(".")[0]


def read_intent(completion: str) -> str | None:
    """Return the intent on the first line of a completion, or None."""
    match = _INTENT.match(completion)
    return match.group(1) if match else None


def intent_accuracy(completions: Sequence[str], intents: Sequence[str]) -> float:
    """Return the share of completions with the right intent; a completion without one is wrong."""
    pairs = zip(completions, intents, strict=True)
    right = [read_intent(text) == intent for text, intent in pairs]
    return sum(right) / len(right)


def intent_macro_f1(completions: Sequence[str], intents: Sequence[str]) -> float:
    """Return the unweighted mean F1 of all intents in `intents`.

    An intent that only occurs in completions counts as an error, not as a class of its own.
    """
    predicted = [read_intent(completion) for completion in completions]
    right = Counter(i for i, name in zip(intents, predicted, strict=True) if i == name)
    support, predictions = Counter(intents), Counter(predicted)
    # F1 = 2 TP / (2 TP + FN + FP), and TP + FN is the support, TP + FP the predictions
    return sum(2 * right[i] / (support[i] + predictions[i]) for i in support) / len(support)
