"""The columns of a data set: their names, and what a sample of their cells holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from tinyllama_lab.config.command import typed
from tinyllama_lab.config.schema import DataConfig
from tinyllama_lab.data.formats.cells import (
    SPLIT_KEY,
    UnusableRow,
    as_text,
    cell_at,
    is_blank,
    is_list_or_object,
    is_missing,
    is_number_or_bool,
    parsed_cell,
    to_python,
    with_underscores,
)
from tinyllama_lab.data.formats.turns import is_chat, is_unanswered
from tinyllama_lab.errors import DataError, shown

Records = Sequence[Mapping[str, Any]]

CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "contents")
# columns that may hold chats as lists of `[question, answer]`
PAIRED = (*CHATS, "history", "chat_history", "chatbot")
PROMPTS = ("prompt", "instruction", "question", "query", "input", "user", "human", "problem")
RESPONSES = ("response", "completion", "output", "answer", "assistant", "reply", "solution")
CONTEXTS = ("context", "passage")
GROUPS = (
    *("conversation_id", "conv_id", "dialogue_id", "dialog_id"),
    *("thread_id", "session_id", "chat_id"),
)
_RESPONSE_WORDS = frozenset((*RESPONSES, "choices", "generation"))
SYSTEMS = ("system", "system_prompt", "system_message")

# words of columns that describe a row, and hold neither question nor answer
_METADATA_WORDS = frozenset(
    "id title source topic subject role path url lang language name method rejected".split()
)
# words of columns that would give the answer away in a prompt, or do not belong in one
NON_CONTEXT_WORDS = (
    _METADATA_WORDS
    | _RESPONSE_WORDS
    | frozenset(
        "explanation rationale reasoning thought summary chosen target label feedback".split()
    )
)
_SAMPLE_RECORDS = 200
_MAX_KEYS = 40  # inspected per object; a tree of messages has one key per message
_MAX_LISTED = 20  # columns in a message
_NEARLY_ALL = 0.9  # share of the cells
_BOOLEANS = ("true", "false")
_MIN_CATEGORY_CELLS = 10  # with fewer cells, values may repeat by chance
_WORD = re.compile(r"[^\W\d_]+")


class Columns:
    """The columns of a data set, described by their names and by a sample of their cells.

    Attributes:
        names: all columns, in the order in which they first occur.
        style: `data.style`.
        configured: columns that the configuration names, by their key in `data.columns`.
        disabled: keys of `data.columns` that are empty strings: the set has no such column.
        taken: configured columns whose text has one use only, so that detection skips them.
    """

    def __init__(self, records: Records, data: DataConfig) -> None:
        self.names = column_names(records)
        self.style = data.style
        self.configured = {key: name for key, name in asdict(data.columns).items() if name}
        self.disabled = {key for key, name in asdict(data.columns).items() if name == ""}
        labels = ("group", "intent", "split")  # their columns may be the text as well
        self.taken = {name for key, name in self.configured.items() if key not in labels}
        self._records = records
        self._sample = [dict(record) for record in records[:_SAMPLE_RECORDS]]

    @property
    def is_pair_configured(self) -> bool:
        """Whether the configuration names a prompt, response or context column."""
        return bool(self.configured.keys() & {"prompt", "response", "context"})

    @property
    def available(self) -> list[str]:
        """The columns that detection may use: all that are not taken."""
        return [name for name in self.names if name not in self.taken]

    def with_name(self, spellings: Sequence[str]) -> list[str]:
        """Return the available columns that have one of these names, in any case."""
        return [name for name in self.available if name.strip().casefold() in spellings]

    def with_word(self, words: frozenset[str]) -> list[str]:
        """Return the available columns whose names contain a word: `airline_sentiment`."""
        return [name for name in self.available if words & words_of(name)]

    def cells(self, name: str) -> list[Any]:
        """Return the cells of the sample that are not empty."""
        return _non_empty(cell_at(record, name) for record in self._sample)

    def all_cells(self, name: str) -> list[Any]:
        """Return the cells of all records that are not empty.

        A sample would miss a split whose rows come last.
        """
        return _non_empty(record.get(name) for record in self._records)

    @property
    def chats(self) -> list[str]:
        """The available columns that hold chats, as lists or as strings of lists."""
        return [name for name in self.available if self.holds_chats(name)]

    @property
    def nested_chats(self) -> list[str]:
        """Paths of chats in the objects of available columns, such as `chat.messages`."""
        return [path for name in self.available for path in self.chats_in(name)]

    def chats_in(self, name: str) -> list[str]:
        """Return the paths of chats in the objects of a column, at most two keys below it.

        The paths of the upper level come first: those of the lower level count only without them.
        """
        paths = self._inner_paths(name)
        deeper = [inner for path in paths for inner in self._inner_paths(path)]
        return next(filter(None, (list(filter(self.holds_chats, p)) for p in (paths, deeper))), [])

    def _inner_paths(self, name: str) -> list[str]:
        """Return the paths of the lists and objects in the objects of a column."""
        objects = [
            cell for cell in map(parsed_cell, self.cells(name)) if isinstance(cell, Mapping)
        ]
        keys = dict.fromkeys(
            str(key)
            for cell in objects
            for key, value in islice(cell.items(), _MAX_KEYS)
            if is_list_or_object(value)
        )
        return [f"{name}.{key}" for key in islice(keys, _MAX_KEYS) if "." not in key]

    def holds_chats(self, name: str) -> bool:
        """Return whether most cells of a column are chats."""
        return self.mostly(name, lambda cell: is_chat(parsed_cell(cell)))

    def mostly(self, name: str, holds: Callable[[Any], bool], share: float = 0.5) -> bool:
        """Return whether at least `share` of the cells satisfy `holds`.

        A few bad rows do not change what a column is.
        """
        cells = self.cells(name)
        return bool(cells) and sum(holds(cell) for cell in cells) >= share * len(cells)

    def holds_unanswered(self, name: str) -> bool:
        """Return whether a column holds chats of which hardly any ends with an answer."""
        return self.mostly(name, is_unanswered, _NEARLY_ALL)

    def answer_columns(self, chats: str) -> list[str]:
        """Return the columns that hold the answers to chats which end before them.

        Returns:
            The columns; none if the chats hold their answers.
        """
        if not self.holds_unanswered(chats):
            return []
        texts = [name for name in self.with_name(RESPONSES) if self.is_text(name)]
        return [name for name in texts if not self.mostly(name, is_number_or_bool)]

    @property
    def likely_answer_columns(self) -> list[str]:
        """The columns that may hold answers by a word of their name, as text or in objects."""

        def is_likely(name: str) -> bool:
            has_text = (
                self.is_text(name) if name in self.with_name(RESPONSES) else self.is_prose(name)
            )
            return has_text or self.mostly(name, lambda cell: not _has_text(cell))

        return list(filter(is_likely, self.with_word(_RESPONSE_WORDS)))

    def is_text(self, name: str, or_empty: bool = False) -> bool:
        """Return whether most cells of a column are text, numbers or messages.

        Args:
            or_empty: the result for a column without any cell.
        """
        if not self.cells(name):
            return or_empty
        return self.mostly(name, lambda cell: is_chat(cell) or _has_text(cell))

    def is_prose(self, name: str) -> bool:
        """Return whether a column holds sentences: no numbers, dates, names or categories.

        A single word with a digit counts as a number or date. A column that repeats most of its
        values is a category.
        """
        if not self.is_text(name):
            return False
        cells = [str(cell).strip() for cell in self.cells(name)]
        marks = sum(
            cell.casefold() in _BOOLEANS or (" " not in cell and any(map(str.isdigit, cell)))
            for cell in cells
        )
        is_category = len(cells) >= _MIN_CATEGORY_CELLS and 2 * len(set(cells)) <= len(cells)
        return 2 * marks < len(cells) and not is_category

    def prose_columns(self) -> list[str]:
        """Return the available columns that may be a question, an answer or a text."""
        about = {*SYSTEMS, *CONTEXTS}
        return [
            name
            for name in self.available
            if self.is_prose(name)
            and not words_of(name) & _METADATA_WORDS
            and name.strip().casefold() not in about
        ]

    def first_cell(self, name: str) -> str:
        """Return the first cell of a column, for a message."""
        return repr(shown(str(to_python(self.cells(name)[0])), 40))


def is_group_column(cells: Sequence[Any]) -> bool:
    """Return whether cells say which rows belong together.

    Some rows must share a value, and no value may belong to more than a quarter of them: otherwise
    too few rows could be held out.
    """
    if not cells or not all(map(_has_text, cells)):
        return False
    counts = Counter(map(as_text, cells))
    return len(counts) < len(cells) and 4 * max(counts.values()) <= len(cells)


def words_of(name: str) -> set[str]:
    """Return the words of a column's name in lower case: `answerKey` has `answer` and `key`."""
    return {word.casefold() for word in _WORD.findall(with_underscores(name))}


