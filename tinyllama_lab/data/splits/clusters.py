"""Finds rows that are not independent, so that an interval does not count one answer twice.

Rows of one `data.columns.group` are dependent, and so are rows whose scored tokens are much the
same: answers from one template, windows of one chat. Their losses move together, so a study with
forty such rows may know no more than one with ten.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import islice

LENGTH = 4  # tokens of an n-gram
SHARED = 0.3  # share of the shorter row's n-grams from which two rows are similar
COMMON = 0.5  # n-grams in a larger share of the rows are boilerplate and are ignored


def clusters(scored: Sequence[Sequence[Hashable]], groups: Sequence[str]) -> list[int]:
    """Return, for each row, the index of the first row of its cluster.

    Clusters are the connected components of similar rows, so chains of rows are one cluster.

    Args:
        scored: the scored tokens of each row, or what stands for them.
        groups: the group of each row by its data; empty if it has none.
    """
    parent = list(range(len(scored)))  # a disjoint-set forest

    def first(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]  # path halving
        return row

    def unite(one: int, other: int) -> None:
        low, high = sorted((first(one), first(other)))
        parent[high] = low

    first_of_group: dict[str, int] = {}
    for row, group in enumerate(groups):
        if group:
            unite(row, first_of_group.setdefault(group, row))
    for one, other in _similar_pairs([_ngrams(tokens) for tokens in scored]):
        unite(one, other)
    return [first(row) for row in range(len(scored))]


def _similar_pairs(ngrams: Sequence[set[tuple[Hashable, ...]]]) -> list[tuple[int, int]]:
    """Return the pairs of rows that share enough of their n-grams."""
    count = Counter(ngram for row_ngrams in ngrams for ngram in row_ngrams)
    most = max(2, COMMON * len(ngrams))
    rows_with: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    pairs = []
    for row, row_ngrams in enumerate(ngrams):
        rare = {ngram for ngram in row_ngrams if count[ngram] <= most}
        shared = Counter(other for ngram in rare for other in rows_with[ngram])
        pairs += [
            (row, other)
            for other, number in shared.items()
            if number >= SHARED * min(len(row_ngrams), len(ngrams[other]))
        ]
        for ngram in rare:
            rows_with[ngram].append(row)
    return pairs


def _ngrams(scored: Sequence[Hashable]) -> set[tuple[Hashable, ...]]:
    """Return the n-grams of a row; a shorter row is one n-gram as a whole."""
    windows = zip(*(islice(scored, start, None) for start in range(LENGTH)), strict=False)
    return set(windows) or {tuple(scored)}
