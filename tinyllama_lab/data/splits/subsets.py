"""Which of the training candidates `data.n` takes: the same for every seed, or a draw of each."""

from __future__ import annotations

from collections.abc import Sequence

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.rows import RawRow
from tinyllama_lab.data.splits.splits import round_robin
from tinyllama_lab.study.trial import digest


def in_training_order(rows: Sequence[RawRow], data: DataConfig, seed: int) -> list[RawRow]:
    """Training candidates in the order that `data.n` takes them.

    With `data.subset=seed` the seed and a row's content decide its place, so each seed trains on
    another draw. Within a seed, the first 1,500 rows are inside the first 3,000.

    Args:
        rows: `Split.train`; no held-out row and none of the reserve is among them.
    """
    if data.subset == "nested":
        return list(rows)

    def place(row: RawRow) -> str:
        turns = [[turn.role, turn.content, turn.extra] for turn in row.messages]
        return digest([seed, row.context, row.system, row.tools, turns, row.prompt, row.response])

    drawn = sorted(rows, key=place)
    return round_robin(drawn) if data.balance_by else drawn
