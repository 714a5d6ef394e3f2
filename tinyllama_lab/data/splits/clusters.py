"""Which rows belong together, so that an interval does not count one answer twice.

Rows of one `data.columns.group` do, and rows that are scored on much the same tokens: answers
from one template, windows of one chat. Their losses move together, so a study with forty such
rows may know no more than one with ten.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import islice

LENGTH = 4  # tokens that are compared as one piece
SHARED = 0.3  # of the pieces of the shorter of two rows
COMMON = 0.5  # of the rows: pieces of more of them are boilerplate, and say nothing


def clusters(scored: Sequence[Sequence[Hashable]], groups: Sequence[str]) -> list[int]:
    """For each row the number of the first row of its cluster; chains of rows are one cluster.

    Args:
        scored: what each row is scored on: tokens, or what stands for them.
        groups: what each row belongs to by its data; empty where that says nothing.
    """
    lead = list(range(len(scored)))

    def first(row: int) -> int:
        while lead[row] != row:
            lead[row] = row = lead[lead[row]]
        return row

    def unite(one: int, other: int) -> None:
        low, high = sorted((first(one), first(other)))
        lead[high] = low

    known: dict[str, int] = {}
    for row, group in enumerate(groups):
        if group:
            unite(row, known.setdefault(group, row))
    for one, other in _alike([_pieces(tokens) for tokens in scored]):
        unite(one, other)
    return [first(row) for row in range(len(scored))]


def _alike(every: Sequence[set[tuple[Hashable, ...]]]) -> list[tuple[int, int]]:
    """Pairs of rows that share much of what is scored."""
    count = Counter(piece for pieces in every for piece in pieces)
    own = [{p for p in pieces if count[p] <= max(2, COMMON * len(every))} for pieces in every]
    rows_with: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    found = []
    for row, pieces in enumerate(own):
        shared = Counter(other for piece in pieces for other in rows_with[piece])
        found += [
            (row, other)
            for other, number in shared.items()
            if number >= SHARED * min(len(every[row]), len(every[other]))
        ]
        for piece in pieces:
            rows_with[piece].append(row)
    return found


def _pieces(scored: Sequence[Hashable]) -> set[tuple[Hashable, ...]]:
    windows = zip(*(islice(scored, start, None) for start in range(LENGTH)), strict=False)
    return set(windows) or {tuple(scored)}
