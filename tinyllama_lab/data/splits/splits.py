"""Which rows are trained on and which are held out: one order by content, cut from both ends.

Rows that would give each other away form a group: those of one `data.columns.group`, those that
begin alike, those that share an answer and its question (`conversations.py`). A group's place
depends on its text alone. Walking the groups in that order, each is held out that still fits the
reserve; all others are trained on, the last ones first. So the first 1,500 training rows are
inside the first 3,000, the held-out rows do not depend on `data.n`, and the order of the source
file does not matter. A group that is too large for the reserve is trained on and loses no row.

Rows are skipped later, when the tokenizer shows that they are too long. For that there is the
reserve: `eval_n` rows and a few more, which training never touches, whether they turn out to be
used or not. No skipped candidate can therefore be both held out and trained on. What is left of
the reserve is for confirmation, unless rows are marked as `test`: then it is those.
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
    """Candidates in the order they are taken: the first `n`, or `eval_n`, usable ones count."""

    train: list[RawRow]
    heldout: list[RawRow]
    dropped: LeftOut
    notes: tuple[str, ...] = ()  # what a user would not expect
    test: list[RawRow] = field(default_factory=list)  # marked so: for confirmation alone
    resplit: Callable[[int], Split] | None = field(default=None, compare=False)
    without_groups: Callable[[], Split] | None = field(default=None, compare=False)
    data: DataConfig | None = field(default=None, compare=False)  # with what the columns hold

    @property
    def rows(self) -> int:
        """All rows, those that are left out included."""
        return len(self.train) + self.held_back + self.dropped.counts.total()

    @property
    def remaining(self) -> list[RawRow]:
        """All rows that are not left out."""
        return [*self.train, *self.heldout, *self.test]

    @property
    def held_back(self) -> int:
        """Rows that are never trained on, whether they are scored or not."""
        return len(self.heldout) + len(self.test)


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
        found = _with_held_out_set(rows, held_out_rows, data, left_out | more)
    same_file = held_out is None or confirmation_setting(data)  # as the training rows have
    used = {row.number for row in (*found.train, *(found.heldout if same_file else ()))}
    used |= {row.number for row in found.test} if held_out is None else set()
    notes = [recognised, _shortened(left_out, used), *_not_used(found), _unscored(found, data)]
    notes += found.notes
    return replace(found, data=data, notes=tuple(filter(None, notes)))


def _with_held_out_set(
    rows: Sequence[RawRow], held_out: Sequence[RawRow], data: DataConfig, left_out: LeftOut
) -> Split:
    """Rows with a held-out set of their own, whose name may say that it is for confirmation."""
    if not (setting := confirmation_setting(data)):
        return _marked(rows, held_out, [], data, left_out)
    note = (
        f"{setting} is called test: its rows are for confirmation alone, and held-out rows are "
        "taken from the others; to choose by its rows, call it validation"
    )
    return _unmarked(rows, held_out, data, left_out, (note,))


def _unscored(split: Split, data: DataConfig) -> str:
    """What is said where other rows are marked as held out than `data.eval_n` asks for."""
    marked = len(split.heldout)
    if split.resplit:
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


def _not_used(split: Split) -> Iterator[str]:
    """What is said of that which stands in the messages of the rows and is not used."""
    turns = [turn for row in split.remaining for turn in row.messages]
    answers = [turn for turn in turns if turn.role == "assistant"]
    if thinking := sum(turn.has_thinking for turn in answers):
        yield f"data: thinking of {thinking} answer{'s' * (thinking > 1)} is not used"
    if attached := sum(turn.has_attachments for turn in turns):
        yield f"data: attachments of {attached} message{'s' * (attached > 1)} are not used"


def split_rows(
    rows: Sequence[RawRow], data: DataConfig, dropped: LeftOut | Mapping[str, int] | None = None
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
    parts = parts_of(rows, data)
    if not parts:
        return _unmarked(rows, [], data, left_out, ())
    for row in rows:
        if not row.split.strip():
            left_out.add("no_split", row.number)
    train, held_out, test = (
        [row for row in rows if parts.get(row.split) == part] for part in (TRAIN, HELDOUT, TEST)
    )
    if held_out:
        return _marked(train, held_out, test, data, left_out)
    what = "rows as test, for confirmation alone, and no other row" if test else "no row"
    note = f"{column_of(data)} marks {what} as held out: held-out rows are taken from the others"
    return _unmarked(train, test, data, left_out, (note,))


def _marked(
    train: Sequence[RawRow],
    held_out: Sequence[RawRow],
    test: Sequence[RawRow],
    data: DataConfig,
    left_out: LeftOut,
) -> Split:
    """Rows whose part is known; training rows that give one of another part away are left out."""
    parts = _parts((train, held_out, test), data, left_out)

    def divided(every: Part, pool: Part, reserve: Part, confirming: Part) -> Split:
        rest = leak_free(pool, [*reserve, *confirming], every)
        return _split(rest, pool, reserve, confirming, data, left_out)

    split = divided(*parts)
    if not any(each.groups for each in parts[0]):
        return split
    return replace(split, without_groups=lambda: divided(*map(_ungrouped, parts)))


def _unmarked(
    rows: Sequence[RawRow],
    test: Sequence[RawRow],
    data: DataConfig,
    left_out: LeftOut,
    notes: tuple[str, ...],
) -> Split:
    """Rows whose content decides on which side they are; on none if they give a test row away."""
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
    if not any(each.groups for each in parts[0]):
        return split
    return replace(split, without_groups=lambda: divided(*map(_ungrouped, parts)))


def _parts(
    parts: Sequence[Sequence[RawRow]], data: DataConfig, left_out: LeftOut
) -> list[list[Candidate]]:
    """All candidates, and those of each part, sorted by content and without duplicates in it."""
    every = candidates([row for part in parts for row in part], data)
    left = iter(every)
    return [every, *(_without_duplicates(islice(left, len(p)), left_out) for p in parts)]


def _ungrouped(found: Part) -> list[Candidate]:
    return [each.without_groups() for each in found]


Groups = list[list[Candidate]]
Cut = tuple[list[Candidate], list[Candidate], list[Candidate], tuple[str, ...]]


class _Groupings:
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
            rest = pool if united else leak_free_at(pool, reserve, depth, common)
            too_large = sum(len(group) for group in left if len(group) > size)
            if len(reserve) >= eval_n and 2 * too_large <= count and 2 * len(rest) >= len(pool):
                return rest, pool, reserve, ()
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


def _split(
    rest: Part,
    pool: Part,
    reserve: Part,
    confirming: Part,
    data: DataConfig,
    left_out: LeftOut,
) -> Split:
    """The rest of `pool` to train on, the last ones first, and the others to hold back."""
    train = [each.row for each in reversed(rest)]
    if data.balance_by:
        train = round_robin(train)
    heldout, test = ([each.row for each in part] for part in (reserve, confirming))
    return Split(train, heldout, _counted(left_out, pool, rest), test=test)


def _counted(left_out: LeftOut, pool: Part, rest: Part) -> LeftOut:
    """`left_out`, and the rows of `pool` without the rest, which give others away."""
    counted = LeftOut.of(left_out)
    if len(rest) < len(pool):
        remaining = set(map(id, rest))
        for each in pool:
            if id(each) not in remaining:
                counted.add("in_heldout", each.row.number)
    return counted


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
            left_out.add("duplicate", each.row.number, same_as=last.row.number)
            if more := set(each.memberships) - set(last.memberships):
                kept[-1] = last._replace(memberships=(*last.memberships, *sorted(more)))
        else:
            kept.append(each)
    return kept


def round_robin(rows: Sequence[RawRow]) -> list[RawRow]:
    """One row of each value of `balance_by` in turn; a row's turn depends on those alone."""
    turns: Counter[str] = Counter()
    ranked = []
    for row in rows:
        ranked.append((turns[row.balance], row.balance, row))
        turns[row.balance] += 1
    return [row for _, _, row in sorted(ranked)]
