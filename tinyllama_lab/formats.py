"""Which column of a data set holds what, where the names of the columns say it plainly.

A column that is null in `data.columns` is looked for here; one that was typed is never changed.
As soon as the text itself was typed (prompt and response, messages, or text), nothing else is
guessed. `docs/data.md` lists the formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from tinyllama_lab.cells import (
    HELDOUT,
    SPLIT_COLUMNS,
    SPLIT_KEY,
    holds_splits,
    is_flag_name,
    says_both,
    split_word,
    unpacked,
)
from tinyllama_lab.columns import (
    CHATS,
    CONTEXTS,
    GROUPS,
    PROMPTS,
    RESPONSES,
    SYSTEMS,
    Columns,
    Records,
    holds_groups,
    is_named,
    listed,
    quoted,
    settings,
)
from tinyllama_lab.command import typed
from tinyllama_lab.config import ColumnsConfig, DataConfig
from tinyllama_lab.errors import DataError
from tinyllama_lab.turns import is_chat, turn_list
from tinyllama_lab.unfit import CHAT, PAIR, TEXT, refusal, unfit, with_media


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
    table = Finder(records, data)
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
        f"{quoted(data.columns.text or '')}); leave it out"
        for name, value in typed.items()
        if value and data.style == "text"
    ]


@dataclass(frozen=True)
class Found:
    """What was recognised: column names by their key in `data.columns`."""

    what: str
    names: dict[str, str]
    style: str | None = None


class Finder(Columns):
    """Finds the columns of a set that hold what is trained on."""

    def __init__(self, records: Records, data: DataConfig) -> None:
        super().__init__(records, data)
        self._data = data

    def found(self) -> Found:
        """What the columns hold.

        Raises:
            DataError: that cannot be told.
        """
        style = self._data.style
        if self._is_described:
            return Found("", {}, style="text" if "text" in self.given else None)
        finders = {CHAT: self._chat, PAIR: self._pair, TEXT: self._text}
        for kind in {"chat": (CHAT, PAIR, TEXT), "text": (TEXT,)}.get(style, (PAIR,)):
            found = finders[kind]()
            if found is not None:
                if style != "text" and (error := unfit(self, kind, found.names)):
                    raise error
                return replace(found, names={**found.names, **self._beside(found)})
        raise refusal(self)

    @property
    def _is_described(self) -> bool:
        """Whether the text itself was typed, so that nothing is guessed."""
        given, style = self.given.keys(), self._data.style
        if style == "text" or "text" in given:
            return "text" in given
        return "messages" in given or {"prompt", "response"} <= given

    def left_out(self) -> str:
        """Of a set whose columns were typed, those that would be used had they been typed too."""
        wanted = {"context": CONTEXTS, **self._wanted_beside(self._data.style)}
        if "messages" in self.given or self._data.style == "text":
            del wanted["context"]
        found = [
            (key, name)
            for key, spellings in wanted.items()
            if key not in self.given and key not in self.off
            for name in self.named(spellings)
            if self.cells(name) and self._fits(key, name)
        ]
        if not found and (flags := self._flags(self._data.style)):
            return f"data: not used: {quoted(flags[0])}, which may say what is held out"
        if not found and (media := with_media(self)):
            return f"data: not used: {quoted(media)}, which holds images, audio or video"
        if not found:
            return ""
        names = " and ".join(quoted(name) for _, name in found)
        words = settings({f"columns.{key}": name for key, name in found})
        return f"data: not used: {names}; to use it, add {words}"

    def _chat(self) -> Found | None:
        """A column of messages, with that of their answers where these stand apart.

        Nothing where a prompt or a response was typed.
        """
        if self.has_typed_part:
            return None
        chats = [name for name in self.named(CHATS) if self.mostly(name, is_chat)]
        if len(chats) > 1:
            raise self._ambiguous("messages", chats)
        if not chats:
            return None
        if len(answers := self.answers(chats[0])) == 1:
            return Found("conversations", {"prompt": chats[0], "response": answers[0]})
        first = next(turn_list(cell) for cell in self.cells(chats[0]) if is_chat(cell))
        shared = any("from" in turn for turn in first or ())
        what = "ShareGPT conversations" if shared else "chat messages"
        return Found(what, {"messages": chats[0]})

    def _pair(self) -> Found | None:
        """A prompt and a response, and a context where there is one."""
        context = self._context()
        prompts = [n for n in self.named(PROMPTS) if n != context and self.is_text(n)]
        if any(is_named(name, "instruction") for name in prompts):
            prompts = [name for name in prompts if not is_named(name, "input")]
        candidates = {
            "prompt": prompts,
            "response": [n for n in self.named(RESPONSES) if self.is_text(n)],
        }
        names = {}
        for key, columns in candidates.items():
            columns = [self.given[key]] if key in self.given else columns
            if not columns:
                return None
            if len(columns) > 1:
                raise self._ambiguous(key, columns)
            names[key] = columns[0]
        if context:
            names["context"] = context
        chats = [self.mostly(name, is_chat) for name in (names["prompt"], names["response"])]
        what = "conversations" if any(chats) else "prompts and responses"
        if is_named(names["prompt"], "instruction") and is_named(names["response"], "output"):
            what = "Alpaca rows"
        return Found(what, {k: name for k, name in names.items() if k not in self.given})

    def _context(self) -> str | None:
        """`context`, or the `input` of an instruction."""
        if "context" in self.given or "context" in self.off:
            return None
        names = self.named(CONTEXTS)
        if self.named(("instruction",)) or is_named(self.given.get("prompt"), "instruction"):
            names += self.named(("input",))
        names = [name for name in names if self.is_text(name, or_empty=True)]
        if len(names) > 1:
            raise self._ambiguous("context", names)
        return names[0] if names else None

    def _text(self) -> Found | None:
        """One ready-made text."""
        if self._data.style == "chat" and self.has_typed_part:
            return None
        texts = [name for name in self.named(("text",)) if self.is_text(name)]
        if len(texts) != 1:
            return None
        return Found("ready-made text", {"text": texts[0]}, style="text")

    def _beside(self, found: Found) -> dict[str, str]:
        """What may stand beside the text: a system turn, tools, a split, a group."""
        names: dict[str, str] = {}
        style = found.style or self._data.style
        for key, spellings in self._wanted_beside(style).items():
            columns = [name for name in self.named(spellings) if self._fits(key, name)]
            if key == "group":  # the fewest groups keep the most together
                columns = sorted(columns, key=lambda name: len({*map(str, self.all_cells(name))}))
            elif len(columns) > 1:
                raise self._ambiguous(key, columns)
            if columns and key not in self.given and key not in self.off:
                names[key] = columns[0]
        flags = self._flags(style)
        if flags and "split" not in names:
            raise DataError(
                "data.columns.split must name a column that says of every row whether it is train "
                f"or test, got a set whose {quoted(flags[0])} may say so by true and false; add "
                "such a column, or set data.columns.split='' to hold rows out by their content"
            )
        return names

    def _flags(self, style: str) -> list[str]:
        """Columns that may say by true and false what is held out, where nothing else says it."""
        if "split" not in self._wanted_beside(style).keys() - {*self.given, *self.off}:
            return []
        names = filter(is_flag_name, self.names)
        return [name for name in names if says_both(self.all_cells(name))]

    def _wanted_beside(self, style: str) -> dict[str, tuple[str, ...]]:
        has_own = self._data.eval_path or self._data.eval_split  # held-out rows of their own
        spellings: dict[str, tuple[str, ...]] = {}
        if not has_own:  # whose columns need not be the same
            spellings = {"split": SPLIT_COLUMNS, "group": GROUPS}
        if style == "chat":
            spellings |= {"system": SYSTEMS, "tools": ("tools",)}
        return spellings

    def _fits(self, key: str, name: str) -> bool:
        cells = self.cells(name)
        if key == "split":
            return holds_splits(name, self.all_cells(name))
        if key == "group":
            return holds_groups(self.all_cells(name)) and not self._is_marked()
        if key == "tools":
            return any(isinstance(unpacked(cell), list | dict) for cell in cells)
        return self.is_text(name)

    def _is_marked(self) -> bool:
        """Whether a column or the names of files say which rows are held out."""
        free = [] if "split" in self.off else self.named(SPLIT_COLUMNS)
        found = [name for name in free if self._fits("split", name)]
        names = [self.given["split"]] if "split" in self.given else [*found, SPLIT_KEY]
        return any(
            split_word(str(cell)) == HELDOUT for name in names for cell in self.all_cells(name)
        )

    def _ambiguous(self, key: str, names: Sequence[str]) -> DataError:
        one = " or ".join(typed(f"data.columns.{key}", name) for name in names)
        several = " and ".join(map(quoted, names))
        return DataError(
            f"data.columns.{key} must name one column, got a set where {several} could be it; "
            f"type {one}"
        )


def _line(found: Found, unused: Sequence[str]) -> str:
    rest = [f"not used: {listed(unused)}"] if unused else []
    if "group" in found.names:
        rest = [f"rows of one {quoted(found.names['group'])} stay on one side", *rest]
    keys = [each.name for each in fields(ColumnsConfig) if each.name in found.names]
    columns = [quoted(found.names[key]) for key in keys if key != "group"]
    place = f"column {columns[0]}"
    if len(columns) > 1:
        place = f"the columns {', '.join(columns[:-1])} and {columns[-1]}"
    return "; ".join([f"data: recognised {found.what} in {place}", *rest])
