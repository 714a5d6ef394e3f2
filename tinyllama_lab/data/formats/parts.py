"""The content of a message: a text, or parts of which some are text.

Anthropic, OpenAI, Mistral and Gemini write a content as a list of parts. Text is joined, thinking
is passed over: the answer is what was said. A row that holds anything else in a message, such as
an image or the use of a tool, is unusable for a reason that names it.
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
NEWLY_READ = "newly read"  # a part that was no text before version 6 of `data.rendering`
_TEXT_TYPES = ("", "text", "input_text", "output_text")
_REFUSAL_TYPE = "refusal"
_THINKING_WORDS = frozenset({"thinking", "thought", "reasoning"})
_TOOL_WORDS = frozenset({"tool", "function", "call"})
_RESULT_WORDS = frozenset({"result", "output", "response"})
_NO_TEXT = "no_text_in_message"
_IGNORED_TYPES = ("token_budget",)  # what an app notes for itself; no part of what was said
_TYPE_KEYS = ("type", "content_type")  # the second: ChatGPT
_MIME_KEYS = ("mimeType", "mime_type")  # Gemini
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # of snake_case and camelCase
_MEDIA_WORDS = {  # the reason, and words of the types that it stands for
    "image_in_message": frozenset({"image"}),
    "audio_in_message": frozenset({"audio", "voice"}),
    "video_in_message": frozenset({"video"}),
    "document_in_message": frozenset({"document", "file", "pdf"}),
}


class Content(NamedTuple):
    """What a message says, and what was found beside its text."""

    text: str
    beside: frozenset[str] = frozenset()  # of `THINKING` and `NEWLY_READ`


def read_content(value: Any, may_be_object: bool) -> Content:
    """The text of a message; that of all its parts where it has parts.

    Args:
        may_be_object: anything that is no text becomes JSON, as what a tool returns.

    Raises:
        UnusableRow: `no_text_in_message`, or one that names what is in a part.
    """
    value = value if isinstance(value, str) else to_python(value)
    if isinstance(value, Mapping) and isinstance(to_python(value.get("parts")), list | tuple):
        value = to_python(value["parts"])  # ChatGPT
    try:
        if isinstance(value, list | tuple):
            parts = [_part(part) for part in value]
            beside = frozenset[str]().union(*(part.beside for part in parts))
            return Content("".join(part.text for part in parts), beside)
        return Content(_text(value, "the content of a message"))
    except UnusableRow:
        if may_be_object:
            return Content(as_json(value))
        raise


def is_list_of_parts(value: Any) -> bool:
    """Whether a cell is a list of objects that say by `type` which part of a message they are."""
    parts = to_python(value)
    return isinstance(parts, list | tuple) and any(
        isinstance(part, Mapping) and str(part.get("type")) in (*_TEXT_TYPES[1:], *_THINKING_WORDS)
        for part in parts
    )


def _part(part: Any) -> Content:
    """The text of one part, empty for thinking."""
    if isinstance(part, str) and not isinstance(part, Number):
        return Content(part)
    if not isinstance(part, Mapping):
        raise UnusableRow(_NO_TEXT, "a part of a message must be text or an object")
    text = _text_of(part)
    if text is None:
        return Content("", frozenset({THINKING}))
    return Content(text, frozenset() if _was_text(part) else frozenset({NEWLY_READ}))


def _text_of(part: Mapping[Any, Any]) -> str | None:
    """The text of a part that is an object; None for thinking."""
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
    what = f"a part of the type '{shown(name, 40)}'" if name else "a part that holds nothing"
    raise UnusableRow(_reason(name), f"a message has {what}")


def _was_text(part: Mapping[Any, Any]) -> bool:
    """Whether it was text before version 6 of `data.rendering`; with a null type it was not."""
    kind = part.get("type", "")
    return isinstance(kind, str) and kind in _TEXT_TYPES and isinstance(part.get("text"), str)


def _type(part: Mapping[Any, Any]) -> str:
    """What a part says it is; empty where it says nothing."""
    types = (str(part[key]) for key in _TYPE_KEYS if not is_missing(part.get(key)))
    return next(filter(None, types), "")


def _non_empty_names(part: Mapping[Any, Any]) -> str:
    """The keys that hold something, and what files among their values are.

    In a record of `datasets`, a part has the keys of all parts of its column, most of them null.
    """
    non_empty = {str(key): value for key, value in part.items() if _holds_something(value)}
    return " ".join((*non_empty, *filter(None, map(_file_kind, non_empty.values()))))


def _holds_something(value: Any) -> bool:
    """Whether a value is not missing; of an object, any of its values."""
    if isinstance(value, Mapping):
        return any(map(_holds_something, value.values()))
    return not is_missing(value)


def _file_kind(value: Any) -> str:
    """`image`, `audio`, `video` or `document` by the MIME type of a file; empty for no file."""
    types = [value.get(key) for key in _MIME_KEYS] if isinstance(value, Mapping) else []
    mime = next((kind for kind in types if isinstance(kind, str)), "")
    kind = mime.partition("/")[0].casefold()
    return kind if not kind or kind in ("image", "audio", "video") else "document"


def _text(value: Any, what: str) -> str:
    try:
        return as_text(value)
    except UnusableRow:
        raise UnusableRow(_NO_TEXT, f"{what} must be text") from None


def _reason(name: str) -> str:
    """The reason that names a part by the words of its type, or of its keys."""
    words = _words(name)
    if words & _TOOL_WORDS:
        return "tool_result_in_message" if words & _RESULT_WORDS else "tool_use_in_message"
    return next((reason for reason, media in _MEDIA_WORDS.items() if words & media), _NO_TEXT)


def _words(name: str) -> set[str]:
    """The words of a name in lower case and singular: `inputFiles` has `input` and `file`."""
    return {word.casefold().removesuffix("s") for word in _WORD.findall(name)}
