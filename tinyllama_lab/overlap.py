"""Checks what a split came to: whether an answer that is scored was also trained on.

It shares only the spelling of texts with the split that it checks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinyllama_lab.config import DataConfig
from tinyllama_lab.conversations import normalise
from tinyllama_lab.rows import Row, Turn

_SMALL_TALK = 5  # different turns before or after an exchange, and 0.5 % of the rows


@dataclass(frozen=True)
class _Answer:
    text: tuple[str, str]  # the question and the answer, normalised
    supervised: bool
    before: str  # the turn before the question
    after: str  # the turn after the answer


def count_overlap(
    train: Sequence[Row], heldout: Sequence[Row], everything: Sequence[Row], data: DataConfig
) -> int:
    """Training rows that learn a supervised answer of a held-out row, after the same question.

    What many different conversations say (`thanks`, `you are welcome`) does not count.

    Args:
        everything: all rows that were divided, of which `train` and `heldout` are parts.
        data: which assistant turns are supervised.
    """
    scored = {each.text for row in heldout for each in _answers(row, data) if each.supervised}
    before, after = defaultdict[object, set[str]](set), defaultdict[object, set[str]](set)
    for row in everything:
        for each in _answers(row, data):
            if each.text in scored:
                before[each.text].add(each.before)
                after[each.text].add(each.after)
    least = max(_SMALL_TALK, len(everything) / 200)
    scored -= {t for t in scored if max(len(before[t]), len(after[t])) >= least}
    return sum(
        any(each.supervised and each.text in scored for each in _answers(row, data))
        for row in train
    )


def _answers(row: Row, data: DataConfig) -> Iterator[_Answer]:
    turns = row.messages or (
        Turn("user", f"{row.prompt} {row.context}"),
        Turn("assistant", row.response),
    )
    texts = [normalise(f"{turn.content} {turn.extra}") for turn in turns]
    asked = None
    for place, turn in enumerate(turns):
        if turn.role == "user":
            asked = place
        if turn.role != "assistant" or asked is None or not texts[place]:
            continue
        yield _Answer(
            text=(texts[asked], texts[place]),
            supervised=data.mask == "all"
            or (turn.supervised and (data.learn == "all" or place == len(turns) - 1)),
            before=texts[asked - 1] if asked else "",
            after=texts[place + 1] if place + 1 < len(turns) else "",
        )
