"""Chats as messengers and assistants export them: what holds what, and how to write them.

Speakers who are named and not called by a role stay unknown: nobody but the user can say which of
two people is to be learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tinyllama_lab.data.formats.cells import is_missing, parsed_cell, to_python
from tinyllama_lab.data.formats.columns import Columns, listed, quoted, settings, words_of
from tinyllama_lab.data.formats.turns import ROLES, turn_list

_SPEAKERS = (
    *("role", "from", "speaker", "sender", "author", "sender_name"),
    *("user", "username", "name"),
)
_NAMES = ("user", "username", "name")  # which also call other things than speakers
_SAYINGS = ("text", "content", "message", "value", "utterance", "body")
_WRITE = '{"role": "user", "content": "..."}'
_MOST_NAMES = 3  # in a message


def chatgpt(columns: Columns) -> str:
    """ChatGPT's own export: a tree of messages in each row."""
    trees = [name for name in columns.with_name(("mapping",)) if columns.mostly(name, _is_tree)]
    if not trees:
        return ""
    return (
        f"every row must be a list of messages, got an export of ChatGPT (column "
        f"{quoted(trees[0])} holds each conversation as a tree); follow 'parent' from "
        f"'current_node' back, and write the messages in order as one list 'messages' of {_WRITE} "
        "in each row: 'author.role' is the role, 'content.parts' what is said"
    )


def unknown_speakers(columns: Columns) -> str:
    """Lists of messages by speakers whose roles are not known."""
    if len(columns.prose_columns()) > 1:
        return ""
    for name in columns.names:
        lists = [turn_list(cell) for cell in columns.cells(name)]
        messages = [m for each in lists for m in each or () if isinstance(m, Mapping)]
        speaker, saying = _key(messages, _SPEAKERS), _key(messages, _SAYINGS)
        unknown = _unknown(message.get(speaker) for message in messages)
        if speaker in _NAMES and not _are_sentences(message.get(saying) for message in messages):
            continue
        if speaker and saying and unknown:
            return (
                "messages must be by system, user, assistant or tool, or by a usual name for "
                f"these such as human or gpt, got {listed(unknown[:_MOST_NAMES])}; in "
                f"{quoted(name)}, {quoted(speaker)} says who speaks and {quoted(saying)} what is "
                f"said: write each message as {_WRITE}, with the role assistant for the one "
                "whose answers are to be learned"
            )
    return ""


def single_messages(columns: Columns) -> str:
    """One message of a conversation in each row."""
    said = [name for name in columns.with_name(_SAYINGS) if columns.is_text(name)]
    speakers = [name for name in columns.with_name(_SPEAKERS) if _is_repeated(columns, name)]
    trees = [name for name in columns.available if _is_parent(name)]
    if not said or not (speakers or trees):
        return ""
    unknown = _unknown(columns.cells(speakers[0])) if speakers else []
    names = (
        f", with the role assistant for the one of {listed(unknown[:_MOST_NAMES])} whose answers "
        "are to be learned"
        if unknown
        else ""
    )
    return (
        f"every row must be a whole conversation, got one message in each (column "
        f"{quoted(said[0])} beside {quoted((speakers or trees)[0])}); write the messages of each "
        f'conversation into one row, as {{"messages": [{_WRITE}, ...]}}{names}; '
        f"to learn the texts alone, type {settings({'columns.text': said[0], 'style': 'text'})}"
    )


def _is_tree(cell: Any) -> bool:
    nodes = parsed_cell(cell)
    return isinstance(nodes, Mapping) and any(
        isinstance(node, Mapping) and {"message", "parent"} & node.keys()
        for node in nodes.values()
    )


def _is_parent(name: str) -> bool:
    return {"parent", "id"} <= words_of(name)


def _key(messages: list[Mapping[Any, Any]], keys: tuple[str, ...]) -> str:
    """The first of some keys under which most messages hold something."""
    there = [key for key in keys if 2 * sum(bool(m.get(key)) for m in messages) > len(messages)]
    return next(iter(there), "")


def _are_sentences(cells: Iterable[Any]) -> bool:
    """Whether most cells are texts of several words."""
    said = [isinstance(cell, str) and " " in cell for cell in cells]
    return 2 * sum(said) > len(said)


def _speaker(cell: Any) -> str:
    """The name of who speaks, who may be an object; empty where there is none."""
    cell = to_python(cell)
    if isinstance(cell, Mapping):
        cell = next((cell[key] for key in ("role", "name", "username") if cell.get(key)), None)
    return "" if is_missing(cell) or isinstance(cell, list | dict) else str(cell).strip()


def _unknown(cells: Iterable[Any]) -> list[str]:
    """Speakers who are called by no role, the most frequent first."""
    names = Counter(filter(None, map(_speaker, cells)))
    return [name for name, _ in names.most_common() if name.casefold() not in ROLES]


def _is_repeated(columns: Columns, name: str) -> bool:
    """Whether values come twice, as speakers do; a sender of each row's own is no speaker."""
    speakers = list(filter(None, map(_speaker, columns.cells(name))))
    return bool(speakers) and 2 * len(set(speakers)) <= len(speakers) + 1
