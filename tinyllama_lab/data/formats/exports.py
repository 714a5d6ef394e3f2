"""Chats as messengers and assistants export them: what they are, and how to rewrite them.

A speaker with a name instead of a role stays unknown: only the user can say which of two people
the model should imitate.
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
_AMBIGUOUS_NAMES = ("user", "username", "name")  # these may name other things than speakers
_CONTENT_NAMES = ("text", "content", "message", "value", "utterance", "body")
_MESSAGE_EXAMPLE = '{"role": "user", "content": "..."}'
_MAX_LISTED = 3  # in an error message


def chatgpt(columns: Columns) -> str:
    """Describe an export of ChatGPT: a tree of messages in each row."""
    trees = [name for name in columns.with_name(("mapping",)) if columns.mostly(name, _is_tree)]
    if not trees:
        return ""
    return (
        f"every row must be a list of messages, got an export of ChatGPT (column "
        f"{quoted(trees[0])} holds each conversation as a tree); follow 'parent' from "
        f"'current_node' back, and write the messages in order as one list 'messages' of "
        f"{_MESSAGE_EXAMPLE} in each row: 'author.role' is the role, 'content.parts' the content"
    )


def unknown_speakers(columns: Columns) -> str:
    """Describe lists of messages whose speakers have no known role."""
    if len(columns.prose_columns()) > 1:  # probably a prompt and a response under other names
        return ""
    for name in columns.names:
        lists = [turn_list(cell) for cell in columns.cells(name)]
        messages = [m for turns in lists for m in turns or () if isinstance(m, Mapping)]
        speaker = _usual_key(messages, _SPEAKER_NAMES)
        content = _usual_key(messages, _CONTENT_NAMES)
        unknown = _unknown_names(message.get(speaker) for message in messages)
        has_sentences = _are_sentences(message.get(content) for message in messages)
        if speaker in _AMBIGUOUS_NAMES and not has_sentences:
            continue
        if speaker and content and unknown:
            return (
                "the role of a message must be system, user, assistant or tool, or a usual name "
                f"for one of these such as human or gpt, got {listed(unknown[:_MAX_LISTED])}; in "
                f"{quoted(name)}, {quoted(speaker)} holds the speaker and {quoted(content)} the "
                f"content; write each message as {_MESSAGE_EXAMPLE}, with the role assistant for "
                "the speaker to imitate"
            )
    return ""


def single_messages(columns: Columns) -> str:
    """Describe a set with a single message of a conversation in each row."""
    contents = [name for name in columns.with_name(_CONTENT_NAMES) if columns.is_text(name)]
    speakers = [name for name in columns.with_name(_SPEAKER_NAMES) if _is_repeated(columns, name)]
    trees = [name for name in columns.available if _is_parent(name)]
    if not contents or not (speakers or trees):
        return ""
    unknown = _unknown_names(columns.cells(speakers[0])) if speakers else []
    names = listed(unknown[:_MAX_LISTED])
    role = f", with the role assistant for the speaker to imitate ({names})" if unknown else ""
    texts_alone = {"columns.text": contents[0], "style": "text"}
    return (
        f"every row must be a whole conversation, got one message in each (column "
        f"{quoted(contents[0])} next to {quoted((speakers or trees)[0])}); write the messages of "
        f'each conversation into one row, as {{"messages": [{_MESSAGE_EXAMPLE}, ...]}}{role}; '
        f"to train on the texts alone, type {settings(texts_alone)}"
    )


def _is_tree(cell: Any) -> bool:
    """Return whether a cell is an object of messages that name their parents."""
    nodes = parsed_cell(cell)
    return isinstance(nodes, Mapping) and any(
        isinstance(node, Mapping) and {"message", "parent"} & node.keys()
        for node in nodes.values()
    )


def _is_parent(name: str) -> bool:
    """Return whether a column names the parent of a message, such as `parent_id`."""
    return {"parent", "id"} <= words_of(name)


def _usual_key(messages: list[Mapping[Any, Any]], keys: tuple[str, ...]) -> str:
    """Return the first of these keys that has a value in most messages; empty if none has."""
    usual_keys = [
        key for key in keys if 2 * sum(bool(m.get(key)) for m in messages) > len(messages)
    ]
    return next(iter(usual_keys), "")


def _are_sentences(cells: Iterable[Any]) -> bool:
    """Return whether most cells are strings of several words."""
    are_sentences = [isinstance(cell, str) and " " in cell for cell in cells]
    return 2 * sum(are_sentences) > len(are_sentences)


def _speaker(cell: Any) -> str:
    """Return the name of a speaker, who may be an object; empty if there is none."""
    cell = to_python(cell)
    if isinstance(cell, Mapping):
        cell = next((cell[key] for key in ("role", "name", "username") if cell.get(key)), None)
    return "" if is_missing(cell) or isinstance(cell, list | dict) else str(cell).strip()


def _unknown_names(cells: Iterable[Any]) -> list[str]:
    """Return the names of speakers without a known role, the most frequent first."""
    names = Counter(filter(None, map(_speaker, cells)))
    return [name for name, _ in names.most_common() if name.casefold() not in ROLES]


def _is_repeated(columns: Columns, name: str) -> bool:
    """Return whether values repeat, as those of speakers do.

    A sender who differs in each row, as in e-mails, is not a speaker in a conversation.
    """
    speakers = list(filter(None, map(_speaker, columns.cells(name))))
    return bool(speakers) and 2 * len(set(speakers)) <= len(speakers) + 1