def check_columns(records: Records, data: DataConfig) -> None:
    """Refuse a configuration that names columns which the data does not have.

    Raises:
        DataError: columns are missing; the message lists them, those that exist, and what to type.
    """
    existing = column_names(records)
    missing = {
        key: name
        for key, name in _configured_columns(data).items()
        if name
        and name not in existing
        and not (key == "columns.messages" and _leads_to_values(records, name))
    }
    if not missing or not records:
        return
    names = " and ".join(typed(f"data.{key}", name) for key, name in missing.items())
    required = {"columns.messages", "columns.prompt", "columns.response", "columns.text"}
    null_hint = "" if required >= missing.keys() else ", or null if the set has no such column"
    way_out = f"choose one with data.{next(iter(missing))}=...{null_hint}"
    # if the set holds a chat, the user most likely means that
    chat = next((name for name in existing if _is_chat_column(records, name)), None)
    chat = chat or next(iter(Columns(records, data).nested_chats), None)
    may_name_messages = not data.columns.messages or "columns.messages" in missing
    if chat and may_name_messages and missing.keys() & required:
        way_out = f"type {typed('data.columns.messages', chat)}"
    raise DataError(
        f"{names} must name a column of the data, got a set with the columns: "
        f"{listed(existing)}; {way_out}"
    )


