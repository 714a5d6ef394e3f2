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

_SPEAKER_NAMES = (
    *("role", "from", "speaker", "sender", "author", "sender_name"),
    *("user", "username", "name"),
)
_AMBIGUOUS_NAMES = ("user", "username", "name")  # which also call other things than speakers
_CONTENT_NAMES = ("text", "content", "message", "value", "utterance", "body")
_MESSAGE_EXAMPLE = '{"role": "user", "content": "..."}'
_MAX_LISTED_NAMES = 3  # in a message


def chatgpt(columns: Columns) -> str:
    """ChatGPT's own export: a tree of messages in each row."""
    trees = [name for name in columns.with_name(("mapping",)) if columns.mostly(name, _is_tree)]
    if not trees:
        return ""
    return (
        f"every row must be a list of messages, got an export of ChatGPT (column "
        f"{quoted(trees[0])} holds each conversation as a tree); follow 'parent' from "
        f"'current_node' back, and write the messages in order as one list 'messages' of "
        f"{_MESSAGE_EXAMPLE} in each row: 'author.role' is the role, 'content.parts' what is said"
    )


def unknown_speakers(columns: Columns) -> str:
    """Lists of messages by speakers whose roles are not known."""
    if len(columns.prose_columns()) > 1:
        return ""
    for name in columns.names:
        lists = [turn_list(cell) for cell in columns.cells(name)]
        messages = [m for turns in lists for m in turns or () if isinstance(m, Mapping)]
        speaker = _usual_key(messages, _SPEAKER_NAMES)
        content = _usual_key(messages, _CONTENT_NAMES)
        unknown = _unknown_names(message.get(speaker) for message in messages)
        if speaker in _AMBIGUOUS_NAMES and not _are_sentences(
            message.get(content) for message in messages
        ):
            continue
        if speaker and content and unknown:
            return (
                "messages must be by system, user, assistant or tool, or by a usual name for "
                f"these such as human or gpt, got {listed(unknown[:_MAX_LISTED_NAMES])}; in "
                f"{quoted(name)}, {quoted(speaker)} says who speaks and {quoted(content)} what is "
                f"said: write each message as {_MESSAGE_EXAMPLE}, with the role assistant for "
                "the one whose answers are to be learned"
            )
    return ""


def single_messages(columns: Columns) -> str:
    """One message of a conversation in each row."""
    contents = [name for name in columns.with_name(_CONTENT_NAMES) if columns.is_text(name)]
    speakers = [name for name in columns.with_name(_SPEAKER_NAMES) if _is_repeated(columns, name)]
    trees = [name for name in columns.available if _is_parent(name)]
    if not contents or not (speakers or trees):
        return ""
    unknown = _unknown_names(columns.cells(speakers[0])) if speakers else []
    names = (
        f", with the role assistant for the one of "
        f"{listed(unknown[:_MAX_LISTED_NAMES])} whose answers are to be learned"
        if unknown
        else ""
    )
    texts_alone = {"columns.text": contents[0], "style": "text"}
    return (
        f"every row must be a whole conversation, got one message in each (column "
        f"{quoted(contents[0])} beside {quoted((speakers or trees)[0])}); write the messages of "
        f'each conversation into one row, as {{"messages": [{_MESSAGE_EXAMPLE}, ...]}}{names}; '
        f"to learn the texts alone, type {settings(texts_alone)}"
    )


def _is_tree(cell: Any) -> bool:
    nodes = parsed_cell(cell)
    return isinstance(nodes, Mapping) and any(
        isinstance(node, Mapping) and {"message", "parent"} & node.keys()
        for node in nodes.values()
    )


def _is_parent(name: str) -> bool:
    return {"parent", "id"} <= words_of(name)


def _usual_key(messages: list[Mapping[Any, Any]], keys: tuple[str, ...]) -> str:
    """The first of some keys under which most messages hold something."""
    there = [key for key in keys if 2 * sum(bool(m.get(key)) for m in messages) > len(messages)]
    return next(iter(there), "")


def _are_sentences(cells: Iterable[Any]) -> bool:
    """Whether most cells are texts of several words."""
    are_sentences = [isinstance(cell, str) and " " in cell for cell in cells]
    return 2 * sum(are_sentences) > len(are_sentences)


def _speaker(cell: Any) -> str:
    """The name of who speaks, who may be an object; empty where there is none."""
    cell = to_python(cell)
    if isinstance(cell, Mapping):
        cell = next((cell[key] for key in ("role", "name", "username") if cell.get(key)), None)
    return "" if is_missing(cell) or isinstance(cell, list | dict) else str(cell).strip()


def _unknown_names(cells: Iterable[Any]) -> list[str]:
    """Speakers who are called by no role, the most frequent first."""
    names = Counter(filter(None, map(_speaker, cells)))
    return [name for name, _ in names.most_common() if name.casefold() not in ROLES]


def _is_repeated(columns: Columns, name: str) -> bool:
    """Whether values come twice, as speakers do; a sender of each row's own is no speaker."""
    speakers = list(filter(None, map(_speaker, columns.cells(name))))
    return bool(speakers) and 2 * len(set(speakers)) <= len(speakers) + 1
