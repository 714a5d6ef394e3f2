"""Which rows are trained on and which are held out: one order by content, cut from both ends.

Every row has a place that depends on its text alone: the hash of its normalised prompt, then
its response. The held-out set is read from the head of that order, training from its tail.
So the first 1,500 training rows are inside the first 3,000, neither set depends on the size of
the other, and the order of the source file does not matter.

Rows are skipped later, when the tokenizer shows that they are too long. For that the head has
a reserve: `eval_n` rows and a few more, which training never touches, whether they turn out to
be used or not. No skipped candidate can therefore be both held out and trained on.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tinyllama_lab.config import DataConfig
from tinyllama_lab.errors import DataError
from tinyllama_lab.rows import Row, Turn

HELDOUT = ("heldout", "test", "validation")
TRAIN = "train"


@dataclass(frozen=True)
class Split:
    """Candidates in the order they are taken: the first `n`, or `eval_n`, usable ones count."""

    train: list[Row]
    heldout: list[Row]
    dropped: Counter[str]


@dataclass(frozen=True)
class _Placed:
    prompt: str  # the hash of everything before the response
    row: Row


def normalise(text: str) -> str:
    """The spelling in which two texts count as the same: NFC, no case, single spaces."""
    folded = unicodedata.normalize("NFD", text).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def split_rows(
    rows: Sequence[Row], data: DataConfig, dropped: Mapping[str, int] | None = None
) -> Split:
    """Order the rows and divide them into training and held-out candidates.

    Where the split column marks rows as held out, only those are, and only rows marked `train`
    are trained on. Else the reserve at the head of the order is held out: `eval_n` rows and as
    many again (8 at least), but no more than a tenth of the set on top of `eval_n`.

    Args:
        dropped: what `to_rows` dropped; it is counted in.
    """
    counts = Counter(dropped or {})
    marks = {row.split: row.split.strip().casefold() for row in rows}
    if any(mark in HELDOUT for mark in marks.values()):
        heldout = _in_order((r for r in rows if marks[r.split] in HELDOUT), counts)
        pool = _in_order((r for r in rows if marks[r.split] == TRAIN), counts)
        known = sum(marks[row.split] in (*HELDOUT, TRAIN) for row in rows)
        counts["other_split"] += len(rows) - known
    else:
        placed = _in_order(rows, counts)
        cut = data.eval_n + min(max(8, data.eval_n), len(placed) // 10)
        heldout, pool = placed[:cut], placed[cut:]
    # by prompt, not by row: another answer to a held-out question would give it away
    prompts = {each.prompt for each in heldout}
    train = [each.row for each in reversed(pool) if each.prompt not in prompts]
    counts["in_heldout"] += len(pool) - len(train)
    if data.balance_by:
        train = _round_robin(train)
    return Split(train, [each.row for each in heldout], +counts)  # + leaves out the zeros


def check_enough(split: Split, data: DataConfig, where: str) -> None:
    """Refuse a set that is too small; `where` names it in the message.

    Raises:
        DataError: `data.n` or `data.eval_n` asks for more rows than there are.
    """
    reasons = ", ".join(f"{count} {reason}" for reason, count in split.dropped.most_common())
    dropped = f" (dropped: {reasons})" if reasons else ""
    more = ", raise data.max_length" if split.dropped["too_long"] else ""
    fewer = "" if data.columns.split else ", lower data.eval_n"  # held out rows would train
    problems = []
    for key, wanted, rows, kind, other in (
        ("data.n", data.train_rows or 1, split.train, "training", fewer),
        ("data.eval_n", data.eval_n, split.heldout, "held-out", ""),
    ):
        if len(rows) < wanted:
            lower = f"lower {key} to {len(rows)}" if rows else "name another set with data=..."
            lower += other
            problems.append(
                f"{key}={wanted} needs {wanted} usable {kind} rows, but {where} has only "
                f"{len(rows)} usable {kind} rows{dropped}; {lower}{more} or add rows"
            )
    if problems:
        raise DataError("\n".join(problems))


def _in_order(rows: Iterable[Row], counts: Counter[str]) -> list[_Placed]:
    """Sort by content and drop exact duplicates. Of these the first in the order stays."""
    keyed = sorted((_prompt_hash(row), normalise(row.response), row) for row in rows)
    placed = []
    last = ("", "")
    for prompt, response, row in keyed:
        if (prompt, response) == last:
            counts["duplicate"] += 1
        else:
            placed.append(_Placed(prompt, row))
        last = (prompt, response)
    return placed


def _prompt_hash(row: Row) -> str:
    asked = row.messages[:-1] or (Turn("user", row.prompt),)
    parts = [row.context, *(text for turn in asked for text in (turn.role, turn.content))]
    return hashlib.sha256(json.dumps([normalise(part) for part in parts]).encode()).hexdigest()


def _round_robin(rows: Sequence[Row]) -> list[Row]:
    """One row of each value of `balance_by` in turn; a row's turn depends on those alone."""
    turns: Counter[str] = Counter()
    ranked = []
    for row in rows:
        ranked.append((turns[row.balance], row.balance, row))
        turns[row.balance] += 1
    return [row for _, _, row in sorted(ranked)]
