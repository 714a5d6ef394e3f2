"""Turns raw records into rows of text: maps columns, and counts unusable rows by reason.

Driver and worker share this file, so that a data set is refused before a trial starts for the
same reasons as in the trial. `sources.py` reads the records, `formats/` recognises the columns,
`splits/` divides rows into training and held-out ones.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.formats.cells import (
    MEDIA,
    SPLIT_KEY,
    UnusableRow,
    as_text,
    cell_at,
    is_blank,
    is_missing,
    is_number_or_bool,
)
from tinyllama_lab.data.formats.columns import check_columns, column_names, words_of
from tinyllama_lab.data.formats.detection import recognise
from tinyllama_lab.data.formats.turns import (
    Chat,
    Turn,
    is_chat,
    messages_of,
    read_tools,
    read_turns,
)
from tinyllama_lab.errors import shown

__all__ = ["REMEDIES", "LeftOut", "RawRow", "Turn", "mapped_rows", "to_rows"]

REASONS = {  # why a row is left out, for messages; other reasons are shown with spaces
    "audio_in_message": "with audio in a message",
    "bad_messages": "unreadable chats",
    "bad_tool_call": "unreadable tool calls",
    "bad_tools": "unreadable tool definitions",
    "bad_weight": "weights other than 0 and 1",
    "blank_row": "blank rows",
    "document_in_message": "with a document in a message",
    "duplicate": "duplicates",
    "empty_chat": "empty chats",
    "empty_prompt": "empty prompts",
    "empty_response": "empty responses",
    "empty_text": "empty texts",
    "empty_turn": "empty assistant turns",
    "error_text": "failed calls",
    "image_in_message": "with an image in a message",
    "in_heldout": "too close to a held-out row",
    "joined": "whose answers the tokenizer joins to their prompts",
    "needs_media": "that belong to an image, audio or video",
    "needs_style_chat": "chats that need data.style=chat",
    "no_assistant_turn": "without an assistant turn",
    "no_split": "without a split",
    "no_text_in_message": "with something other than text in a message",
    "no_user_turn": "without a user turn",
    "not_text": "lists or bytes instead of text",
    "nothing_supervised": "without a supervised turn",
    "template_refused": "refused by the chat template",
    "tool_calls": "with tools defined or called",
    "text_lost": "shortened by the chat template",
    "tool_result_in_message": "with a tool result in a message",
    "tool_use_in_message": "with a tool use in a message",
    "unaligned": "whose answers cannot be told from their prompts",
    "undecodable": "undecodable texts",
    "unknown_role": "unknown roles",
    "video_in_message": "with a video in a message",
}

_TEXT_ALONE = "write the text of each message alone, where it makes sense without the rest"
_TOOL_MESSAGES = (
    "write calls as 'tool_calls' of the assistant's message, and results as messages by tool"
)

REMEDIES = {  # what to do if a reason leaves no row of a data set
    "audio_in_message": _TEXT_ALONE,
    "bad_messages": "name the column of messages in data.columns.messages",
    "blank_row": "write the file again from its source",
    "document_in_message": _TEXT_ALONE,
    "empty_chat": "name the column of messages in data.columns.messages",
    "empty_prompt": "name the column of what is asked in data.columns.prompt",
    "empty_response": "name the column of answers in data.columns.response",
    "empty_text": "name the column of texts in data.columns.text",
    "error_text": "take the text that all responses hold out of data.drop_containing",
    "image_in_message": _TEXT_ALONE,
    "in_heldout": "mark fewer rows as held out",
    "needs_style_chat": "type data.style=chat",
    "no_assistant_turn": "write the answers into the messages",
    "no_text_in_message": _TEXT_ALONE,
    "no_user_turn": "write what is asked into the messages",
    "not_text": "store each as text, for example with json.dumps",
    "tool_result_in_message": _TOOL_MESSAGES,
    "tool_use_in_message": _TOOL_MESSAGES,
    "undecodable": "write the file again from its source, as UTF-8",
    "unknown_role": "write the role of every message as user or assistant",
    "video_in_message": _TEXT_ALONE,
}

MAX_LISTED = 10  # left-out records that are listed by number, for each reason
# a replacement character or half a surrogate pair: the text was decoded wrongly before
_UNDECODABLE = re.compile("[\ufffd\ud800-\udfff]")
_PLACEHOLDER = re.compile(r"<\|?(?:image|audio|video)[\w|]*>")


@dataclass(frozen=True, order=True)
class RawRow:
    """One example as text, before the chat template and the tokenizer.

    In a chat, `prompt` and `response` are the last user and the last assistant turn. In a
    ready-made text (`data.columns.text`), both are the text.
    """

    prompt: str
    context: str
    response: str
    intent: str
    split: str
    messages: tuple[Turn, ...]  # empty if the row is not a chat
    balance: str  # the value of the column `data.balance_by`
    group: str = ""  # rows of one group stay on one side of the split
    system: str = ""  # the system turn from a column of its own
    tools: str = ""  # definitions of the tools a chat may call, as JSON
    number: int = field(default=0, compare=False)  # of its record, counted from 1; 0 if unknown
    is_newly_read: bool = field(default=False, compare=False)  # see `turns.Chat`


class LeftOutRecord(NamedTuple):
    """The record of a row that is left out."""

    number: int  # counted from 1
    same_as: int = 0  # of a duplicate: the number of the record that is used instead

    def __str__(self) -> str:
        same_as = f" (same as {self.same_as})" if self.same_as else ""
        return f"{self.number}{same_as}"


@dataclass
class LeftOut:
    """Rows that are not used: their number and first records by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    records: dict[str, list[LeftOutRecord]] = field(default_factory=dict)  # first ten by reason
    details: dict[str, str] = field(default_factory=dict)  # by reason, what is wrong with one row
    shortened: list[int] = field(default_factory=list)  # records used up to their last answer

    @classmethod
    def of(cls, counts: Mapping[str, int] | LeftOut | None) -> LeftOut:
        """Return a copy; plain counts have no record numbers."""
        if isinstance(counts, LeftOut):
            return copy.deepcopy(counts)
        return cls(+Counter(counts or {}))  # the plus drops counts of 0

    def add(self, reason: str, number: int = 0, detail: str = "", same_as: int = 0) -> None:
        """Count one row.

        Args:
            reason: a key of `REASONS`, or another word with underscores.
            number: of its record, counted from 1; 0 if unknown.
            detail: what is wrong with it; the first one of each reason is kept.
            same_as: the number of the record that a duplicate repeats.
        """
        self.counts[reason] += 1
        self._note(reason, [LeftOutRecord(number, same_as)] if number else [])
        if detail:
            self.details.setdefault(reason, detail)

    def __or__(self, other: LeftOut) -> LeftOut:
        """Return the left-out rows of both."""
        both = LeftOut.of(self)
        both.counts += other.counts
        both.details = {**other.details, **self.details}
        both.shortened += other.shortened
        for reason, records in other.records.items():
            both._note(reason, records)
        return both

    def _note(self, reason: str, records: Sequence[LeftOutRecord]) -> None:
        if records:
            self.records[reason] = sorted([*self.records.get(reason, ()), *records])[:MAX_LISTED]

    @property
    def first(self) -> dict[str, int]:
        """The number of the first record of each reason, where known."""
        return {reason: records[0].number for reason, records in self.records.items()}

    @property
    def facts(self) -> dict[str, int]:
        """The counts for `result.json`: by reason, sorted."""
        return dict(sorted(self.counts.items()))

    @property
    def reasons(self) -> str:
        """`30 tool calls (first: row 2), 6 empty responses (first: row 17)`, most rows first."""
        parts = []
        for reason, count in self._most_frequent():
            words = REASONS.get(reason, reason.replace("_", " "))
            first = f" (first: row {self.first[reason]})" if reason in self.first else ""
            parts.append(f"{count} {words.removesuffix('s') if count == 1 else words}{first}")
        return ", ".join(parts)

    @property
    def listed(self) -> Iterator[str]:
        """`6 empty responses: rows 17, 20`, for each reason with more than its first record."""
        for reason, count in self._most_frequent():
            records = self.records.get(reason, [])
            if len(records) > 1 or any(record.same_as for record in records):
                words = REASONS.get(reason, reason.replace("_", " "))
                rows = ", ".join(map(str, records))
                more = f" and {count - len(records)} more" if count > len(records) else ""
                yield f"{words}: row{'s' * (len(records) > 1)} {rows}{more}"

    def _most_frequent(self) -> list[tuple[str, int]]:
        """Return reasons and counts, most rows first."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))

    @property
    def explained(self) -> str:
        """The reasons, and what is wrong with the first row of each, where known."""
        details = "; ".join(dict.fromkeys(shown(text, 300) for text in self.details.values()))
        return f"{self.reasons}: {details}" if details else self.reasons

    def sentence(self, rows: int) -> str:
        """Return `36 of 60 rows left out: 30 tool calls (first: row 2), ...`; empty if none is."""
        count = self.counts.total()
        return f"{count} of {rows} rows left out: {self.reasons}" if count else ""


def to_rows(
    records: Sequence[Mapping[str, Any]], data: DataConfig
) -> tuple[list[RawRow], LeftOut]:
    """Recognise the columns that are null, then map the records as `mapped_rows` does."""
    return mapped_rows(records, recognise(records, data)[0])


def mapped_rows(
    records: Sequence[Mapping[str, Any]], data: DataConfig
) -> tuple[list[RawRow], LeftOut]:
    """Map the columns of every record and drop the rows that cannot be used.

    The text comes from `data.columns.text` if `data.style=text`, else from
    `data.columns.messages` if that is set, else from prompt and response. It is not changed;
    text without a visible character counts as empty.

    Returns:
        The usable rows in the order of the records; and the rows that were left out, by reason:
        `blank_row`, `empty_prompt`, `empty_response`, `empty_text`, `error_text`, `undecodable`,
        `not_text`, `bad_tools`, `needs_media`, `needs_style_chat`, and the reasons of
        `read_turns`.

    Raises:
        DataError: a column does not exist.
    """
    check_columns(records, data)
    phrases = [phrase.casefold() for phrase in data.drop_containing if phrase.strip()]
    names = column_names(records)
    media = [name for name in names if words_of(name) & MEDIA]
    rows: list[RawRow] = []
    left_out = LeftOut()
    for number, record in enumerate(records, 1):
        try:
            if len(names) != 1 or not record:  # with one column, `empty_text` says more
                _check_blank(record)
            row, is_cut = _row(record, data, number)
            _check(row, phrases)
            _check_media(row, {name: record.get(name) for name in media})
        except UnusableRow as error:
            left_out.add(error.reason, number, str(error))
            continue
        rows.append(row)
        if is_cut:
            left_out.shortened.append(number)
    return rows, left_out


def _check_blank(record: Mapping[str, Any]) -> None:
    """Check that some cell of a row has a value; spreadsheets write rows without any.

    Raises:
        UnusableRow: every cell is missing or blank.
    """
    cells = (cell for name, cell in record.items() if name != SPLIT_KEY)
    if all(is_blank(cell) if isinstance(cell, str) else is_missing(cell) for cell in cells):
        raise UnusableRow("blank_row")


def _row(record: Mapping[str, Any], data: DataConfig, number: int) -> tuple[RawRow, bool]:
    """Return the row of a record (or raise `UnusableRow`), and whether its chat was shortened."""
    columns = data.columns

    def cell(column: str | None) -> str:
        try:
            text = as_text(record.get(column)) if column else ""
        except UnusableRow as error:
            raise UnusableRow(error.reason, f"{error} (column '{shown(str(column))}')") from None
        return "" if is_blank(text) else text

    messages, is_cut, is_newly_read = _messages(record, data)
    if messages:
        prompt = [turn.content for turn in messages if turn.role == "user"][-1]
        context, response = "", messages[-1].content
    elif data.style == "text":
        prompt = response = cell(columns.text)
        context = ""
        if not response:
            raise UnusableRow("empty_text")
    else:
        prompt, response = cell(columns.prompt), cell(columns.response)
        context = cell(columns.context)
    row = RawRow(
        prompt=prompt,
        context=context,
        response=response,
        intent=cell(columns.intent),
        split=cell(columns.split) if columns.split else as_text(record.get(SPLIT_KEY)),
        messages=messages,
        balance=cell(data.balance_by),
        group=cell(columns.group),
        system=cell(columns.system),
        tools=read_tools(record.get(columns.tools)) if columns.tools else "",
        number=number,
        is_newly_read=is_newly_read,
    )
    return row, is_cut


def _messages(record: Mapping[str, Any], data: DataConfig) -> Chat:
    """Return the turns of a record; an empty chat if it has none (or raise `UnusableRow`)."""
    columns = data.columns
    if data.style == "text":
        return Chat()
    if columns.messages:
        return read_turns(cell_at(record, columns.messages))
    prompt, response = record.get(columns.prompt or ""), record.get(columns.response or "")
    if not is_chat(prompt) and not is_chat(response):
        return Chat()
    if data.style != "chat":
        raise UnusableRow("needs_style_chat")
    # assistant turns in the prompt are history: context without supervision
    history = [{**message, "weight": 0} for message in _side(prompt, "user")]
    return read_turns(history + _side(response, "assistant"))


def _side(value: Any, role: str) -> list[Mapping[Any, Any]]:
    """Return the messages of a prompt or response; a string becomes one message."""
    return messages_of(value) if is_chat(value) else [{"role": role, "content": value}]


def _check(row: RawRow, phrases: Sequence[str]) -> None:
    """Check that the texts of a row can be used.

    Raises:
        UnusableRow: with the reason.
    """
    texts = [row.prompt, row.context, row.response, row.intent, row.split, row.system]
    texts += [turn.content for turn in row.messages]
    if any(_UNDECODABLE.search(text) for text in texts):
        raise UnusableRow("undecodable")
    if not row.messages and not row.prompt:
        raise UnusableRow("empty_prompt")
    if not row.messages and not row.response:
        raise UnusableRow("empty_response")
    response = row.response.casefold()
    if any(phrase in response for phrase in phrases):
        raise UnusableRow("error_text")


def _check_media(row: RawRow, cells: Mapping[str, Any]) -> None:
    """Check that no text of a row refers to an image, audio or video.

    Base models here take text only. A media column that no placeholder in the text refers to is
    metadata, as an address is, and is ignored.

    Raises:
        UnusableRow: a text has a placeholder and a media column has a value.
    """
    texts = [row.prompt, row.response, *(turn.content for turn in row.messages)]
    placeholders = (match for text in texts if (match := _PLACEHOLDER.search(text)))
    if (placeholder := next(placeholders, None)) is None:
        return
    for name, cell in cells.items():
        if (
            not is_missing(cell)
            and not is_number_or_bool(cell)
            and str(cell).strip() not in ("", "[]")
        ):
            raise UnusableRow(
                "needs_media",
                f"{placeholder[0]} in a text stands for what column {name!r} holds; only text is "
                "trained on: if the text says enough without it, remove it",
            )
