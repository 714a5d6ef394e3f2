"""Splits rows into training and held-out rows: one order by content, cut from both ends.

Rows that leak each other form a group: those of one `data.columns.group`, those with the same
opening, those that share an answer and its question (`conversations.py`). A group's position
depends on its text alone. Groups are visited in that order, and each one that still fits the
reserve is held out. All others are trained on, the last ones first. So the first 1,500 training
rows are inside the first 3,000, the held-out rows do not depend on `data.n`, and the order of the
source file does not matter. A group that is too large for the reserve is trained on as a whole.

Rows are skipped later, when the tokenizer shows that they are too long. The reserve allows for
that: it has `eval_n` rows and a few more, which are never trained on, whether they are used or
not. So no skipped row can be both held out and trained on. The unused rest of the reserve is for
confirmation, unless rows are marked as `test`: then those are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, product
from typing import Any

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.formats.cells import HELDOUT, TEST, TRAIN
from tinyllama_lab.data.formats.columns import column_names, listed
from tinyllama_lab.data.formats.detection import recognise
from tinyllama_lab.data.rows import LeftOut, RawRow, mapped_rows
from tinyllama_lab.data.splits.conversations import (
    DEEPEST,
    Candidate,
    candidates,
    groups,
    normalise,
    small_talk,
)
from tinyllama_lab.data.splits.leakage import leak_free, leak_free_at
from tinyllama_lab.data.splits.split_names import column_of, confirmation_setting, parts_of
from tinyllama_lab.errors import DataError

__all__ = ["Split", "normalise", "round_robin", "split_records", "split_rows"]

Part = Sequence[Candidate]


@dataclass(frozen=True)
class Split:
    """Candidate rows in the order in which they are taken: the first usable `n` or `eval_n`."""

    train: list[RawRow]
    heldout: list[RawRow]
    dropped: LeftOut
    notes: tuple[str, ...] = ()  # for the user: what may be unexpected
    test: list[RawRow] = field(default_factory=list)  # marked as test: for confirmation only
    # the same rows with another `eval_n`; None if the held-out rows are marked
    resplit: Callable[[int], Split] | None = field(default=None, compare=False)
    # the same rows as if they were in no group; None if they are in none
    without_groups: Callable[[], Split] | None = field(default=None, compare=False)
    data: DataConfig | None = field(default=None, compare=False)  # with the recognised columns

    @property
    def rows(self) -> int:
        """The number of all rows, including those left out."""
        return len(self.train) + self.held_back + self.dropped.counts.total()

    @property
    def remaining(self) -> list[RawRow]:
        """All rows that are not left out."""
        return [*self.train, *self.heldout, *self.test]

    @property
    def held_back(self) -> int:
        """The number of rows that are never trained on, whether they are evaluated or not."""
        return len(self.heldout) + len(self.test)


def split_records(
    records: Sequence[Mapping[str, Any]],
    data: DataConfig,
    held_out: Sequence[Mapping[str, Any]] | None = None,
) -> Split:
    """Map records to rows and split them.

    Args:
        records: the training records, which may contain the held-out rows.
        data: the settings; columns that are null are recognised.
        held_out: the records of `data.eval_path` or `data.eval_split`; None if neither is set.

    Raises:
        DataError: a column does not exist, or the name of a split is unknown.
    """
    data, recognised = recognise(records, data)
    rows, left_out = mapped_rows(records, data)
    if held_out is None:
        split = split_rows(rows, data, left_out)
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
        split = _with_held_out_set(rows, held_out_rows, data, left_out | more)
    # record numbers identify rows of the training file only
    same_file = held_out is None or confirmation_setting(data)
    used = {row.number for row in (*split.train, *(split.heldout if same_file else ()))}
    used |= {row.number for row in split.test} if held_out is None else set()
    notes = [recognised, _shortened(left_out, used), *_not_used(split), _unscored(split, data)]
    notes += split.notes
    return replace(split, data=data, notes=tuple(filter(None, notes)))


def _with_held_out_set(
    rows: Sequence[RawRow], held_out: Sequence[RawRow], data: DataConfig, left_out: LeftOut
) -> Split:
    """Split rows with a separate held-out set, which is for confirmation if it is called test."""
    if not (setting := confirmation_setting(data)):
        return _marked(rows, held_out, [], data, left_out)
    note = (
        f"{setting} is called test: its rows are for confirmation alone, and held-out rows are "
        "taken from the others; to choose by its rows, call it validation"
    )
    return _unmarked(rows, held_out, data, left_out, (note,))


def _unscored(split: Split, data: DataConfig) -> str:
    """Return the note for marked held-out rows whose number is not `data.eval_n`; else empty."""
    marked = len(split.heldout)
    if split.resplit:
        return ""  # not marked: the rows beyond `eval_n` are a reserve
    if marked < data.eval_n:
        return f"data: all {marked} held-out rows are scored, fewer than data.eval_n={data.eval_n}"
    if marked == data.eval_n or not data.kind.has_path:
        return ""  # for a set of conf/, its YAML chose `eval_n`
    return (
        f"data: {data.eval_n} of {marked} held-out rows are scored; to score all, set "
        f"data.eval_n={marked}"
    )


def _shortened(left_out: LeftOut, used: Collection[int]) -> str:
    """Return the note for chats that are cut after their last answer, among the `used` records."""
    cut = [number for number in left_out.shortened if number in used]
    if not cut:
        return ""
    return (
        f"data: {len(cut)} of {len(used)} chats are used up to their last answer (first: row "
        f"{cut[0]})"
    )


def _not_used(split: Split) -> Iterator[str]:
    """Yield notes for content of messages that is not used: thinking and attachments."""
    turns = [turn for row in split.remaining for turn in row.messages]
    answers = [turn for turn in turns if turn.role == "assistant"]
    if thinking := sum(turn.has_thinking for turn in answers):
        yield f"data: thinking of {thinking} answer{'s' * (thinking > 1)} is not used"
    if attached := sum(turn.has_attachments for turn in turns):
        yield f"data: attachments of {attached} message{'s' * (attached > 1)} are not used"


def split_rows(
    rows: Sequence[RawRow], data: DataConfig, dropped: LeftOut | Mapping[str, int] | None = None
) -> Split:
    """Order the rows and split them into training and held-out candidates.

    If rows have a split, only rows marked as held out are held out. Else a reserve is held out:
    `eval_n` rows plus as many again (at least 8), but no more than a tenth of the rows on top of
    `eval_n`.

    Args:
        rows: all rows.
        data: `eval_n`, `columns.split` and others are used.
        dropped: the rows that `to_rows` left out; they are included in the counts.

    Raises:
        DataError: the name of a split is unknown, or no row is marked for training.
    """
    left_out = LeftOut.of(dropped)
    parts = parts_of(rows, data)
    if not parts:
        return _unmarked(rows, [], data, left_out, ())
    for row in rows:  # without a split, a row is not known to be for training
        if not row.split.strip():
            left_out.add("no_split", row.number)
    train, held_out, test = (
        [row for row in rows if parts.get(row.split) == part] for part in (TRAIN, HELDOUT, TEST)
    )
    if held_out:
        return _marked(train, held_out, test, data, left_out)
    marked = "rows as test, for confirmation alone, and no other row" if test else "no row"
    note = f"{column_of(data)} marks {marked} as held out: held-out rows are taken from the others"
    return _unmarked(train, test, data, left_out, (note,))


def _marked(
    train: Sequence[RawRow],
    held_out: Sequence[RawRow],
    test: Sequence[RawRow],
    data: DataConfig,
    left_out: LeftOut,
) -> Split:
    """Split rows whose part is known; leave out training rows that leak a row of another part."""
    parts = _parts((train, held_out, test), data, left_out)

    def divided(every: Part, pool: Part, reserve: Part, confirming: Part) -> Split:
        rest = leak_free(pool, [*reserve, *confirming], every)
        return _split(rest, pool, reserve, confirming, data, left_out)

    split = divided(*parts)
    if not any(candidate.groups for candidate in parts[0]):
        return split
    return replace(split, without_groups=lambda: divided(*map(_ungrouped, parts)))


def _unmarked(
    rows: Sequence[RawRow],
    test: Sequence[RawRow],
    data: DataConfig,
    left_out: LeftOut,
    notes: tuple[str, ...],
) -> Split:
    """Split rows by their content; rows that leak a row marked as test are left out."""
    parts = _parts((rows, test), data, left_out)

    def divided(every: Part, pool: Part, confirming: Part) -> Split:
        ordered = leak_free(pool, confirming, every)
        arranged, counted = _Groupings(ordered), _counted(left_out, pool, ordered)

        def resplit(eval_n: int) -> Split:
            rest, pool, reserve, more = arranged.cut(eval_n)
            split = _split(rest, pool, reserve, confirming, data, counted)
            return replace(split, notes=(*notes, *more), resplit=resplit)

        return resplit(data.eval_n)

    split = divided(*parts)
    if not any(candidate.groups for candidate in parts[0]):
        return split
    return replace(split, without_groups=lambda: divided(*map(_ungrouped, parts)))


def _parts(
    parts: Sequence[Sequence[RawRow]], data: DataConfig, left_out: LeftOut
) -> list[list[Candidate]]:
    """Return all candidates, then those of each part, sorted by content without duplicates."""
    every = candidates([row for part in parts for row in part], data)
    left = iter(every)
    return [every, *(_without_duplicates(islice(left, len(p)), left_out) for p in parts)]


def _ungrouped(part: Part) -> list[Candidate]:
    return [candidate.without_groups() for candidate in part]


Groups = list[list[Candidate]]
# what is trained on, all that is not held out, what is held out, and notes
Cut = tuple[list[Candidate], list[Candidate], list[Candidate], tuple[str, ...]]


class _Groupings:
    """The ways to group the same rows, the strictest first.

    A way that unites too many rows does not help: all chats may begin with the same greeting, or
    canned answers may link them. The next way compares openings up to a later answer, or leaves
    out the training rows that share an answer with a held-out row instead of uniting them.
    """

    def __init__(self, ordered: Sequence[Candidate]) -> None:
        self._ordered = ordered
        self._made: list[tuple[Groups, int, bool, set[str]]] = []

    def _distinct(self) -> Iterator[tuple[Groups, int, bool, set[str]]]:
        """Yield groups, depth, whether exchanges unite rows, and common exchanges, of each way."""
        ways = [*product((True, False), range(1, DEEPEST + 1)), (True, DEEPEST + 1)]
        for number, (united, depth) in enumerate(ways):
            if number == len(self._made):
                common = small_talk(self._ordered, depth)
                formed = groups(self._ordered, depth, united, common)
                self._made.append((formed, depth, united, common))
            if all(self._made[number][0] != made[0] for made in self._made[:number]):
                yield self._made[number]

    def cut(self, eval_n: int) -> Cut:
        """Return the cut of the first way that fills the reserve and keeps half of the rows."""
        count = len(self._ordered)
        size = eval_n + min(max(8, eval_n), count // 10)
        for formed, depth, united, common in self._distinct():
            held, left = _filled(formed, size)
            reserve, pool = _flat(held), _flat(left)
            rest = pool if united else leak_free_at(pool, reserve, depth, common)
            # groups that can never be held out must not make up most of the rows
            too_large = sum(len(group) for group in left if len(group) > size)
            if len(reserve) >= eval_n and 2 * too_large <= count and 2 * len(rest) >= len(pool):
                return rest, pool, reserve, ()
        return self._of_whole_groups(eval_n, size)

    def _of_whole_groups(self, eval_n: int, size: int) -> Cut:
        """Return the cut of the strictest way; the smallest groups fill up a short reserve."""
        formed = next(self._distinct())[0]
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
    """Return the groups that fit a reserve of `size` rows, taken in order, and all others."""
    held: Groups = []
    left: Groups = []
    room = size
    for group in formed:
        fits = len(group) <= room
        (held if fits else left).append(group)
        room -= len(group) * fits  # a later, smaller group may still fit
    return held, left


def _flat(formed: Groups) -> list[Candidate]:
    return [candidate for group in formed for candidate in group]


def _split(
    rest: Part,
    pool: Part,
    reserve: Part,
    confirming: Part,
    data: DataConfig,
    left_out: LeftOut,
) -> Split:
    """Return the split with `rest` (of `pool`) to train on, the last ones first."""
    # reversed: the boundary to the reserve moves with `eval_n`, so training starts far from it
    train = [candidate.row for candidate in reversed(rest)]
    if data.balance_by:
        train = round_robin(train)
    heldout, test = ([candidate.row for candidate in part] for part in (reserve, confirming))
    return Split(train, heldout, _counted(left_out, pool, rest), test=test)


def _counted(left_out: LeftOut, pool: Part, rest: Part) -> LeftOut:
    """Return `left_out` plus the rows of `pool` that are not in `rest`, which leak others."""
    counted = LeftOut.of(left_out)
    if len(rest) < len(pool):
        remaining = set(map(id, rest))
        for candidate in pool:
            if id(candidate) not in remaining:
                counted.add("in_heldout", candidate.row.number)
    return counted


def _without_duplicates(part: Iterable[Candidate], left_out: LeftOut) -> list[Candidate]:
    """Sort by content and keep the first record of rows with the same prompt and response.

    It takes over the groups of its duplicates. Rows that differ in supervision, or in what else a
    template reads, are not duplicates, because one may be usable alone.
    """

    def content(c: Candidate) -> tuple[str, str, str, tuple[tuple[str, bool], ...]]:
        turns = tuple((turn.extra, turn.supervised) for turn in c.row.messages)
        return c.prompt, c.response, c.row.tools, turns

    kept: list[Candidate] = []
    for candidate in sorted(part, key=lambda c: (*content(c), c.row.number, c.row)):
        last = kept[-1] if kept else None
        if last and content(last) == content(candidate):
            left_out.add("duplicate", candidate.row.number, same_as=last.row.number)
            if more := set(candidate.memberships) - set(last.memberships):
                kept[-1] = last._replace(memberships=(*last.memberships, *sorted(more)))
        else:
            kept.append(candidate)
    return kept


def round_robin(rows: Sequence[RawRow]) -> list[RawRow]:
    """Order rows so that the values of `balance_by` take turns.

    A row's turn depends on the rows of its value alone, so that training subsets stay nested.
    """
    turns: Counter[str] = Counter()
    ranked = []
    for row in rows:
        ranked.append((turns[row.balance], row.balance, row))
        turns[row.balance] += 1
    return [row for _, _, row in sorted(ranked)]
