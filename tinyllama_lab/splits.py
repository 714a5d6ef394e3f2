"""Which rows are trained on and which are held out: one order by content, cut from both ends.

Rows that would give each other away form a group: those of one `data.columns.group`, those that
begin alike, those that share an answer and its question (`conversations.py`). A group's place
depends on its text alone. Walking the groups in that order, each is held out that still fits the
reserve; all others are trained on, the last ones first. So the first 1,500 training rows are
inside the first 3,000, the held-out rows do not depend on `data.n`, and the order of the source
file does not matter. A group that is too large for the reserve is trained on and loses no row.

Rows are skipped later, when the tokenizer shows that they are too long. For that there is the
reserve: `eval_n` rows and a few more, which training never touches, whether they turn out to be
used or not. No skipped candidate can therefore be both held out and trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from tinyllama_lab.cells import HELDOUT, TRAIN, split_word
from tinyllama_lab.columns import column_names, listed
from tinyllama_lab.config import DataConfig
from tinyllama_lab.conversations import (
    DEEPEST,
    Candidate,
    candidates,
    groups,
    normalise,
    small_talk,
)
from tinyllama_lab.errors import DataError, shown
from tinyllama_lab.formats import recognise
from tinyllama_lab.rows import LeftOut, Row, mapped_rows

__all__ = ["Split", "normalise", "round_robin", "split_records", "split_rows"]

_WORDS_SHOWN = 5


@dataclass(frozen=True)
class Split:
    """Candidates in the order they are taken: the first `n`, or `eval_n`, usable ones count."""

    train: list[Row]
    heldout: list[Row]
    dropped: LeftOut
    notes: tuple[str, ...] = ()  # what a user would not expect
    again: Callable[[int], Split] | None = field(default=None, compare=False)  # other `eval_n`
    ungrouped: Callable[[], Split] | None = field(default=None, compare=False)  # had it no groups
    data: DataConfig | None = field(default=None, compare=False)  # with what the columns hold

    @property
    def rows(self) -> int:
        """All rows, those that are left out included."""
        return len(self.train) + len(self.heldout) + self.dropped.counts.total()


def split_records(
    records: Sequence[Mapping[str, Any]],
    data: DataConfig,
    held_out: Sequence[Mapping[str, Any]] | None = None,
) -> Split:
    """The rows of some records, divided.

    Args:
        held_out: the records of `data.eval_path` or `data.eval_split`; None where neither is set.

    Raises:
        DataError: a column is not there, or a split has a name that says nothing.
    """
    data, recognised = recognise(records, data)
    rows, left_out = mapped_rows(records, data)
    if held_out is None:
        found = split_rows(rows, data, left_out)
    else:
        try:
            held_out_rows, more = mapped_rows(held_out, data)
        except DataError:
            setting = "eval_path" if data.eval_path else "eval_split"
            wanted = [name for name in vars(data.columns).values() if name]
            raise DataError(
                f"data.{setting}={getattr(data, setting)} must have the columns that the training "
                f"rows have, got {listed(column_names(held_out))}; write it as those are written, "
                f"with the columns {listed(wanted)}"
            ) from None
        found = _marked(rows, held_out_rows, data, left_out | more)
    used = {row.number for row in (*found.train, *(found.heldout if held_out is None else ()))}
    notes = [recognised, _shortened(left_out, used), _unscored(found, data), *found.notes]
    return replace(found, data=data, notes=tuple(filter(None, notes)))


def _unscored(split: Split, data: DataConfig) -> str:
    """What is said where other rows are marked as held out than `data.eval_n` asks for."""
    marked = len(split.heldout)
    if split.again:
        return ""  # the others are a reserve
    if marked < data.eval_n:
        return f"data: all {marked} held-out rows are scored, fewer than data.eval_n={data.eval_n}"
    if marked == data.eval_n or data.source != "file":
        return ""  # of a known set, its own file says how many
    return (
        f"data: {data.eval_n} of {marked} held-out rows are scored; to score all, set "
        f"data.eval_n={marked}"
    )


def _shortened(left_out: LeftOut, used: Collection[int]) -> str:
    """What is said of chats that do not end with an answer, among the records that are used."""
    cut = [number for number in left_out.shortened if number in used]
    if not cut:
        return ""
    return (
        f"data: {len(cut)} of {len(used)} chats are used up to their last answer (first: row "
        f"{cut[0]})"
    )


def split_rows(
    rows: Sequence[Row], data: DataConfig, dropped: LeftOut | Mapping[str, int] | None = None
) -> Split:
    """Order the rows and divide them into training and held-out candidates.

    Where rows say to which split they belong, only those that say so are held out or trained on.
    Else the reserve is held out: `eval_n` rows and as many again (8 at least), but no more than
    a tenth of the set on top of `eval_n`.

    Args:
        dropped: what `to_rows` dropped; it is counted in.

    Raises:
        DataError: a row's split has a name that says nothing, or no row is to train on.
    """
    left_out = LeftOut.of(dropped)
    sides = _sides(rows, data)
    if not sides:
        return _unmarked(rows, data, left_out, ())
    for row in rows:
        if not row.split.strip():
            left_out.add("no_split", row.number)
    marked = {side: [r for r in rows if sides.get(r.split) == side] for side in (TRAIN, HELDOUT)}
    if marked[HELDOUT]:
        return _marked(marked[TRAIN], marked[HELDOUT], data, left_out)
    note = f"{_column(data)} marks no row as held out: held-out rows are taken from the others"
    return _unmarked(marked[TRAIN], data, left_out, (note,))


def _sides(rows: Sequence[Row], data: DataConfig) -> dict[str, str]:
    """The side that each split's name stands for; empty where no row has one."""
    names = Counter(row.split for row in rows if row.split.strip())
    sides = {name: split_word(name) for name in names}
    first = {row.split: row.number for row in reversed(rows)}
    unknown = [
        f"'{shown(name)}'{_where(count, first[name])}"
        for name, count in names.most_common()
        if sides[name] is None
    ]
    if unknown:
        listed = ", ".join(unknown[:_WORDS_SHOWN])
        more = len(unknown) - _WORDS_SHOWN
        raise DataError(
            f"{_column(data)} must hold names of splits such as train, validation and test, got "
            f"{listed}{f' and {more} more' if more > 0 else ''}; rename these, or set "
            "data.columns.split='' to hold rows out by their content"
        )
    known = {name: side for name, side in sides.items() if side}
    if known and TRAIN not in known.values():
        got = ", ".join(f"{count} {shown(name)}" for name, count in names.most_common())
        raise DataError(
            f"{_column(data)} must mark rows to train on, such as train, got {got}; set "
            "data.columns.split='' to hold rows out by their content, or add a file to train on"
        )
    return known


