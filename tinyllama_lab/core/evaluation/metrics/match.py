"""Exact match and token F1: how much of an answer is word by word what it should be."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from tinyllama_lab.core.evaluation.metrics.text_metric import Each, TextMetric


class Match(TextMetric):
    """Shares from 0 to 1: answers that are the reference, and words in common."""

    SAYS = "exact match but for white space, and token F1 as SQuAD has it, articles kept"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        every = self.each(predictions, references)
        return {name: fmean(values) for name, values in every.items()}

    def each(self, predictions: Sequence[str], references: Sequence[str]) -> Each:
        """Both of every answer."""
        pairs = list(zip(predictions, references, strict=True))
        return {
            "exact_match": [float(is_match(*pair)) for pair in pairs],
            "token_f1": [token_f1(*pair) for pair in pairs],
        }


def is_match(answer: str, reference: str) -> bool:
    """Whether the two are the same but for white space."""
    return answer.split() == reference.split()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, each counted as often as it comes.

    As in SQuAD (arXiv 1606.05250), without case and punctuation, but articles stay: they are
    a peculiarity of English. Two texts without any word are the same.
    """
    ours, theirs = _words(answer), _words(reference)
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
