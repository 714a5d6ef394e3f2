"""Whether a set has the rows that are asked for, and which numbers it can serve if it has not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tinyllama_lab.config.schema import ALL, DataConfig
from tinyllama_lab.data.formats.columns import quoted
from tinyllama_lab.data.rows import REMEDIES, RawRow
from tinyllama_lab.data.splits.splits import Split
from tinyllama_lab.errors import DataError, TooFewRowsError

_TRIED = 256  # values of eval_n below the one that was asked for, and above it
_ANOTHER_SET = "name another set with data=..."
_SHARES = (0.75, 0.5, 0.0)  # of the usable rows that are to be left for training, if possible


@dataclass(frozen=True)
class _Counts:
    """Usable rows of one split."""

    train: int
    heldout: int


def check_enough(
    split: Split, data: DataConfig, where: str, usable: Callable[[RawRow], bool] | None = None
) -> None:
    """Refuse a set that is too small; `where` names it in the message.

    The message names values of `data.n` and `data.eval_n` with which the same rows are accepted,
    or says that there are none.

    Args:
        usable: the tokenizer's verdict on a row; None where every row counts. It is asked about
            no more rows than needed as long as there are enough.

    Raises:
        TooFewRowsError: `data.n` or `data.eval_n` asks for more usable rows than there are.
        DataError: there is none.
    """
    wanted = data.train_rows or 1
    usable = usable or _every_row
    # where rows are marked as held out, fewer than eval_n may be all there are
    scored = data.eval_n if split.resplit else 1
    if _has(split.train, wanted, usable) and _has(split.heldout, scored, usable):
        return
    count = _counter(usable)
    found = count(split)
    if split.rows and not split.train and not split.heldout:
        raise DataError(_nothing_left(split, where))
    sides = (
        ("n", data.n, wanted, "training", found.train, wanted),
        ("eval_n", data.eval_n, data.eval_n, "held-out", found.heldout, scored),
    )
    problems = [
        f"data.{name}={typed} needs {_rows(asked, kind)}, and {where} has {there}"
        for name, typed, asked, kind, there, least in sides
        if there < least
    ]
    unusable = len(split.train) + len(split.heldout) - found.train - found.heldout
    facts, way_out = _facts(split, data, unusable), _ways_out(split, data, count)
    if way_out.endswith(_ANOTHER_SET):  # said once
        problems = [", and ".join(problems)]
    raise TooFewRowsError(*(f"{text}: {facts}; {way_out}, or add rows" for text in problems))


def _nothing_left(split: Split, where: str) -> str:
    """Why none of the rows can be used, and what to do about the most frequent reason."""
    left_out = split.dropped
    reason, _ = left_out.counts.most_common(1)[0]
    remedy = REMEDIES.get(reason, "correct these rows")
    return (
        f"{where} has no usable row: {left_out.sentence(split.rows).partition(': ')[0]} "
        f"({left_out.explained}); {remedy}, or {_ANOTHER_SET}"
    )


def _counter(usable: Callable[[RawRow], bool]) -> Callable[[Split], _Counts]:
    """Counts the usable rows of splits of one set, and asks about each row once."""
    verdicts: dict[int, bool] = {}

    def verdict(row: RawRow) -> bool:
        if id(row) not in verdicts:
            verdicts[id(row)] = usable(row)
        return verdicts[id(row)]

    def count(split: Split) -> _Counts:
        if usable is _every_row:
            return _Counts(len(split.train), len(split.heldout))
        return _Counts(sum(map(verdict, split.train)), sum(map(verdict, split.heldout)))

    return count


def _rows(count: int, kind: str) -> str:
    return f"{count} usable {kind} row{'s' * (count != 1)}"


def _every_row(_row: RawRow) -> bool:
    return True


def _has(rows: Sequence[RawRow], count: int, usable: Callable[[RawRow], bool]) -> bool:
    """Whether so many are usable; asks about no more than it takes to know."""
    if len(rows) < count:
        return False
    for row in rows:
        count -= usable(row)
        if count <= 0:
            return True
    return False


def _facts(split: Split, data: DataConfig, unusable: int) -> str:
    """Where the rows of the set went."""
    left_out = split.dropped.counts.total()
    held, train = split.held_back, len(split.train)
    reserve = len(split.heldout) - data.eval_n
    why = f" (data.eval_n={data.eval_n}"
    why += f" and a reserve of {reserve} in case some are unusable)" if reserve > 0 else ")"
    why = why if split.resplit and not split.test else ""
    gone = f", {left_out} left out ({split.dropped.explained})" if left_out else ""
    short = f"; {unusable} of these are unusable once they are tokens" if unusable else ""
    return (
        f"of {split.rows} rows {held} are held back for scoring{why}, {train} are left to train "
        f"on{gone}{short}"
    )


def _ways_out(split: Split, data: DataConfig, count: Callable[[Split], _Counts]) -> str:
    """What to type; without the groups of the rows as well, where more is possible then."""
    way_out = _way_out(split, data, count)
    if split.without_groups is None:
        return way_out
    alone = split.without_groups()
    found, now = count(alone), count(split)
    if found.train <= now.train and found.heldout <= now.heldout:
        return way_out
    column = (split.data or data).columns.group
    more = "" if _is_enough(found, alone, data) else _way_out(alone, data, count)
    if more and not more.startswith("type "):
        return way_out
    typed = f"data.columns.group='' {more.removeprefix('type ')}".strip()
    cause = f"rows of one {quoted(column or '')} stay on one side: to let them part, type {typed}"
    return f"{way_out}, or {cause}" if way_out.startswith("type ") else cause


def _is_enough(found: _Counts, split: Split, data: DataConfig) -> bool:
    scored = data.eval_n if split.resplit else 1
    return found.train >= (data.train_rows or 1) and found.heldout >= scored


def _way_out(split: Split, data: DataConfig, count: Callable[[Split], _Counts]) -> str:
    """Values to type that these very rows can serve: as large as possible.

    One way keeps `data.n`, where another `data.eval_n` makes that possible. The other has the
    largest `data.eval_n` that leaves three quarters of the usable rows to train on, or half, or
    any: it is the same for every `data.n`, so that the trials of a sweep can share it.
    """
    counts: dict[int, _Counts] = {}
    now = count(split)
    total = now.train + now.heldout
    wanted = data.train_rows

    def largest(least: float) -> str | None:
        for eval_n in _candidates(data.eval_n, now.heldout, total):
            if eval_n not in counts:
                counts[eval_n] = count(split.resplit(eval_n) if split.resplit else split)
            found = counts[eval_n]
            if found.heldout >= eval_n and found.train >= least:
                return _typed(data, ALL if wanted is None else min(wanted, found.train), eval_n)
        return None

    keeps_n = largest(wanted) if wanted is not None and wanted <= total else None
    shared = next(filter(None, (largest(max(1, share * total)) for share in _SHARES)), None)
    if ways := list(dict.fromkeys(way for way in (keeps_n, shared) if way)):
        return f"type {' or '.join(ways)}"
    apart = "rows that share a prompt, a group or an answer stay on one side, so "
    return (
        f"{apart if total > 1 and split.resplit else ''}no values of data.n and data.eval_n work "
        f"with these rows: {_ANOTHER_SET}"
    )


def _candidates(wanted: int, there: int, total: int) -> Iterator[int]:
    """Values of `data.eval_n`: from the one asked for down to 1, then up to all rows.

    Args:
        there: the held-out rows that there are now; it is tried as well.
    """
    yield from sorted({*_spread(1, min(wanted, total)), *{min(wanted, there)} - {0}}, reverse=True)
    yield from _spread(wanted + 1, total)


def _spread(low: int, high: int) -> list[int]:
    """All integers from `low` to `high`, or so many of them, the small ones among them."""
    if high < low:
        return []
    even = {low + (high - low) * step // _TRIED for step in range(_TRIED + 1)}
    return sorted(even | set(range(low, min(high, low + _TRIED) + 1)))


def _typed(data: DataConfig, n: int | str, eval_n: int) -> str:
    changed = [f"data.n={n}"] * (n != data.n) + [f"data.eval_n={eval_n}"] * (eval_n != data.eval_n)
    return " ".join(changed)
