"""From raw records to clean rows: maps columns, drops what cannot be used and counts why.

Driver and worker share this file, so that a data set is refused before a trial starts for
the very reasons a trial would meet. `sources.py` reads the records, `splits.py` decides which
rows are trained on and which are held out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyllama_lab.config import DataConfig
from tinyllama_lab.errors import DataError
from tinyllama_lab.sources import shown

ROLES = ("system", "user", "assistant")

REASONS = {  # why a row is left out, in words; others are shown with spaces
    "bad_messages": "unreadable chats",
    "duplicate": "duplicates",
    "empty_prompt": "empty prompts",
    "empty_response": "empty responses",
    "error_text": "failed calls",
    "in_heldout": "too close to a held-out row",
    "no_split": "without a split",
}

_UNDECODABLE = re.compile("[\ufffd\ud800-\udfff]")
_COLUMNS_SHOWN = 20


@dataclass(frozen=True, order=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str
    supervised: bool = True  # false for an assistant turn that the data gives the weight 0
    extra: str = ""  # its other keys that a chat template may read (tool calls), as JSON


@dataclass(frozen=True, order=True)
class Row:
    """One example. A chat row has its last user and assistant turn as prompt and response too."""

    prompt: str
    context: str
    response: str
    intent: str
    split: str
    messages: tuple[Turn, ...]  # empty where the row is not a chat
    balance: str  # the value of the column that `data.balance_by` names
    group: str = ""  # rows of one group stay on one side of the split
    system: str = ""  # a system turn of its own
    tools: str = ""  # definitions of the tools a chat may call, as JSON
    number: int = field(default=0, compare=False)  # of the record it was made from, from 1


@dataclass
class LeftOut:
    """Rows that are not used: how many for each reason, and the first record of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)  # by reason, a record's number from 1
    details: dict[str, str] = field(default_factory=dict)  # by reason, what is wrong with one row

    @classmethod
    def of(cls, counts: Mapping[str, int] | LeftOut | None) -> LeftOut:
        """A copy; plain counts have no record numbers."""
        if isinstance(counts, LeftOut):
            return cls(Counter(counts.counts), dict(counts.first), dict(counts.details))
        return cls(+Counter(counts or {}))

    def add(self, reason: str, number: int = 0, detail: str = "") -> None:
        """Count one row; `number` is that of its record, 0 where it is not known."""
        self.counts[reason] += 1
        self._note(reason, number)
        if detail:
            self.details.setdefault(reason, detail)

    def __or__(self, other: LeftOut) -> LeftOut:
        """Both together."""
        details = {**other.details, **self.details}
        both = LeftOut(self.counts + other.counts, dict(self.first), details)
        for reason, number in other.first.items():
            both._note(reason, number)
        return both

    def _note(self, reason: str, number: int) -> None:
        if number:
            self.first[reason] = min(number, self.first.get(reason, number))

    @property
    def facts(self) -> dict[str, int]:
        """The counts as a result holds them: by reason, sorted."""
        return dict(sorted(self.counts.items()))

    @property
    def reasons(self) -> str:
        """`30 tool calls (first: row 2), 6 empty responses (first: row 17)`; most rows first."""
        parts = []
        for reason, count in sorted(self.counts.items(), key=lambda each: (-each[1], each[0])):
            words = REASONS.get(reason, reason.replace("_", " "))
            first = f" (first: row {self.first[reason]})" if reason in self.first else ""
            parts.append(f"{count} {words.removesuffix('s') if count == 1 else words}{first}")
        return ", ".join(parts)

    def sentence(self, rows: int) -> str:
        """`36 of 60 rows left out: 30 tool calls (first: row 2), ...`; empty if none is."""
        count = self.counts.total()
        return f"{count} of {rows} rows left out: {self.reasons}" if count else ""


