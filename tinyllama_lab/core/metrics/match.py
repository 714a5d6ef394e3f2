"""Exact match and token F1: how much of an answer is word by word what it should be."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from statistics import fmean

from tinyllama_lab.core.metrics.text_metric import TextMetric


class Match(TextMetric):
    """Shares from 0 to 1: answers that are the reference, and words in common."""

    SAYS = "exact match but for white space, and token F1 as SQuAD has it, articles kept"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            "exact_match": fmean(is_match(answer, reference) for answer, reference in pairs),
            "token_f1": fmean(token_f1(answer, reference) for answer, reference in pairs),
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
