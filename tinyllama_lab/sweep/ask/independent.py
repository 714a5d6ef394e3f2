"""Counts the clusters of the held-out rows, and the rows that are left for confirmation.

The driver has no tokenizer, so pieces of words replace tokens. On the travel set this counts 22,
54 and 56 clusters in 32, 128 and 585 rows, where SmolLM2's tokens give 21, 47 and 45.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.rows import RawRow
from tinyllama_lab.data.splits.clusters import clusters
from tinyllama_lab.data.splits.leakage import leak_free_rows
from tinyllama_lab.data.splits.splits import Split
from tinyllama_lab.report.analysis.comparison import Scored
from tinyllama_lab.report.analysis.design import INDEPENDENT, Clusters

_PIECE = re.compile(r"\w{1,4}|[^\w\s]")  # about one token
_MOST_COUNTED = 1024  # rows; beyond them the number of clusters is extrapolated
_TRIED = 4  # rows that are examined for each confirmation row: some leak into the scored ones


def clusters_of(
    split: Split | None, data: DataConfig, most_rows: int, trials: Iterable[Scored]
) -> Clusters:
    """Return the clusters, counted in the data or else in the largest earlier trial.

    Args:
        split: the rows of the data set; None if they are not on this machine.
        data: the settings of the data set.
        most_rows: the most rows that can be held out.
        trials: earlier trials on the same data set.
    """
    if split is not None:
        rows = _with(split, min(most_rows, _MOST_COUNTED)).heldout[:_MOST_COUNTED]
        sizes = _halved(len(rows))
        # counts at several sizes show how the number of clusters grows with the rows
        counts = [len(set(_row_clusters(rows[:size], data))) for size in sizes]
        return Clusters(sizes, tuple(counts), "counted in the data") if sizes else INDEPENDENT
    largest = max(trials, key=lambda trial: len(trial.losses), default=None)
    if largest is None or largest.clusters is None:
        return INDEPENDENT
    sizes = _halved(len(largest.clusters))
    counts = [len(np.unique(largest.clusters[:size])) for size in sizes]
    return Clusters(sizes, tuple(counts), "as in earlier trials")


def confirmation_rows(split: Split, data: DataConfig, eval_n: int) -> int:
    """Return about how many confirmation rows are left, as the `data` command counts them.

    They are the rows marked as test, else the held-out rows that are not scored, without those
    that belong to the same group or cluster as a scored row.
    """
    split = _with(split, eval_n)
    scored = split.heldout[:eval_n]
    unseen = (split.test or split.heldout[eval_n:])[: _TRIED * eval_n]
    rows = leak_free_rows(scored, unseen, replace(data, eval_n=eval_n))
    together = _row_clusters([*scored, *rows], data)[len(scored) :]
    # a cluster is numbered by its first row, so a small number means a scored row
    return min(eval_n, sum(first >= len(scored) for first in together))


def _with(split: Split, eval_n: int) -> Split:
    """Return the split with `eval_n` held-out rows, unless the data marks them."""
    return split.resplit(eval_n) if split.resplit else split


def _halved(rows: int) -> tuple[int, ...]:
    """Return `rows`, half of `rows` and so on down to two, in rising order."""
    return tuple(sorted(rows >> times for times in range(rows.bit_length() - 1)))


def _row_clusters(rows: Sequence[RawRow], data: DataConfig) -> list[int]:
    scored = [_PIECE.findall(_scored_text(row, data)) for row in rows]
    return clusters(scored, [row.group for row in rows])


def _scored_text(row: RawRow, data: DataConfig) -> str:
    """Return about the text of a row whose tokens are scored: its answers, or all of it."""
    is_all = data.mask == "all"
    if row.messages and (is_all or data.learn == "all"):
        turns = [t for t in row.messages if is_all or (t.role == "assistant" and t.supervised)]
        return "\n".join(turn.content for turn in turns)
    parts = (row.prompt, row.context) if is_all and row.prompt != row.response else ()
    return "\n".join((*parts, row.response))
