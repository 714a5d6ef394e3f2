"""Maps the name of a row's split, from a column or a file, to training, held-out or test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.formats.cells import HELDOUT, TEST, TRAIN, is_test, split_word
from tinyllama_lab.data.rows import RawRow
from tinyllama_lab.errors import DataError, shown

_MAX_NAMES_SHOWN = 5


def parts_of(rows: Sequence[RawRow], data: DataConfig) -> dict[str, str]:
    """Return the part of the data that each split name stands for; empty if no row has a split.

    Raises:
        DataError: a name is unknown, or none stands for training rows.
    """
    names = Counter(row.split for row in rows if row.split.strip())
    parts = {name: TEST if is_test(name) else split_word(name) for name in names}
    first = {row.split: row.number for row in reversed(rows)}  # reversed: the first row wins
    unknown = [
        f"'{shown(name)}'{_where(count, first[name])}"
        for name, count in names.most_common()
        if parts[name] is None
    ]
    if unknown:
        listed = ", ".join(unknown[:_MAX_NAMES_SHOWN])
        more = len(unknown) - _MAX_NAMES_SHOWN
        raise DataError(
            f"{column_of(data)} must hold names of splits such as train, validation and test, got "
            f"{listed}{f' and {more} more' if more > 0 else ''}; rename these, or set "
            f"data.columns.split='' {_without_split(names, parts)}"
        )
    part_of = {name: part for name, part in parts.items() if part}
    if part_of and TRAIN not in part_of.values():
        got = ", ".join(f"{count} {shown(name)}" for name, count in names.most_common())
        raise DataError(
            f"{column_of(data)} must mark rows to train on, such as train, got {got}; add rows "
            f"to train on, or set data.columns.split='' {_without_split(names, parts)}"
        )
    return part_of


def _without_split(names: Iterable[str], parts: Mapping[str, str | None]) -> str:
    """Return what ignoring the splits would do with the rows that are marked as held out."""
    marked = [shown(name) for name in names if parts[name] in (HELDOUT, TEST)]
    also = f", which trains on the rows marked {' and '.join(marked)} as well" if marked else ""
    return f"to divide all rows by their content{also}"


def _where(count: int, first: int) -> str:
    """Return the number of rows with a name and the first of them, for a message."""
    if not first:
        return f" ({count} rows)" if count > 1 else ""
    return f" ({count} rows, first: row {first})" if count > 1 else f" (row {first})"


def column_of(data: DataConfig) -> str:
    """Return the setting of the split column, for a message."""
    return f"data.columns.split={data.columns.split}" if data.columns.split else "the split"


def confirmation_setting(data: DataConfig) -> str:
    """Return the setting whose held-out set is called test, or an empty string.

    Rows of a set that is called test are for confirmation, not for choosing between trials.
    """
    if data.eval_path and is_test(PurePath(data.eval_path).name):
        return f"data.eval_path={data.eval_path}"
    if not data.eval_path and data.eval_split and is_test(data.eval_split):
        return f"data.eval_split={data.eval_split}"
    return ""
