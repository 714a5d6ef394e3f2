"""Reads and splits a local data set, or refuses it with all its problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.splits.splits import Split, split_records
from tinyllama_lab.errors import DamagedError, DataError

Records = Sequence[Mapping[str, Any]]


def load_split(
    data: DataConfig,
    load_rows: Callable[[DataConfig], Records],
    load_held_out: Callable[[DataConfig], Records | None],
) -> Split:
    """Read and split the rows of a local source.

    Damaged lines do not stop it early: problems of the remaining rows are reported as well.

    Args:
        data: the data set.
        load_rows: reads the records of the source.
        load_held_out: reads the records of `data.eval_path`; returns None if it is not set.

    Raises:
        DataError: with all problems of the files and of the readable rows.
    """
    problems: list[str] = []

    def readable(load: Callable[[DataConfig], Records | None]) -> Records | None:
        try:
            return load(data)
        except DamagedError as error:  # go on with the other rows, and raise at the end
            problems.extend(error.problems)
            return error.rows

    try:
        split = split_records(readable(load_rows) or [], data, readable(load_held_out))
    except DataError as error:
        raise DataError(*problems, *error.problems) from None
    if problems:
        raise DataError(*problems)
    return split