def _configured_columns(data: DataConfig) -> dict[str, str | None]:
    """Return the columns that the configuration names and that are used in its style."""
    columns = data.columns
    # messages take precedence over a prompt and a response, and ready-made text over both
    main = ("messages",) if columns.messages else ("prompt", "response", "context")
    main = ("text",) if data.style == "text" else main
    extras = ("intent", "split", "group", "system", "tools")
    wanted = {f"columns.{key}": getattr(columns, key) for key in (*main, *extras)}
    return {**wanted, "balance_by": data.balance_by}


def _leads_to_values(records: Records, name: str) -> bool:
    """Return whether a path such as `chat.messages` leads to a value in any record."""
    return any(not is_missing(cell_at(record, name)) for record in records)


def _is_chat_column(records: Records, name: str) -> bool:
    return any(is_chat(parsed_cell(record.get(name))) for record in records[:_SAMPLE_RECORDS])


def column_names(records: Records) -> list[str]:
    """Return the columns of all records, in the order in which they first occur."""
    names = dict.fromkeys(str(name) for record in records for name in record)
    return [name for name in names if name != SPLIT_KEY]


def listed(names: Sequence[str]) -> str:
    """Return names of columns for a message, at most `_MAX_LISTED` of them."""
    more = len(names) - _MAX_LISTED
    text = ", ".join(shown(name) for name in names[:_MAX_LISTED]) or "(none)"
    return f"{text} and {more} more" if more > 0 else text


def has_name(name: str | None, spelling: str) -> bool:
    """Return whether a column has this name, in any case."""
    return name is not None and name.strip().casefold() == spelling


def quoted(name: str) -> str:
    """Return the name of a column for use within a sentence."""
    return f"'{shown(name)}'"


def settings(columns: Mapping[str, str]) -> str:
    """Return what to type to set `data.<key>` to these columns."""
    return " ".join(typed(f"data.{key}", name) for key, name in columns.items())


def _non_empty(cells: Iterable[Any]) -> list[Any]:
    return [c for c in cells if not is_missing(c) and not (isinstance(c, str) and is_blank(c))]


def _has_text(cell: Any) -> bool:
    try:
        return bool(as_text(cell))
    except UnusableRow:
        return False
