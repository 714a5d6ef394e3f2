"""Checks what a split came to: whether an answer that is scored was also trained on.

It shares only the reading and the spelling of texts with the split that it checks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.rows import RawRow, Turn
from tinyllama_lab.data.splits.conversations import normalise
from tinyllama_lab.data.splits.transcripts import is_text, transcript_of

_SMALL_TALK = 5  # different turns before or after an exchange, and 0.5 % of the rows
_MANY, _EVERYWHERE = 10, 0.25  # rows, and share of all: what these have is no one's alone
_WORDS = 8  # of a line that is known again
_LETTERS = 32  # by which one ready-made text continues another; a splitter may cut words


@dataclass(frozen=True)
class _Answer:
    text: tuple[str, str]  # the question and the answer, normalised
    supervised: bool
    before: str  # the turn before the question
    after: str  # the turn after the answer


def count_overlap(
    train: Sequence[RawRow],
    heldout: Sequence[RawRow],
    everything: Sequence[RawRow],
    data: DataConfig,
) -> int:
    """Training rows that learn a supervised answer of a held-out row, after the same question.

    What many different conversations say (`thanks`, `you are welcome`) does not count. Of
    ready-made texts, those count as well that continue a held-out one or are continued by it.

    Args:
        everything: all rows that were divided, of which `train` and `heldout` are parts.
        data: which assistant turns are supervised.
    """
    scored = {each.text for row in heldout for each in _answers(row, data) if each.supervised}
    before, after = defaultdict[object, set[str]](set), defaultdict[object, set[str]](set)
    rows = Counter[object]()
    for row in everything:
        for each in _answers(row, data):
            if each.text in scored:
                before[each.text].add(each.before)
                after[each.text].add(each.after)
                rows[each.text] += 1
    least = max(_SMALL_TALK, len(everything) / 200)
    most = max(_MANY, _EVERYWHERE * len(everything))
    scored -= {t for t in scored if max(len(before[t]), len(after[t])) >= least}
    scored -= {t for t in scored if rows[t] >= most}
    texts = [_letters(row) for row in train]
    runs = _runs(heldout, {run for text in texts for run in (text[:_LETTERS], text[-_LETTERS:])})
    return sum(
        any(each.supervised and each.text in scored for each in _answers(row, data))
        or _continues(letters, runs)
        for row, letters in zip(train, texts, strict=True)
    )


def _answers(row: RawRow, data: DataConfig) -> Iterator[_Answer]:
    written = _written(row) if not row.messages else []
    if written:
        is_learned = data.mask == "all" or is_text(row)
        texts = [tuple(map(normalise, pair)) for pair in written]
        for place, (asked, answered) in enumerate(texts):
            yield _Answer(
                text=(asked, answered),
                supervised=is_learned or place == len(texts) - 1,
                before=texts[place - 1][1] if place else "",
                after=texts[place + 1][0] if place + 1 < len(texts) else "",
            )
    else:
        yield from _spoken(row, data)


def _written(row: RawRow) -> list[tuple[str, str]]:
    """Questions and answers of a chat that is written out in one text, or in a prompt."""
    said, rest, marked = transcript_of(row)
    if not is_text(row):
        return [*said, (rest, row.response)] if said else []
    lines = [] if marked else row.response.split("\n")  # one is known again, as an answer is
    return [*said, *(("", line) for line in lines if len(line.split()) >= _WORDS)]


def _letters(row: RawRow) -> str:
    return "".join(normalise(row.response).split()) if is_text(row) else ""


Runs = dict[str, list[tuple[str, int]]]


def _runs(rows: Sequence[RawRow], wanted: set[str]) -> Runs:
    """By some letters that follow each other, of those `wanted`: what has them, and where."""
    runs = defaultdict[str, list[tuple[str, int]]](list)
    for letters in map(_letters, rows):
        for place in range(len(letters) - _LETTERS + 1):
            if (run := letters[place : place + _LETTERS]) in wanted:
                runs[run].append((letters, place))
    most = max(_MANY, _EVERYWHERE * len(rows))
    return {run: places for run, places in runs.items() if len(places) < most}


def _continues(letters: str, runs: Runs) -> bool:
    """Whether a text begins with the end of one of those in `runs`, or ends with its beginning."""
    begins = any(
        place and letters.startswith(other[place:])
        for other, place in runs.get(letters[:_LETTERS], ())
    )
    return begins or any(
        letters.endswith(other[: place + _LETTERS])
        for other, place in runs.get(letters[-_LETTERS:], ())
        if place + _LETTERS < len(other)
    )


def _spoken(row: RawRow, data: DataConfig) -> Iterator[_Answer]:
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
