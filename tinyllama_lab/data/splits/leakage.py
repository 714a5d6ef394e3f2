"""Removes training rows that leak held-out rows: near duplicates, and rows with their answers."""

from __future__ import annotations

from collections.abc import Sequence

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.rows import RawRow
from tinyllama_lab.data.splits.conversations import DEEPEST, Candidate, candidates, small_talk


def leak_free_at(
    pool: Sequence[Candidate], reserve: Sequence[Candidate], depth: int, common: set[str]
) -> list[Candidate]:
    """Return the rows of `pool` that leak no row of `reserve`.

    A row leaks another one if they share a mark, or if it is trained on one of its answers. All
    assistant turns of a held-out row count, unless their exchange is `common`.

    Args:
        pool: rows to filter.
        reserve: held-out rows.
        depth: the number of answers after which openings are compared.
        common: exchanges of small talk, which leak nothing.
    """
    marks = {mark for row in reserve for mark in row.marks(depth, common)}
    answers = {exchange.key for row in reserve for exchange in row.exchanges} - common
    # an answer that a training row has only in its context is not learned, so it leaks nothing
    return [
        row
        for row in pool
        if marks.isdisjoint(row.marks(depth, common))
        and not any(exchange.supervised and exchange.key in answers for exchange in row.exchanges)
    ]


def leak_free(
    pool: Sequence[Candidate], reserve: Sequence[Candidate], every: Sequence[Candidate]
) -> list[Candidate]:
    """Return the rows of `pool` that leak no row of `reserve`; if possible, at least half of them.

    Many chats may begin with the same greeting. If their openings would cost more than half of
    `pool`, openings up to a later answer are compared.

    Args:
        pool: rows to filter.
        reserve: held-out rows.
        every: the rows that decide which exchanges are common; duplicates count.
    """
    if not reserve:
        return list(pool)
    by_depth = [
        leak_free_at(pool, reserve, depth, small_talk(every, depth))
        for depth in range(1, DEEPEST + 2)
    ]
    # if no depth keeps half, the strictest: fewer rows are better than leaked answers
    return next((rows for rows in by_depth if 2 * len(rows) >= len(pool)), by_depth[0])


def leak_free_rows(
    scored: Sequence[RawRow], rows: Sequence[RawRow], data: DataConfig
) -> list[RawRow]:
    """Return the rows, in their order, that leak no row of `scored`."""
    # together, because what is small talk depends on how frequent it is in all rows
    every = candidates([*scored, *rows], data)
    first = len(scored)
    return [row.row for row in leak_free(every[first:], every[:first], every)]