def _where(count: int, first: int) -> str:
    if not first:
        return f" ({count} rows)" if count > 1 else ""
    return f" ({count} rows, first: row {first})" if count > 1 else f" (row {first})"


def _column(data: DataConfig) -> str:
    return f"data.columns.split={data.columns.split}" if data.columns.split else "the split"


def _marked(
    train: Sequence[Row], held_out: Sequence[Row], data: DataConfig, left_out: LeftOut
) -> Split:
    """Rows whose side is known. Training rows that give a held-out one away are left out.

    Many may begin with the same greeting. Where that would cost more than half of the training
    rows, conversations are told apart by a later turn.
    """
    both = candidates([*train, *held_out], data)
    pool = _without_duplicates(both[: len(train)], left_out)
    reserve = _without_duplicates(both[len(train) :], left_out)

    def divided(
        both: Sequence[Candidate], pool: Sequence[Candidate], reserve: Sequence[Candidate]
    ) -> Split:
        found = [
            _kept(pool, reserve, depth, small_talk(both, depth)) for depth in range(1, DEEPEST + 2)
        ]
        kept = next((each for each in found if 2 * len(each) >= len(pool)), found[0])
        return _split(kept, pool, reserve, data, left_out)

    split = divided(both, pool, reserve)
    if not any(each.groups for each in both):
        return split
    return replace(split, ungrouped=lambda: divided(*map(_ungrouped, (both, pool, reserve))))


def _unmarked(
    rows: Sequence[Row], data: DataConfig, left_out: LeftOut, notes: tuple[str, ...]
) -> Split:
    """Rows whose content decides on which side they are."""

    def divided(ordered: Sequence[Candidate]) -> Split:
        arranged = _Arrangements(ordered)

        def again(eval_n: int) -> Split:
            kept, pool, reserve, more = arranged.cut(eval_n)
            split = _split(kept, pool, reserve, data, left_out)
            return replace(split, notes=(*notes, *more), again=again)

        return again(data.eval_n)

    ordered = _without_duplicates(candidates(rows, data), left_out)
    split = divided(ordered)
    if not any(each.groups for each in ordered):
        return split
    return replace(split, ungrouped=lambda: divided(_ungrouped(ordered)))


def _ungrouped(found: Sequence[Candidate]) -> list[Candidate]:
    return [each.without_groups() for each in found]


Groups = list[list[Candidate]]
Cut = tuple[list[Candidate], list[Candidate], list[Candidate], tuple[str, ...]]


