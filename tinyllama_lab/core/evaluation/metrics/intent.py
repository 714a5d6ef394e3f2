"""Intents: does an answer begin with `Intent: <the right one>`?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_INTENT = re.compile(r"\s*Intent:[ \t]*([^\n]*\S)")


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
