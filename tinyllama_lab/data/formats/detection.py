"""Detects which columns of a data set hold the prompt, the response and so on, by their names.

Only columns that are null in `data.columns` are detected; one that the user typed never changes.
If the text itself is typed (prompt and response, messages, or text), only the columns besides it
are detected: a split, a group, a system turn and tools. `docs/data.md` lists all formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import median

from tinyllama_lab.config.command import typed
from tinyllama_lab.config.schema import ColumnsConfig, DataConfig
from tinyllama_lab.data.formats.cells import (
    HELDOUT,
    SPLIT_COLUMNS,
    SPLIT_KEY,
    has_true_and_false,
    is_flag_name,
    is_split_column,
    parsed_cell,
    split_word,
)
from tinyllama_lab.data.formats.columns import (
    CHATS,
    CONTEXTS,
    GROUPS,
    NON_CONTEXT_WORDS,
    PAIRED,
    PROMPTS,
    RESPONSES,
    SYSTEMS,
    Columns,
    Records,
    has_name,
    is_group_column,
    listed,
    quoted,
    settings,
    words_of,
)
from tinyllama_lab.data.formats.turns import is_chat, is_pairs, turn_list
from tinyllama_lab.data.formats.unfit import CHAT, LISTS, PAIR, TEXT, refusal, unfit, with_media
from tinyllama_lab.errors import DataError

_EXTRAS = {"split": "the split", "group": "groups", "system": "system turns", "tools": "tools"}
_PAIR = {"prompt": "prompts", "response": "responses", "context": "contexts"}
_LABELS = {**_EXTRAS, **_PAIR, "messages": "the messages"}
NESTED, QA_PAIRS = "nested", "turns"  # chats in objects; chats as lists of pairs
_MIN_CONTEXT_LENGTH = 40  # characters, as the median of a column


def recognise(records: Records, data: DataConfig) -> tuple[DataConfig, str]:
    """Fill in the columns that are null, and describe in one line what was recognised.

    Returns:
        The configuration with its columns, and with `style=text` if the set is ready-made text;
        and the line, which is empty if there is nothing to say.

    Raises:
        DataError: the columns cannot be identified; the message says what to type.
    """
    if not records:
        return data, ""
    detector = ColumnDetector(records, data)
    detection = detector.detect()
    columns = asdict(data.columns)
    filled = {key: detection.names.get(key, columns[key]) for key in columns}
    resolved = replace(
        data, columns=replace(data.columns, **filled), style=detection.style or data.style
    )
    problems = [*resolved.problems(), *_without_effect(resolved)]
    if problems:
        raise DataError(*problems)
    return resolved, _summary(detector, detection, resolved)


def _without_effect(data: DataConfig) -> list[str]:
    """Return a problem for each chat setting that has no effect on ready-made text."""
    typed = {"system": data.system, "date": data.date, "learn": data.learn != "all" and data.learn}
    return [
        f"data.{name}={value} has no effect on ready-made text (column "
        f"{quoted(data.columns.text or '')}); leave it out"
        for name, value in typed.items()
        if value and data.style == "text"
    ]


@dataclass(frozen=True)
class Detection:
    """What was recognised.

    Attributes:
        description: what the set holds, such as "chat messages"; empty if the user typed a part.
        names: the recognised columns, by their key in `data.columns`.
        style: the `data.style` that the set requires; None to keep the configured one.
    """

    description: str
    names: dict[str, str]
    style: str | None = None


class ColumnDetector(Columns):
    """Detects the columns of a set that hold what is trained on."""

    def __init__(self, records: Records, data: DataConfig) -> None:
        super().__init__(records, data)
        self._data = data

    def detect(self) -> Detection:
        """Return what the columns hold.

        The kinds of sets are tried in a fixed order: chats, pairs and text by the names of
        columns, then chats in columns of any name.

        Raises:
            DataError: nothing was recognised, several columns fit, or the set is unfit.
        """
        style = self._data.style
        if self._data.has_text:
            undetected = Detection("", {}, style="text" if "text" in self.configured else None)
            extras = self._extra_columns(undetected) if self._data.awaits_columns else {}
            return replace(undetected, names={**extras, **self._nested_in_typed()})
        finders = {CHAT: self._chat, PAIR: self._pair, TEXT: self._text, LISTS: self._lists}
        finders |= {NESTED: self._nested, QA_PAIRS: self._qa_pairs}
        for kind in {"chat": tuple(finders), "text": (TEXT,)}.get(style, (PAIR,)):
            detection = finders[kind]()
            if detection is not None:
                # to the kinds of unfit sets, chats in objects and pairs are chats of any name
                known = LISTS if kind in (NESTED, QA_PAIRS) else kind
                if style != "text" and (error := unfit(self, known, detection.names)):
                    raise error
                extras = self._extra_columns(detection)
                return replace(detection, names={**detection.names, **extras})
        raise refusal(self)

    def _chat(self) -> Detection | None:
        """Return a column of messages by its name, with that of their answers if there is one.

        Returns:
            None if there is no such column, or if a prompt or a response was typed.
        """
        if self.is_pair_configured:
            return None
        chats = [name for name in self.with_name(CHATS) if self.holds_chats(name)]
        if len(chats) > 1:
            raise self._ambiguous("messages", chats)
        return self._conversations(chats[0]) if chats else None

    def _lists(self) -> Detection | None:
        """Return the only column that holds chats, whatever its name."""
        chats = [] if self.is_pair_configured else self.chats
        return self._conversations(chats[0]) if len(chats) == 1 else None

    def _nested(self) -> Detection | None:
        """Return the only chats in the objects of a column, if they hold their answers."""
        paths = [] if self.is_pair_configured else self.nested_chats
        if len(paths) != 1 or self.holds_unanswered(paths[0]):
            return None
        return self._conversations(paths[0])

    def _nested_in_typed(self) -> dict[str, str]:
        """Return the path of the messages in the objects of a column that was typed for them."""
        name = self.configured.get("messages", "")
        paths = [] if not name or self.holds_chats(name) else self.chats_in(name)
        if len(paths) > 1:
            raise self._ambiguous("messages", paths)
        return {"messages": paths[0]} if paths else {}

    def _qa_pairs(self) -> Detection | None:
        """Return the only column of `[question, answer]` pairs, if there is no text besides it."""
        names = [name for name in self.with_name(PAIRED) if self.mostly(name, is_pairs)]
        texts = {*self.with_name((*PROMPTS, *RESPONSES)), *self.prose_columns()} - {*names}
        if len(names) != 1 or texts or self.is_pair_configured:
            return None
        return Detection("pairs of question and answer", {"messages": names[0]})

    def _conversations(self, name: str) -> Detection:
        """Return a column of chats, with the column of their answers if there is one."""
        if len(answers := self.answer_columns(name)) == 1:
            return Detection("conversations", {"prompt": name, "response": answers[0]})
        first = next(turn_list(cell) for cell in self.cells(name) if is_chat(parsed_cell(cell)))
        is_sharegpt = any("from" in turn for turn in first or ())
        description = "ShareGPT conversations" if is_sharegpt else "chat messages"
        return Detection(description, {"messages": name})

    def _pair(self) -> Detection | None:
        """Return a prompt and a response, with a context if there is one."""
        context = self._context()
        prompts = [n for n in self.with_name(PROMPTS) if n != context and self.is_text(n)]
        # next to an instruction, `input` is the context, not a second prompt
        if any(has_name(name, "instruction") for name in prompts):
            prompts = [name for name in prompts if not has_name(name, "input")]
        candidates = {
            "prompt": prompts,
            "response": [n for n in self.with_name(RESPONSES) if self.is_text(n)],
        }
        names = {}
        for key, columns in candidates.items():
            columns = [self.configured[key]] if key in self.configured else columns
            if not columns:
                return None
            if len(columns) > 1:
                raise self._ambiguous(key, columns)
            names[key] = columns[0]
        if context:
            names["context"] = context
        chats = [self.mostly(name, is_chat) for name in (names["prompt"], names["response"])]
        description = "conversations" if any(chats) else "prompts and responses"
        if has_name(names["prompt"], "instruction") and has_name(names["response"], "output"):
            description = "Alpaca rows"
        # with a typed part, the summary names each recognised column instead
        if candidates.keys() & self.configured.keys():
            description = ""
        detected = {k: name for k, name in names.items() if k not in self.configured}
        return Detection(description, detected)

    def _context(self) -> str | None:
        """Return the context column: `context`, or the `input` of an instruction."""
        if "context" in self.configured or "context" in self.disabled:
            return None
        names = self.with_name(CONTEXTS)
        prompt = self.configured.get("prompt")
        if self.with_name(("instruction",)) or has_name(prompt, "instruction"):
            names += self.with_name(("input",))
        names = [name for name in names if self.is_text(name, or_empty=True)]
        if len(names) > 1:
            raise self._ambiguous("context", names)
        return names[0] if names else None

    def _text(self) -> Detection | None:
        """Return a column of ready-made text."""
        if self._data.style == "chat" and self.is_pair_configured:
            return None
        texts = [name for name in self.with_name(("text",)) if self.is_text(name)]
        if len(texts) != 1:
            return None
        return Detection("ready-made text", {"text": texts[0]}, style="text")

    def _extra_columns(self, detection: Detection) -> dict[str, str]:
        """Return the columns besides the text: a system turn, tools, a split and a group.

        Raises:
            DataError: several columns fit, or a column such as `is_test` may say by true and false
                what is held out.
        """
        names: dict[str, str] = {}
        style = detection.style or self._data.style
        for key, spellings in self._extra_spellings(style).items():
            if key in self.configured or key in self.disabled:
                continue
            columns = [name for name in self.with_name(spellings) if self._fits(key, name)]
            if key == "group":  # the column with the fewest groups keeps the most rows together
                columns = sorted(columns, key=lambda name: len({*map(str, self.all_cells(name))}))
            elif len(columns) > 1:
                raise self._ambiguous(key, columns)
            if columns:
                names[key] = columns[0]
        flags = self._boolean_split_columns(style)
        if flags and "split" not in names:
            raise DataError(
                "data.columns.split must name a column that holds train or test for every row, "
                f"got a set whose {quoted(flags[0])} may hold this as true and false; add such a "
                f"column, or set data.columns.split='' to ignore {quoted(flags[0])}: then rows "
                "that it marks are trained on as well"
            )
        return names

    def _boolean_split_columns(self, style: str) -> list[str]:
        """Return columns such as `is_test`; none if the split is known or not needed."""
        if "split" not in self._extra_spellings(style).keys() - {*self.configured, *self.disabled}:
            return []
        names = filter(is_flag_name, self.names)
        return [name for name in names if has_true_and_false(self.all_cells(name))]

    def _extra_spellings(self, style: str) -> dict[str, tuple[str, ...]]:
        """Return the names to look for besides the text, by their key in `data.columns`."""
        has_held_out_source = self._data.eval_path or self._data.eval_split
        spellings: dict[str, tuple[str, ...]] = {}
        if not has_held_out_source:  # held-out rows of another source may have other columns
            spellings = {"split": SPLIT_COLUMNS, "group": GROUPS}
        if style == "chat":
            spellings |= {"system": SYSTEMS, "tools": ("tools",)}
        return spellings

    def _fits(self, key: str, name: str) -> bool:
        """Return whether the cells of a column can be what its name says."""
        cells = self.cells(name)
        if key == "split":
            return is_split_column(name, self.all_cells(name))
        if key == "group":
            return is_group_column(self.all_cells(name)) and not self._has_held_out_rows()
        if key == "tools":
            return any(isinstance(parsed_cell(cell), list | dict) for cell in cells)
        return self.is_text(name)

    def _has_held_out_rows(self) -> bool:
        """Return whether a column, or the names of files, say which rows are held out."""
        candidates = [] if "split" in self.disabled else self.with_name(SPLIT_COLUMNS)
        split_columns = [name for name in candidates if self._fits("split", name)]
        configured = self.configured.get("split")
        names = [configured] if configured else [*split_columns, SPLIT_KEY]
        return any(
            split_word(str(cell)) == HELDOUT for name in names for cell in self.all_cells(name)
        )

    def _ambiguous(self, key: str, names: Sequence[str]) -> DataError:
        """Return the error for several columns that fit one key."""
        choices = " or ".join(typed(f"data.columns.{key}", name) for name in names)
        several = " and ".join(map(quoted, names))
        return DataError(
            f"data.columns.{key} must name one column, got a set where {several} could be it; "
            f"type {choices}"
        )

    def is_context(self, name: str, pair: tuple[str, str]) -> bool:
        """Return whether a column holds long texts that may belong in the prompt.

        A column that contains the prompt and the response is a copy of them, not a context.
        """
        if name in self.with_name(CONTEXTS):
            return self.is_text(name)
        texts = [str(cell) for cell in self.cells(name)]
        if not self.is_text(name) or words_of(name) & NON_CONTEXT_WORDS or len(set(texts)) < 2:
            return False
        copies = sum(
            all(str(row.get(key) or "") in str(row.get(name)) for key in pair)
            for row in self._sample
        )
        return median(map(len, texts)) >= _MIN_CONTEXT_LENGTH and 2 * copies < len(self._sample)


def _summary(detector: ColumnDetector, detection: Detection, data: DataConfig) -> str:
    """Return one line: what was recognised, what is not used, and what to type to use it."""
    filled = asdict(data.columns)
    used = {name for name in (*filled.values(), data.balance_by) if name}
    # a path such as `chat.messages` uses the column `chat`
    used |= {name.partition(".")[0] for name in used - {*detector.names}}
    unused = [name for name in detector.names if name not in used]
    parts = [_recognised_part(detection)] if detection.names else []
    if "group" in detection.names:
        parts.append(
            f"rows with the same {quoted(detection.names['group'])} stay on one side of the split"
        )
    if unused and not data.kind.package_file:  # the user did not choose the columns of that set
        media = with_media(detector)
        names = [f"{n} (images, audio or video)" if n == media else n for n in unused]
        parts.append(f"not used: {listed(names)}")
    pair = data.columns.prompt, data.columns.response
    has_place = data.style in ("chat", "instruction_response") and filled["context"] is None
    if pair[0] and pair[1] and has_place and not detector.holds_chats(pair[0]):
        context = next((n for n in unused if detector.is_context(n, (pair[0], pair[1]))), None)
        if context:
            way = settings({"columns.context": context})
            parts.append(f"if {quoted(context)} belongs in the prompt, add {way}")
    return f"data: {'; '.join(parts)}" if parts else ""


def _recognised_part(detection: Detection) -> str:
    """Return what was recognised, with the names of the columns."""
    keys = [field.name for field in fields(ColumnsConfig) if field.name in detection.names]
    if not detection.description:
        extras = [f"{_LABELS[key]} in {quoted(detection.names[key])}" for key in keys]
        return f"recognised {' and '.join(extras)}, besides the columns that are set"
    columns = [quoted(detection.names[key]) for key in keys if key not in _EXTRAS]
    where = f"column {columns[0]}" if len(columns) == 1 else f"the columns {_join_and(columns)}"
    marks = [key for key in keys if key in _EXTRAS and key != "group"]  # `_summary` adds the group
    extras = [f"{_LABELS[key]} in {quoted(detection.names[key])}" for key in marks]
    return f"recognised {'; '.join([f'{detection.description} in {where}', *extras])}"


def _join_and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