class _Arrangements:
    """The ways to form groups of the same rows, the strictest first.

    An arrangement that unites too much is of no use: everyone may begin with the same greeting,
    or canned answers may link all chats. The next one tells conversations apart by a later turn,
    or leaves out the training rows that share an answer with a held-out one.
    """

    def __init__(self, ordered: Sequence[Candidate]) -> None:
        self._ordered = ordered
        self._made: list[tuple[Groups, int, bool, set[str]]] = []

    def _each(self) -> Iterator[tuple[Groups, int, bool, set[str]]]:
        ways = [*product((True, False), range(1, DEEPEST + 1)), (True, DEEPEST + 1)]
        for number, (united, depth) in enumerate(ways):
            if number == len(self._made):
                common = small_talk(self._ordered, depth)
                formed = groups(self._ordered, depth, united, common)
                self._made.append((formed, depth, united, common))
            if all(self._made[number][0] != made[0] for made in self._made[:number]):
                yield self._made[number]

    def cut(self, eval_n: int) -> Cut:
        """What is trained on, all that is not held out, what is held out, and notes."""
        count = len(self._ordered)
        size = eval_n + min(max(8, eval_n), count // 10)
        for formed, depth, united, common in self._each():
            held, left = _filled(formed, size)
            reserve, pool = _flat(held), _flat(left)
            kept = pool if united else _kept(pool, reserve, depth, common)
            too_large = sum(len(group) for group in left if len(group) > size)
            if len(reserve) >= eval_n and 2 * too_large <= count and 2 * len(kept) >= len(pool):
                return kept, pool, reserve, ()
        return self._of_whole_groups(eval_n, size)

    def _of_whole_groups(self, eval_n: int, size: int) -> Cut:
        """The strictest arrangement; where its reserve is short, the smallest groups join it."""
        formed = next(self._each())[0]
        held, left = _filled(formed, size)
        notes: tuple[str, ...] = ()
        while sum(map(len, held)) < eval_n and len(left) > 1:
            smallest = min(left, key=len)  # the first of equals
            left = [group for group in left if group is not smallest]
            held.append(smallest)
            rows = sum(map(len, held))
            notes = (
                f"rows that share a group or a beginning stay together, so {rows} rows are held "
                f"out for data.eval_n={eval_n}: {len(held)} of {len(formed)} groups",
            )
        pool = _flat(left)
        return pool, pool, _flat(held), notes


def _filled(formed: Groups, size: int) -> tuple[Groups, Groups]:
    """The groups that fit a reserve of `size` rows, taken in order, and all others."""
    held: Groups = []
    left: Groups = []
    room = size
    for group in formed:
        fits = len(group) <= room
        (held if fits else left).append(group)
        room -= len(group) * fits
    return held, left


def _flat(formed: Groups) -> list[Candidate]:
    return [each for group in formed for each in group]


def _kept(
    pool: Sequence[Candidate], reserve: Sequence[Candidate], depth: int, common: set[str]
) -> list[Candidate]:
    """The rows of `pool` that give no row of `reserve` away.

    The others share a mark with one, or are trained on one of its answers: every assistant turn
    of a held-out row counts, unless its exchange is `common`.
    """
    marks = {mark for each in reserve for mark in each.marks(depth, common)}
    answers = {exchange.key for each in reserve for exchange in each.exchanges} - common
    return [
        each
        for each in pool
        if marks.isdisjoint(each.marks(depth, common))
        and not any(exchange.learned and exchange.key in answers for exchange in each.exchanges)
    ]


def _split(
    kept: Sequence[Candidate],
    pool: Sequence[Candidate],
    reserve: Sequence[Candidate],
    data: DataConfig,
    left_out: LeftOut,
) -> Split:
    """`kept` of `pool` to train on, the last ones first, and `reserve` to hold out."""
    counted = LeftOut.of(left_out)
    if len(kept) < len(pool):
        remaining = set(map(id, kept))
        for each in pool:
            if id(each) not in remaining:
                counted.add("in_heldout", each.row.number)
    train = [each.row for each in reversed(kept)]
    if data.balance_by:
        train = round_robin(train)
    return Split(train, [each.row for each in reserve], counted)


def _without_duplicates(found: Iterable[Candidate], left_out: LeftOut) -> list[Candidate]:
    """Sorted by content. Of rows with one prompt and response the first of the file stays.

    It stands for the others, whose groups are its own from then on. Rows that differ in what else
    a template reads or in what is supervised are no duplicates: one may be usable alone.
    """

    def known(each: Candidate) -> tuple[str, str, str, tuple[tuple[str, bool], ...]]:
        turns = tuple((turn.extra, turn.supervised) for turn in each.row.messages)
        return each.prompt, each.response, each.row.tools, turns

    kept: list[Candidate] = []
    for each in sorted(found, key=lambda c: (*known(c), c.row.number, c.row)):
        last = kept[-1] if kept else None
        if last and known(last) == known(each):
            left_out.add("duplicate", each.row.number)
            if own := set(each.own) - set(last.own):
                kept[-1] = last._replace(own=(*last.own, *sorted(own)))
        else:
            kept.append(each)
    return kept


def round_robin(rows: Sequence[Row]) -> list[Row]:
    """One row of each value of `balance_by` in turn; a row's turn depends on those alone."""
    turns: Counter[str] = Counter()
    ranked = []
    for row in rows:
        ranked.append((turns[row.balance], row.balance, row))
        turns[row.balance] += 1
    return [row for _, _, row in sorted(ranked)]
