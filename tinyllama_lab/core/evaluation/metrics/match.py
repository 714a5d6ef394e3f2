"""Exact match and token F1: the word overlap of a completion with its reference."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from tinyllama_lab.core.evaluation.metrics.text_metric import PerExampleScores, TextMetric


class Match(TextMetric):
    """Exact match and token F1, from 0 to 1."""

    DESCRIPTION = "exact match but for white space, and token F1 as SQuAD has it, articles kept"

    def per_example(
        self, predictions: Sequence[str], references: Sequence[str]
    ) -> PerExampleScores:
        """Return exact match and token F1 of every completion."""
        pairs = list(zip(predictions, references, strict=True))
        return {
            "exact_match": [float(is_match(*pair)) for pair in pairs],
            "token_f1": [token_f1(*pair) for pair in pairs],
        }


def is_match(completion: str, reference: str) -> bool:
    """Return whether two texts are equal up to white space."""
    return completion.split() == reference.split()


def token_f1(completion: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words, with repetitions.

    As in SQuAD (arXiv 1606.05250), case and punctuation are ignored. Unlike there, articles are
    kept, because the list of articles is specific to English. Two texts without words are equal.
    """
    ours, theirs = _words(completion), _words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def _words(text: str) -> list[str]:
    return "".join(c for c in text.lower() if not _is_punctuation(c)).split()


def _is_punctuation(character: str) -> bool:
    # SQuAD's are those of ASCII, some of which ($, +) are symbols to Unicode
    return character in string.punctuation or unicodedata.category(character)[0] == "P"


METRIC = Match
