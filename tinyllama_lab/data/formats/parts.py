"""The content of a message: text, or parts of which some are text.

Anthropic, OpenAI, Mistral and Gemini store a content as a list of parts. The texts of the parts
are joined. Thinking is skipped: the model is trained on the answer alone. A message with any other
part, such as an image or a tool call, makes the row unusable for a reason that names the part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tinyllama_lab.data.formats.cells import (
    Number,
    UnusableRow,
    as_json,
    as_text,
    is_missing,
    to_python,
)
from tinyllama_lab.errors import shown

THINKING = "thinking"
# a part that was not read as text before version 6 of `data.rendering`
NEWLY_READ = "newly read"
# the empty type is that of a part without a type, as in Gemini
_TEXT_TYPES = ("", "text", "input_text", "output_text")
_REFUSAL_TYPE = "refusal"
_THINKING_WORDS = frozenset({"thinking", "thought", "reasoning"})
_TOOL_WORDS = frozenset({"tool", "function", "call"})
_RESULT_WORDS = frozenset({"result", "output", "response"})
_NO_TEXT = "no_text_in_message"
_IGNORED_TYPES = ("token_budget",)  # notes of an app, not part of the text
_TYPE_KEYS = ("type", "content_type")  # `content_type`: exports of ChatGPT
_MIME_KEYS = ("mimeType", "mime_type")  # Gemini
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # in snake_case and camelCase
_MEDIA_WORDS = {  # by reason, words of the types that it covers
    "image_in_message": frozenset({"image"}),
    "audio_in_message": frozenset({"audio", "voice"}),
    "video_in_message": frozenset({"video"}),
    "document_in_message": frozenset({"document", "file", "pdf"}),
}


class Content(NamedTuple):
    """The text of a message, and what else the message has.

    Attributes:
        text: the joined text of all parts.
        extras: `THINKING` if parts were skipped, `NEWLY_READ` if parts are read otherwise than
            before version 6 of `data.rendering`.
    """

    text: str
    extras: frozenset[str] = frozenset()  # of `THINKING` and `NEWLY_READ`


def read_content(value: Any, may_be_object: bool) -> Content:
    """Return the text of a message.

    Args:
        may_be_object: convert a value that is not text to JSON, as for the result of a tool.

    Raises:
        UnusableRow: `no_text_in_message`, or a reason that names the unusable part.
    """
    value = value if isinstance(value, str) else to_python(value)
    if isinstance(value, Mapping) and isinstance(to_python(value.get("parts")), list | tuple):
        value = to_python(value["parts"])  # exports of ChatGPT
    try:
        if isinstance(value, list | tuple):
            parts = [_part(part) for part in value]
            extras = frozenset[str]().union(*(part.extras for part in parts))
            return Content("".join(part.text for part in parts), extras)
        return Content(_text(value, "the content of a message"))
    except UnusableRow:
        if may_be_object:
            return Content(as_json(value))
        raise


def is_list_of_parts(value: Any) -> bool:
    """Return whether a cell is a list of parts: objects whose `type` is text or thinking."""
    parts = to_python(value)
    return isinstance(parts, list | tuple) and any(
        isinstance(part, Mapping) and str(part.get("type")) in (*_TEXT_TYPES[1:], *_THINKING_WORDS)
        for part in parts
    )


def _part(part: Any) -> Content:
    """Return the content of one part; empty for thinking.

    Raises:
        UnusableRow: the part is neither text nor thinking.
    """
    if isinstance(part, str) and not isinstance(part, Number):
        return Content(part)
    if not isinstance(part, Mapping):
        raise UnusableRow(_NO_TEXT, "a part of a message must be text or an object")
    text = _text_of(part)
    if text is None:
        return Content("", frozenset({THINKING}))
    return Content(text, frozenset() if _was_text(part) else frozenset({NEWLY_READ}))


def _text_of(part: Mapping[Any, Any]) -> str | None:
    """Return the text of a part that is an object; None for thinking.

    Raises:
        UnusableRow: the part is neither text nor thinking.
    """
    kind = "" if is_missing(part.get("type")) else str(part["type"])
    text = part.get("text")
    if kind in _TEXT_TYPES and to_python(part.get("thought")) is True:  # Gemini
        return None
    if kind in _TEXT_TYPES and isinstance(text, str):
        return text
    if kind in _TEXT_TYPES[1:]:
        return _text(text, "the text of a part")
    if kind in _IGNORED_TYPES:
        return ""
    if kind == _REFUSAL_TYPE:
        return _text(part.get(kind), "a refusal")
    if _words(_type(part)) & _THINKING_WORDS and _reason(_type(part)) == _NO_TEXT:
        return None
    name = _type(part) or _non_empty_names(part)
    description = f"a part of the type '{shown(name, 40)}'" if name else "an empty part"
    raise UnusableRow(_reason(name), f"a message has {description}")


def _was_text(part: Mapping[Any, Any]) -> bool:
    """Return whether a part was read as text before version 6 of `data.rendering`."""
    kind = part.get("type", "")
    return isinstance(kind, str) and kind in _TEXT_TYPES and isinstance(part.get("text"), str)


def _type(part: Mapping[Any, Any]) -> str:
    """Return the type that a part states; empty if it states none."""
    types = (str(part[key]) for key in _TYPE_KEYS if not is_missing(part.get(key)))
    return next(filter(None, types), "")


def _non_empty_names(part: Mapping[Any, Any]) -> str:
    """Return the keys of a part that have a value, and the kinds of files among the values.

    In a record of `datasets`, a part has the keys of all parts of its column, most of them null.
    """
    non_empty = {str(key): value for key, value in part.items() if _holds_something(value)}
    return " ".join((*non_empty, *filter(None, map(_file_kind, non_empty.values()))))


def _holds_something(value: Any) -> bool:
    """Return whether a value is not missing; for an object, whether any of its values is not."""
    if isinstance(value, Mapping):
        return any(map(_holds_something, value.values()))
    return not is_missing(value)


def _file_kind(value: Any) -> str:
    """Return `image`, `audio`, `video` or `document` by a MIME type; empty for no file."""
    types = [value.get(key) for key in _MIME_KEYS] if isinstance(value, Mapping) else []
    mime = next((kind for kind in types if isinstance(kind, str)), "")
    kind = mime.partition("/")[0].casefold()
    return kind if not kind or kind in ("image", "audio", "video") else "document"


def _text(value: Any, label: str) -> str:
    """Return a value as text.

    Raises:
        UnusableRow: `no_text_in_message`; `label` names the value for the user.
    """
    try:
        return as_text(value)
    except UnusableRow:
        raise UnusableRow(_NO_TEXT, f"{label} must be text") from None


def _reason(name: str) -> str:
    """Return the reason for an unusable part by the words of its type, or of its keys."""
    words = _words(name)
    if words & _TOOL_WORDS:
        return "tool_result_in_message" if words & _RESULT_WORDS else "tool_use_in_message"
    return next((reason for reason, media in _MEDIA_WORDS.items() if words & media), _NO_TEXT)


def _words(name: str) -> set[str]:
    """Return the words of a name, in lower case and singular: `inputFiles` has `input`, `file`."""
    return {word.casefold().removesuffix("s") for word in _WORD.findall(name)}
