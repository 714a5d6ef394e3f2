"""Intent accuracy: does an answer begin with `Intent: <the right one>`?"""

from __future__ import annotations

import re
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
