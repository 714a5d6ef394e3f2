"""A local data set, read and divided, or refused with all that is wrong with it."""

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
    """The rows of a local source, divided.

    Raises:
        DataError: with what is wrong with the files, and with the rows that can be read all the
            same.
    """
    problems: list[str] = []

    def readable(load: Callable[[DataConfig], Records | None]) -> Records | None:
        try:
            return load(data)
        except DamagedError as error:
            problems.extend(error.problems)
            return error.rows

    try:
        split = split_records(readable(load_rows) or [], data, readable(load_held_out))
    except DataError as error:
        raise DataError(*problems, *error.problems) from None
    if problems:
        raise DataError(*problems)
    return split
