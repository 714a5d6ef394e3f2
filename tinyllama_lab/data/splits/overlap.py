"""Checks a finished split: counts training rows that contain a scored answer.

It is independent of the code that splits, except for reading and normalising texts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.rows import RawRow, Turn
from tinyllama_lab.data.splits.conversations import normalise
from tinyllama_lab.data.splits.transcripts import is_text, transcript_of

_SMALL_TALK = (
    5  # distinct neighbours, at least 0.5 % of the rows, that make an exchange small talk
)
_MANY, _EVERYWHERE = 10, 0.25  # number and share of rows from which a text is boilerplate
_WORDS = 8  # a line of this length identifies a text
_LETTERS = 32  # overlap of two consecutive texts, in letters because splitters may cut words


@dataclass(frozen=True)
class _Answer:
    """An assistant turn with its question and neighbours, as normalised text."""

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
    """Count the training rows that learn a supervised answer of a held-out row.

    An answer counts only after the same question. Small talk (`thanks`, `you are welcome`) does
    not count. Ready-made texts also count if they continue a held-out text or are continued by it.

    Args:
        train: training rows.
        heldout: held-out rows.
        everything: all rows that were split, which decide what is small talk.
        data: its masks decide which assistant turns are supervised.
    """
    scored = {
        answer.text for row in heldout for answer in _answers(row, data) if answer.supervised
    }
    before, after = defaultdict[object, set[str]](set), defaultdict[object, set[str]](set)
    rows = Counter[object]()
    for row in everything:
        for answer in _answers(row, data):
            if answer.text in scored:
                before[answer.text].add(answer.before)
                after[answer.text].add(answer.after)
                rows[answer.text] += 1
    least = max(_SMALL_TALK, len(everything) / 200)
    most = max(_MANY, _EVERYWHERE * len(everything))
    scored -= {t for t in scored if max(len(before[t]), len(after[t])) >= least}
    scored -= {t for t in scored if rows[t] >= most}
    texts = [_letters(row) for row in train]
    runs = _runs(heldout, {run for text in texts for run in (text[:_LETTERS], text[-_LETTERS:])})
    return sum(
        any(answer.supervised and answer.text in scored for answer in _answers(row, data))
        or _continues(letters, runs)
        for row, letters in zip(train, texts, strict=True)
    )


def _answers(row: RawRow, data: DataConfig) -> Iterator[_Answer]:
    """Yield the answers of a row that is a chat, a transcript or a prompt with a response."""
    pairs = _transcript_pairs(row) if not row.messages else []
    if pairs:
        is_all_supervised = data.mask == "all" or is_text(row)
        texts = [tuple(map(normalise, pair)) for pair in pairs]
        for index, (question, answer) in enumerate(texts):
            yield _Answer(
                text=(question, answer),
                supervised=is_all_supervised or index == len(texts) - 1,
                before=texts[index - 1][1] if index else "",
                after=texts[index + 1][0] if index + 1 < len(texts) else "",
            )
    else:
        yield from _chat_answers(row, data)


def _transcript_pairs(row: RawRow) -> list[tuple[str, str]]:
    """Return questions and answers of a transcript in one text, or in a prompt."""
    exchanges, unanswered, marked = transcript_of(row)
    if not is_text(row):
        return [*exchanges, (unanswered, row.response)] if exchanges else []
    lines = [] if marked else row.response.split("\n")  # plain text: a long line counts as answer
    return [*exchanges, *(("", line) for line in lines if len(line.split()) >= _WORDS)]


def _letters(row: RawRow) -> str:
    """Return a ready-made text without white space; empty for other rows."""
    return "".join(normalise(row.response).split()) if is_text(row) else ""


Runs = dict[str, list[tuple[str, int]]]  # letters -> texts that contain them, and their offsets


def _runs(rows: Sequence[RawRow], wanted: set[str]) -> Runs:
    """Return where the `wanted` runs of letters occur in the texts of some rows.

    Runs that occur everywhere are boilerplate and are left out.
    """
    runs = defaultdict[str, list[tuple[str, int]]](list)
    for letters in map(_letters, rows):
        for offset in range(len(letters) - _LETTERS + 1):
            if (run := letters[offset : offset + _LETTERS]) in wanted:
                runs[run].append((letters, offset))
    most = max(_MANY, _EVERYWHERE * len(rows))
    return {run: matches for run, matches in runs.items() if len(matches) < most}


def _continues(letters: str, runs: Runs) -> bool:
    """Return whether a text begins with the end of a text in `runs`, or ends with its start."""
    begins = any(
        offset and letters.startswith(other[offset:])
        for other, offset in runs.get(letters[:_LETTERS], ())
    )
    return begins or any(
        letters.endswith(other[: offset + _LETTERS])
        for other, offset in runs.get(letters[-_LETTERS:], ())
        if offset + _LETTERS < len(other)
    )


def _chat_answers(row: RawRow, data: DataConfig) -> Iterator[_Answer]:
    """Yield the answers of a list of turns, which a prompt and a response are as well."""
    turns = row.messages or (
        Turn("user", f"{row.prompt} {row.context}"),
        Turn("assistant", row.response),
    )
    texts = [normalise(f"{turn.content} {turn.extra}") for turn in turns]
    question = None  # index of the last user turn
    for index, turn in enumerate(turns):
        if turn.role == "user":
            question = index
        if turn.role != "assistant" or question is None or not texts[index]:
            continue
        yield _Answer(
            text=(texts[question], texts[index]),
            supervised=data.mask == "all"
            or (turn.supervised and (data.learn == "all" or index == len(turns) - 1)),
            before=texts[question - 1] if question else "",
            after=texts[index + 1] if index + 1 < len(turns) else "",
        )
