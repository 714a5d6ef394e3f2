"""Checks that a data set has the requested rows, and proposes numbers that it can serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tinyllama_lab.config.schema import ALL, DataConfig
from tinyllama_lab.data.formats.columns import quoted
from tinyllama_lab.data.rows import REMEDIES, RawRow
from tinyllama_lab.data.splits.splits import Split
from tinyllama_lab.errors import DataError, TooFewRowsError

_TRIED = 256  # values of eval_n that are tried below the requested one, and above it
_ANOTHER_SET = "name another set with data=..."
_SHARES = (0.75, 0.5, 0.0)  # shares of usable rows for training, in the order they are tried


@dataclass(frozen=True)
class _Counts:
    """The number of usable rows of a split."""

    train: int
    heldout: int


def check_enough(
    split: Split, data: DataConfig, where: str, usable: Callable[[RawRow], bool] | None = None
) -> None:
    """Refuse a data set that is too small.

    The message proposes values of `data.n` and `data.eval_n` with which the same rows are
    accepted, or says that there are none.

    Args:
        split: the rows.
        data: the requested numbers.
        where: the name of the data set in the message.
        usable: whether the tokenizer can use a row; None if every row counts. If there are
            enough rows, it is called for as few rows as possible.

    Raises:
        TooFewRowsError: `data.n` or `data.eval_n` requests more usable rows than there are.
        DataError: no row is left.
    """
    wanted = data.train_rows or 1
    usable = usable or _every_row
    # marked held-out rows may be fewer than eval_n: then all of them are scored
    scored = data.eval_n if split.resplit else 1
    if _has(split.train, wanted, usable) and _has(split.heldout, scored, usable):
        return
    if split.rows and not split.train and not split.heldout:
        raise DataError(_nothing_left(split, where))
    count = _counter(usable)
    counts = count(split)
    problems = list(_shortfalls(counts, _Counts(wanted, scored), data, where))
    unusable = len(split.train) + len(split.heldout) - counts.train - counts.heldout
    facts, remedy = _facts(split, data, unusable), _remedy(split, data, count)
    if remedy.endswith(_ANOTHER_SET):  # one remedy for both problems
        problems = [", and ".join(problems)]
    raise TooFewRowsError(*(f"{text}: {facts}; {remedy}, or add rows" for text in problems))


def _shortfalls(counts: _Counts, least: _Counts, data: DataConfig, where: str) -> Iterator[str]:
    """Yield which of `data.n` and `data.eval_n` need more usable rows than there are."""
    if counts.train < least.train:
        needed = _rows(least.train, "training")
        yield f"data.n={data.n} needs {needed}, and {where} has {counts.train}"
    if counts.heldout < least.heldout:
        needed = _rows(data.eval_n, "held-out")
        yield f"data.eval_n={data.eval_n} needs {needed}, and {where} has {counts.heldout}"


def _nothing_left(split: Split, where: str) -> str:
    """Return why no row can be used, and the remedy for the most frequent reason."""
    left_out = split.dropped
    reason, _ = left_out.counts.most_common(1)[0]
    remedy = REMEDIES.get(reason, "correct these rows")
    return (
        f"{where} has no usable row: {left_out.sentence(split.rows).partition(': ')[0]} "
        f"({left_out.explained}); {remedy}, or {_ANOTHER_SET}"
    )


def _counter(usable: Callable[[RawRow], bool]) -> Callable[[Split], _Counts]:
    """Return a function that counts the usable rows of splits of one set, asking once per row."""
    verdicts: dict[int, bool] = {}  # by the row's id: all splits share the row objects

    def verdict(row: RawRow) -> bool:
        if id(row) not in verdicts:
            verdicts[id(row)] = usable(row)
        return verdicts[id(row)]

    def count(split: Split) -> _Counts:
        if usable is _every_row:  # the driver has no tokenizer, and sets may have millions of rows
            return _Counts(len(split.train), len(split.heldout))
        return _Counts(sum(map(verdict, split.train)), sum(map(verdict, split.heldout)))

    return count


def _rows(count: int, kind: str) -> str:
    return f"{count} usable {kind} row{'s' * (count != 1)}"


def _every_row(_row: RawRow) -> bool:
    return True


def _has(rows: Sequence[RawRow], count: int, usable: Callable[[RawRow], bool]) -> bool:
    """Return whether `count` rows are usable; asks about no more rows than necessary."""
    if len(rows) < count:
        return False
    for row in rows:
        count -= usable(row)
        if count <= 0:
            return True
    return False


def _facts(split: Split, data: DataConfig, unusable: int) -> str:
    """Return what became of the rows of the set, for the message."""
    left_out = split.dropped.counts.total()
    held, train = split.held_back, len(split.train)
    reserve = len(split.heldout) - data.eval_n
    # the size of a reserve is explained only if the split chose it
    why = f" (data.eval_n={data.eval_n}"
    why += f" and a reserve of {reserve} in case some are unusable)" if reserve > 0 else ")"
    why = why if split.resplit and not split.test else ""
    gone = f", {left_out} left out ({split.dropped.explained})" if left_out else ""
    short = f"; {unusable} of these are unusable once they are tokens" if unusable else ""
    return (
        f"of {split.rows} rows {held} are held back for scoring{why}, {train} are left to train "
        f"on{gone}{short}"
    )


def _remedy(split: Split, data: DataConfig, count: Callable[[Split], _Counts]) -> str:
    """Return what to type, also without groups if that makes more rows available."""
    remedy = _numbers(split, data, count)
    if split.without_groups is None:
        return remedy
    ungrouped = split.without_groups()
    available, now = count(ungrouped), count(split)
    if available.train <= now.train and available.heldout <= now.heldout:
        return remedy
    column = (split.data or data).columns.group
    more = "" if _is_enough(available, ungrouped, data) else _numbers(ungrouped, data, count)
    if more and not more.startswith("type "):
        return remedy
    typed = f"data.columns.group='' {more.removeprefix('type ')}".strip()
    cause = f"rows of one {quoted(column or '')} stay on one side: to let them part, type {typed}"
    return f"{remedy}, or {cause}" if remedy.startswith("type ") else cause


def _is_enough(counts: _Counts, split: Split, data: DataConfig) -> bool:
    scored = data.eval_n if split.resplit else 1
    return counts.train >= (data.train_rows or 1) and counts.heldout >= scored


def _numbers(split: Split, data: DataConfig, count: Callable[[Split], _Counts]) -> str:
    """Return values to type that these rows can serve, as large as possible.

    One proposal keeps `data.n` if another `data.eval_n` makes that possible. The other has the
    largest `data.eval_n` that leaves three quarters of the usable rows for training, or half, or
    any: it does not depend on `data.n`, so that the trials of a sweep can share it.
    """
    counts: dict[int, _Counts] = {}
    now = count(split)
    total = now.train + now.heldout
    wanted = data.train_rows

    def largest(least: float) -> str | None:
        for eval_n in _candidates(data.eval_n, now.heldout, total):
            if eval_n not in counts:
                counts[eval_n] = count(split.resplit(eval_n) if split.resplit else split)
            usable = counts[eval_n]
            if usable.heldout >= eval_n and usable.train >= least:
                return _typed(data, ALL if wanted is None else min(wanted, usable.train), eval_n)
        return None

    keeps_n = largest(wanted) if wanted is not None and wanted <= total else None
    shared = next(filter(None, (largest(max(1, share * total)) for share in _SHARES)), None)
    if ways := list(dict.fromkeys(way for way in (keeps_n, shared) if way)):
        return f"type {' or '.join(ways)}"
    cause = "rows that share a prompt, a group or an answer stay on one side, so "
    return (
        f"{cause if total > 1 and split.resplit else ''}no values of data.n and data.eval_n work "
        f"with these rows: {_ANOTHER_SET}"
    )


def _candidates(wanted: int, available: int, total: int) -> Iterator[int]:
    """Yield values of `data.eval_n`: from the requested one down to 1, then up to all rows.

    Args:
        wanted: the requested value.
        available: the number of held-out rows now, which is tried as well.
        total: the number of usable rows.
    """
    lower = {*_spread(1, min(wanted, total)), min(wanted, available)} - {0}
    yield from sorted(lower, reverse=True)
    yield from _spread(wanted + 1, total)


def _spread(low: int, high: int) -> list[int]:
    """Return all integers from `low` to `high`; of a long range a sample with all small ones."""
    if high < low:
        return []
    even = {low + (high - low) * step // _TRIED for step in range(_TRIED + 1)}
    return sorted(even | set(range(low, min(high, low + _TRIED) + 1)))


def _typed(data: DataConfig, n: int | str, eval_n: int) -> str:
    """Return the changed settings as a user types them."""
    changed = [f"data.n={n}"] * (n != data.n) + [f"data.eval_n={eval_n}"] * (eval_n != data.eval_n)
    return " ".join(changed)
