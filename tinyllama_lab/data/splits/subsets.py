"""Selects the training rows for `data.n`: the same for every seed, or another draw for each.

The rule is part of the split and not of the worker that applies it: it is what `data.n` means.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.rows import RawRow
from tinyllama_lab.data.splits.splits import round_robin
from tinyllama_lab.study.trial import digest


def in_training_order(rows: Sequence[RawRow], data: DataConfig, seed: int) -> list[RawRow]:
    """Return the training rows in the order in which `data.n` takes them.

    With `data.subset=seed` a row's position depends on the seed and its content, so each seed
    trains on another draw. For one seed, the first 1,500 rows are inside the first 3,000.

    Args:
        rows: `Split.train`, which contains no row of the held-out reserve.
        data: `subset` and `balance_by` are used.
        seed: the seed of the trial.
    """
    if data.subset == "nested":
        return list(rows)

    def position(row: RawRow) -> str:
        turns = [[turn.role, turn.content, turn.extra] for turn in row.messages]
        return digest([seed, row.context, row.system, row.tools, turns, row.prompt, row.response])

    drawn = sorted(rows, key=position)  # hashes are uniform: a random draw without a generator
    return round_robin(drawn) if data.balance_by else drawn
