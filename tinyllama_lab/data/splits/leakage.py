"""Rows of one part of the data that give no row of another part away."""

from __future__ import annotations

from collections.abc import Sequence

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.rows import RawRow
from tinyllama_lab.data.splits.conversations import DEEPEST, Candidate, candidates, small_talk


def leak_free_at(
    pool: Sequence[Candidate], reserve: Sequence[Candidate], depth: int, common: set[str]
) -> list[Candidate]:
    """The rows of `pool` that give no row of `reserve` away.

    The others share a mark with one, or are trained on one of its answers: every assistant turn
    of a held-out row counts, unless its exchange is `common`.
    """
    marks = {mark for each in reserve for mark in each.marks(depth, common)}
    answers = {exchange.key for each in reserve for exchange in each.exchanges} - common
    return [
        each
        for each in pool
        if marks.isdisjoint(each.marks(depth, common))
        and not any(exchange.supervised and exchange.key in answers for exchange in each.exchanges)
    ]


def leak_free(
    pool: Sequence[Candidate], reserve: Sequence[Candidate], every: Sequence[Candidate]
) -> list[Candidate]:
    """The same; where that would cost more than half of `pool`, told apart by a later turn.

    Many may begin with the same greeting.

    Args:
        every: the rows among which an exchange may be common; duplicates count.
    """
    if not reserve:
        return list(pool)
    found = [
        leak_free_at(pool, reserve, depth, small_talk(every, depth))
        for depth in range(1, DEEPEST + 2)
    ]
    return next((each for each in found if 2 * len(each) >= len(pool)), found[0])


def leak_free_rows(
    scored: Sequence[RawRow], rows: Sequence[RawRow], data: DataConfig
) -> list[RawRow]:
    """Those of `rows`, in their order, that give no row of `scored` away."""
    every = candidates([*scored, *rows], data)
    first = len(scored)
    return [each.row for each in leak_free(every[first:], every[:first], every)]