def to_rows(
    records: Sequence[Mapping[str, Any]], data: DataConfig
) -> tuple[list[Row], Counter[str]]:
    """Map the columns of every record and drop the rows that cannot be used.

    Where `data.columns.messages` is set, it is the only source of text. Texts are kept as they
    are; only whether they are empty is decided without their white space.

    Returns:
        The usable rows in the order of the records, and how many were dropped, by reason:
        `empty_prompt`, `empty_response`, `error_text`, `undecodable`, `bad_messages`.

    Raises:
        DataError: a column is not there, or holds lists where text is needed.
    """
    _require_columns(records, data)
    phrases = [phrase.casefold() for phrase in data.drop_containing if phrase.strip()]
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for number, record in enumerate(records, 1):
        row = _row(record, data, number)
        reason = _unusable(row, phrases) if row else "bad_messages"
        if row is None or reason:
            dropped[reason] += 1
        else:
            rows.append(row)
    return rows, dropped


def _require_columns(records: Sequence[Mapping[str, Any]], data: DataConfig) -> None:
    columns = data.columns
    wanted = {"columns.messages": columns.messages}
    if not columns.messages:
        wanted = {f"columns.{key}": getattr(columns, key) for key in ("prompt", "response")}
        wanted["columns.context"] = columns.context
    optional = {"columns.intent": columns.intent, "columns.split": columns.split}
    wanted |= {**optional, "balance_by": data.balance_by}
    there = dict.fromkeys(str(name) for record in records for name in record)
    missing = {key: name for key, name in wanted.items() if name and name not in there}
    if not missing or not records:
        return
    names = " and ".join(f"data.{key}={shown(name)}" for key, name in missing.items())
    listed = ", ".join(shown(name) for name in list(there)[:_COLUMNS_SHOWN]) or "(none)"
    more = len(there) - _COLUMNS_SHOWN
    listed += f" and {more} more" if more > 0 else ""
    must = {"columns.messages", "columns.prompt", "columns.response"}
    null = "" if must >= missing.keys() else ", or null where the set has no such column"
    raise DataError(
        f"{names} must name a column of the data, got a set with the columns: {listed}; "
        f"choose one with data.{next(iter(missing))}=...{null}"
    )


def _row(record: Mapping[str, Any], data: DataConfig, number: int) -> Row | None:
    columns = data.columns

    def cell(column: str | None) -> str:
        return _text(record.get(column), column, number) if column else ""

    messages: tuple[Turn, ...] = ()
    if columns.messages:
        messages = _messages(record.get(columns.messages))
        if not messages:
            return None
        prompt = [turn.content for turn in messages if turn.role == "user"][-1]
        context, response = "", messages[-1].content
    else:
        prompt, response = cell(columns.prompt), cell(columns.response)
        context = cell(columns.context)
    return Row(
        prompt=prompt,
        context=context,
        response=response,
        intent=cell(columns.intent),
        split=cell(columns.split),
        messages=messages,
        balance=cell(data.balance_by),
        group=cell(columns.group),
        system=cell(columns.system),
        number=number,
    )


def _text(value: Any, column: str, number: int) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple | dict | bytes):
        raise DataError(
            f"column {shown(column)!r} must hold text, got a {type(value).__name__} in row "
            f"{number}; choose another column, or name one with chat turns in "
            "data.columns.messages"
        )
    return str(value)


def _messages(value: Any) -> tuple[Turn, ...]:
    """The turns of a chat, or nothing where they cannot be trained on."""
    if not isinstance(value, list | tuple):
        return ()
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            return ()
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES or not isinstance(content, str):
            return ()
        turns.append(Turn(str(role), content))
    asked = any(turn.role == "user" and turn.content.strip() for turn in turns)
    if not asked or turns[-1].role != "assistant" or not turns[-1].content.strip():
        return ()
    return tuple(turns)


def _unusable(row: Row, phrases: Sequence[str]) -> str:
    """Why a row is dropped; empty where it is not."""
    texts = [row.prompt, row.context, row.response, row.intent, row.split]
    texts += [turn.content for turn in row.messages]
    if any(_UNDECODABLE.search(text) for text in texts):
        return "undecodable"
    if not row.prompt.strip():
        return "empty_prompt"
    if not row.response.strip():
        return "empty_response"
    response = row.response.casefold()
    return "error_text" if any(phrase in response for phrase in phrases) else ""
