"""Which column of a data set holds what, where the names of the columns say it plainly.

A column that is null in `data.columns` is looked for here; one that was typed is never changed.
As soon as the text itself was typed (prompt and response, messages, or text), nothing else is
guessed. `docs/data.md` lists the formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tinyllama_lab.cells import (
    SPLIT_COLUMNS,
    SPLIT_KEY,
    UnusableRow,
    as_text,
    holds_splits,
    is_blank,
    is_missing,
    is_split_flag,
    unpacked,
)
from tinyllama_lab.command import typed
from tinyllama_lab.config import ColumnsConfig, DataConfig
from tinyllama_lab.errors import DataError, shown
from tinyllama_lab.turns import is_chat, roles, turn_list

Records = Sequence[Mapping[str, Any]]

CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "contents")
PROMPTS = ("prompt", "instruction", "question", "query", "input", "user", "human", "problem")
RESPONSES = ("response", "completion", "output", "answer", "assistant", "reply", "solution")
SYSTEMS = ("system", "system_prompt", "system_message")
# beside a `text`, these mean that the text alone is not what is to be learned
TARGETS = (*RESPONSES, "label", "labels", "target", "summary", "class", "chosen")
_SAMPLE = 200  # records that are looked at
_SHOWN = 20  # names of columns in a message
_FEW = 10  # cells that may repeat by chance
_LONG_NAME = 40  # characters: longer ones are data, not names


def recognise(records: Records, data: DataConfig) -> tuple[DataConfig, str]:
    """Fill in the columns that are null, and say in one line what was recognised.

    Returns:
        The configuration with its columns, and with `style=text` where the set is ready-made
        text; and the line, empty where there is nothing to say.

    Raises:
        DataError: the columns do not say plainly which is which; the message says what to type.
    """
    if not records:
        return data, ""
    table = Columns(records, data)
    found = table.found()
    columns = asdict(data.columns)
    filled = {key: columns[key] or found.names.get(key) for key in columns}
    resolved = replace(
        data, columns=replace(data.columns, **filled), style=found.style or data.style
    )
    problems = [*resolved.problems(), *_without_effect(resolved)]
    if problems:
        raise DataError(*problems)
    used = {name for name in (*filled.values(), data.balance_by) if name}
    unused = [name for name in table.names if name not in used]
    return resolved, _line(found, unused) if found.what else table.left_out()


def _without_effect(data: DataConfig) -> list[str]:
    """Settings of a chat, where the set turned out to be ready-made text."""
    typed = {"system": data.system, "date": data.date, "learn": data.learn != "all" and data.learn}
    return [
        f"data.{name}={value} has no effect on ready-made text (column "
        f"{_shown(data.columns.text or '')}); leave it out"
        for name, value in typed.items()
        if value and data.style == "text"
    ]


@dataclass(frozen=True)
class Found:
    """What was recognised: column names by their key in `data.columns`."""

    what: str
    names: dict[str, str]
    style: str | None = None


class Columns:
    """The columns of a set, by their names and by what a sample of their cells holds."""

    def __init__(self, records: Records, data: DataConfig) -> None:
        self.names = column_names(records)
        self._data = data
        self._given = {key: name for key, name in asdict(data.columns).items() if name}
        marks = ("group", "intent", "split")  # what they name may be a text as well
        self._typed = {name for key, name in self._given.items() if key not in marks}
        self._off = {key for key, name in asdict(data.columns).items() if name == ""}
        self._records = records
        self._sample = [dict(record) for record in records[:_SAMPLE]]

    def found(self) -> Found:
        """What the columns hold.

        Raises:
            DataError: that cannot be told.
        """
        style = self._data.style
        if self._is_described:
            return Found("", {}, style="text" if "text" in self._given else None)
        order = {"chat": (self._chat, self._pair, self._text), "text": (self._text,)}
        for find in order.get(style, (self._pair,)):
            found = find()
            if found is not None:
                return replace(found, names={**found.names, **self._beside(found)})
        raise self._refusal()

    @property
    def _is_described(self) -> bool:
        """Whether the text itself was typed, so that nothing is guessed."""
        given, style = self._given.keys(), self._data.style
        if style == "text" or "text" in given:
            return "text" in given
        return "messages" in given or {"prompt", "response"} <= given

    def left_out(self) -> str:
        """Of a set whose columns were typed, those that would be used had they been typed too."""
        wanted = {"context": ("context",), **self._wanted_beside(self._data.style)}
        if "messages" in self._given or self._data.style == "text":
            del wanted["context"]
        found = [
            (key, name)
            for key, spellings in wanted.items()
            if key not in self._given and key not in self._off
            for name in self._named(spellings)
            if self._cells(name) and self._fits(key, name)
        ]
        if not found and (flags := self._flags(self._data.style)):
            return f"data: not used: {_shown(flags[0])}, which may say what is held out"
        if not found:
            return ""
        names = " and ".join(_shown(name) for _, name in found)
        words = " ".join(typed(f"data.columns.{key}", name) for key, name in found)
        return f"data: not used: {names}; to use it, add {words}"

    def _chat(self) -> Found | None:
        """A column of messages, or nothing where a prompt or a response was typed."""
        if self._given.keys() & {"prompt", "response", "context"}:
            return None
        chats = [name for name in self._named(CHATS) if self._mostly(name, is_chat)]
        if len(chats) > 1:
            raise self._ambiguous("messages", chats)
        if not chats:
            return None
        first = next(turn_list(cell) for cell in self._cells(chats[0]) if is_chat(cell))
        shared = any("from" in turn for turn in first or ())
        what = "ShareGPT conversations" if shared else "chat messages"
        return Found(what, {"messages": chats[0]})

    def _pair(self) -> Found | None:
        """A prompt and a response, and a context where there is one."""
        context = self._context()
        prompts = [n for n in self._named(PROMPTS) if n != context and self._is_text(n)]
        if any(_is_named(name, "instruction") for name in prompts):
            prompts = [name for name in prompts if not _is_named(name, "input")]
        candidates = {
            "prompt": prompts,
            "response": [n for n in self._named(RESPONSES) if self._is_text(n)],
        }
        names = {}
        for key, columns in candidates.items():
            columns = [self._given[key]] if key in self._given else columns
            if not columns:
                return None
            if len(columns) > 1:
                raise self._ambiguous(key, columns)
            names[key] = columns[0]
        if context:
            names["context"] = context
        chats = [self._mostly(name, is_chat) for name in (names["prompt"], names["response"])]
        what = "conversations" if any(chats) else "prompts and responses"
        if _is_named(names["prompt"], "instruction") and _is_named(names["response"], "output"):
            what = "Alpaca rows"
        return Found(what, {k: name for k, name in names.items() if k not in self._given})

    def _context(self) -> str | None:
        """`context`, or the `input` of an instruction."""
        if "context" in self._given or "context" in self._off:
            return None
        names = self._named(("context",))
        if self._named(("instruction",)) or _is_named(self._given.get("prompt"), "instruction"):
            names += self._named(("input",))
        names = [name for name in names if self._is_text(name, or_empty=True)]
        if len(names) > 1:
            raise self._ambiguous("context", names)
        return names[0] if names else None

    def _text(self) -> Found | None:
        """One ready-made text."""
        if self._data.style == "chat" and self._given.keys() & {"prompt", "response", "context"}:
            return None
        texts = [name for name in self._named(("text",)) if self._is_text(name)]
        if len(texts) != 1 or (self._data.style == "chat" and self._named(TARGETS)):
            return None
        return Found("ready-made text", {"text": texts[0]}, style="text")

    def _beside(self, found: Found) -> dict[str, str]:
        """What may stand beside the text: a system turn, tools, a split."""
        names: dict[str, str] = {}
        style = found.style or self._data.style
        for key, spellings in self._wanted_beside(style).items():
            columns = [name for name in self._named(spellings) if self._fits(key, name)]
            if len(columns) > 1:
                raise self._ambiguous(key, columns)
            if columns and key not in self._given and key not in self._off:
                names[key] = columns[0]
        flags = self._flags(style)
        if flags and "split" not in names:
            raise DataError(
                "data.columns.split must name a column that says of every row whether it is train "
                f"or test, got a set whose {_shown(flags[0])} may say so by true and false; add "
                "such a column, or set data.columns.split='' to hold rows out by their content"
            )
        return names

    def _flags(self, style: str) -> list[str]:
        """Columns that may say by true and false what is held out, where nothing else says it."""
        if "split" not in self._wanted_beside(style).keys() - {*self._given, *self._off}:
            return []
        cells = {name: self._all_cells(name) for name in self.names}
        return [name for name, found in cells.items() if found and is_split_flag(name, found)]

    def _wanted_beside(self, style: str) -> dict[str, tuple[str, ...]]:
        has_own = self._data.eval_path or self._data.eval_split  # held-out rows of their own
        spellings: dict[str, tuple[str, ...]] = {} if has_own else {"split": SPLIT_COLUMNS}
        if style == "chat":
            spellings |= {"system": SYSTEMS, "tools": ("tools",)}
        return spellings

    def _fits(self, key: str, name: str) -> bool:
        cells = self._cells(name)
        if key == "split":
            return holds_splits(name, self._all_cells(name))
        if key == "tools":
            return any(isinstance(unpacked(cell), list | dict) for cell in cells)
        return self._is_text(name)

    def _all_cells(self, name: str) -> list[Any]:
        """Not of a sample alone: rows of one split may come last."""
        return _present(record.get(name) for record in self._records)

    def _named(self, spellings: Sequence[str]) -> list[str]:
        """The columns with one of these names, but for case; not those that were typed."""
        return [
            name
            for name in self.names
            if name.strip().casefold() in spellings and name not in self._typed
        ]

    def _cells(self, name: str) -> list[Any]:
        return _present(record.get(name) for record in self._sample)

    def _mostly(self, name: str, holds: Callable[[Any], bool]) -> bool:
        """Whether most cells are so: a few bad rows say nothing about a column."""
        cells = self._cells(name)
        return bool(cells) and sum(holds(cell) for cell in cells) * 2 >= len(cells)

    def _is_text(self, name: str, or_empty: bool = False) -> bool:
        if not self._cells(name):
            return or_empty
        return self._mostly(name, lambda cell: is_chat(cell) or _has_text(cell))

    def _ambiguous(self, key: str, names: Sequence[str]) -> DataError:
        one = " or ".join(typed(f"data.columns.{key}", name) for name in names)
        several = " and ".join(map(_shown, names))
        return DataError(
            f"data.columns.{key} must name one column, got a set where {several} could be it; "
            f"type {one}"
        )

    def _refusal(self) -> DataError:
        """The columns that are there with their first cells, and what to type."""
        strangers = {r for name in self.names for cell in self._cells(name) for r in roles(cell)}
        if strangers and not self._guess():
            return DataError(
                "messages must be by system, user, assistant or tool, or by a usual name for "
                f"these such as human or gpt, got {listed(sorted(strangers))}; rename the roles"
            )
        words = [typed(f"data.{key}", name) for key, name in self._guess().items()]
        way_out = "name two of these in data.columns.prompt=... and data.columns.response=..."
        if 2 * sum(map(_is_data, self.names)) >= len(self.names):
            way_out = (
                "the first line of the file seems to hold data: write a line with the names of "
                "the columns above it, such as prompt,response"
            )
        elif words:
            way_out = f"for example, type {' '.join(words)}"
        cells = {name: self._cells(name) for name in self.names}
        firsts = [f"{n} ({shown(str(c[0]), 30)!r})" if c else n for n, c in cells.items()]
        what = "the messages, the prompt and the response, or the text"
        return DataError(
            f"data.columns must say which columns hold {what}, got a set with the columns: "
            f"{listed(firsts)}, whose names do not say it plainly; {way_out}"
        )

    def _guess(self) -> dict[str, str]:
        """The likeliest columns, for the user to correct."""
        free = [name for name in self.names if name not in self._typed]
        pair = self._given.keys() & {"prompt", "response", "context"}
        chats = [name for name in free if self._mostly(name, is_chat)]
        if chats and not pair:
            is_chat_style = self._data.style == "chat"
            return {"columns.messages": chats[0], **({} if is_chat_style else {"style": "chat"})}
        texts = [name for name in free if self._is_prose(name)]
        if len(texts) == 1 and (self._data.style == "text" or not pair):
            return {"columns.text": texts[0], "style": "text"}
        if self._data.style == "text":
            return {}
        guess: dict[str, str] = {}
        for key, spellings in (("prompt", PROMPTS), ("response", RESPONSES)):
            left = [name for name in texts if name not in guess.values()]
            names = [name for name in self._named(spellings) if name in left] + left
            if key not in self._given and names:
                guess[f"columns.{key}"] = names[0]
        return guess

    def _is_prose(self, name: str) -> bool:
        """Whether the cells are questions or answers: no numbers, dates, names or categories."""
        if not self._is_text(name):
            return False
        cells = [str(cell).strip() for cell in self._cells(name)]
        marks = sum(" " not in cell and any(map(str.isdigit, cell)) for cell in cells)
        is_category = len(cells) >= _FEW and 2 * len(set(cells)) <= len(cells)
        return 2 * marks < len(cells) and not is_category


def missing_columns(records: Records, data: DataConfig) -> None:
    """Refuse a configuration that names columns which are not there.

    Raises:
        DataError: with every such column, those that are there, and what to type.
    """
    there = column_names(records)
    missing = {key: name for key, name in _wanted(data).items() if name and name not in there}
    if not missing or not records:
        return
    names = " and ".join(typed(f"data.{key}", name) for key, name in missing.items())
    must = {"columns.messages", "columns.prompt", "columns.response", "columns.text"}
    null = "" if must >= missing.keys() else ", or null where the set has no such column"
    way_out = f"choose one with data.{next(iter(missing))}=...{null}"
    chat = next((name for name in there if _is_chat_column(records, name)), None)
    if chat and not data.columns.messages and missing.keys() & must:
        way_out = f"type {typed('data.columns.messages', chat)}"
    raise DataError(
        f"{names} must name a column of the data, got a set with the columns: "
        f"{listed(there)}; {way_out}"
    )


def _wanted(data: DataConfig) -> dict[str, str | None]:
    columns = data.columns
    main = ("messages",) if columns.messages else ("prompt", "response", "context")
    main = ("text",) if data.style == "text" else main
    beside = ("intent", "split", "group", "system", "tools")
    wanted = {f"columns.{key}": getattr(columns, key) for key in (*main, *beside)}
    return {**wanted, "balance_by": data.balance_by}


def _is_chat_column(records: Records, name: str) -> bool:
    return any(is_chat(record.get(name)) for record in records[:_SAMPLE])


def column_names(records: Records) -> list[str]:
    """Every column of a set, in the order in which they come."""
    names = dict.fromkeys(str(name) for record in records for name in record)
    return [name for name in names if name != SPLIT_KEY]


def listed(names: Sequence[str]) -> str:
    """The names of columns for a message."""
    more = len(names) - _SHOWN
    text = ", ".join(shown(name) for name in names[:_SHOWN]) or "(none)"
    return f"{text} and {more} more" if more > 0 else text


def _present(cells: Iterable[Any]) -> list[Any]:
    return [c for c in cells if not is_missing(c) and not (isinstance(c, str) and is_blank(c))]


def _has_text(cell: Any) -> bool:
    try:
        return bool(as_text(cell))
    except UnusableRow:
        return False


def _is_data(name: str) -> bool:
    """Whether the name of a column looks like a cell: a sentence."""
    is_sentence = name.strip().endswith(("?", ".", "!")) and len(name.split()) > 2
    return len(name) > _LONG_NAME or is_sentence


def _is_named(name: str | None, spelling: str) -> bool:
    return name is not None and name.strip().casefold() == spelling


def _shown(name: str) -> str:
    return f"'{shown(name)}'"


def _line(found: Found, unused: Sequence[str]) -> str:
    rest = f"not used: {listed(unused)}" if unused else ""
    keys = [each.name for each in fields(ColumnsConfig) if each.name in found.names]
    columns = [_shown(found.names[key]) for key in keys]
    place = f"column {columns[0]}"
    if len(columns) > 1:
        place = f"the columns {', '.join(columns[:-1])} and {columns[-1]}"
    return f"data: recognised {found.what} in {place}" + (f"; {rest}" if rest else "")
