"""The content of a message: a text, or parts of which some are text.

Anthropic, OpenAI, Mistral and Gemini write a content as a list of parts. Text is joined, thinking
is passed over: the answer is what was said. A row that holds anything else in a message, such as
an image or the use of a tool, is unusable for a reason that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tinyllama_lab.cells import Number, UnusableRow, as_json, as_text, is_missing, plain
from tinyllama_lab.errors import shown

THINKING = "thinking"
NEWLY_READ = "newly read"  # a part that cost its row before version 6 of `data.rendering`
_TEXTS = ("", "text", "input_text", "output_text")
_REFUSAL = "refusal"
_THOUGHTS = ("thinking", "thought", "reasoning")
_TOOLS = ("tool", "function")
_RESULTS = ("result", "output", "response")
_OTHER = "no_text_in_message"
_BOOKKEEPING = ("token_budget",)  # what an app notes for itself; no part of what was said
_MEDIA = {  # the reason, and words of the types that it stands for
    "image_in_message": ("image",),
    "audio_in_message": ("audio", "voice"),
    "video_in_message": ("video",),
    "document_in_message": ("document", "file", "pdf"),
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
    value = value if isinstance(value, str) else plain(value)
    if isinstance(value, Mapping) and isinstance(plain(value.get("parts")), list | tuple):
        value = plain(value["parts"])  # ChatGPT
    try:
        if isinstance(value, list | tuple):
            parts = [_part(part) for part in value]
            found = frozenset[str]().union(*(part.beside for part in parts))
            return Content("".join(part.text for part in parts), found)
        return Content(_text(value, "the content of a message"))
    except UnusableRow:
        if may_be_object:
            return Content(as_json(value))
        raise


def is_list_of_parts(value: Any) -> bool:
    """Whether a cell is a list of objects that say by `type` which part of a message they are."""
    parts = plain(value)
    return isinstance(parts, list | tuple) and any(
        isinstance(part, Mapping) and str(part.get("type")) in (*_TEXTS[1:], *_THOUGHTS)
        for part in parts
    )


def _part(part: Any) -> Content:
    """The text of one part, empty for thinking."""
    if isinstance(part, str) and not isinstance(part, Number):
        return Content(part)
    if not isinstance(part, Mapping):
        raise UnusableRow(_OTHER, "a part of a message must be text or an object")
    kind = "" if is_missing(part.get("type")) else str(part["type"])
    text = part.get("text")
    if kind in _TEXTS and part.get("thought") is True:  # Gemini
        return Content("", frozenset({THINKING}))
    if kind in _TEXTS and isinstance(text, str):
        return Content(text)
    if kind in _TEXTS[1:]:
        return Content(_text(text, "the text of a part"), frozenset({NEWLY_READ}))
    if kind in _BOOKKEEPING:
        return Content("", frozenset({NEWLY_READ}))
    if kind == _REFUSAL:
        return Content(_text(part.get(kind), "a refusal"), frozenset({NEWLY_READ}))
    names = kind or str(part.get("content_type") or " ".join(map(str, part)))
    reason = _reason(names.casefold())
    if reason == _OTHER and any(word in names.casefold() for word in _THOUGHTS):
        return Content("", frozenset({THINKING}))
    raise UnusableRow(reason, f"a message has a part of the type '{shown(names, 40)}'")


def _text(value: Any, what: str) -> str:
    try:
        return as_text(value)
    except UnusableRow:
        raise UnusableRow(_OTHER, f"{what} must be text") from None


def _reason(names: str) -> str:
    """The reason that names a part by the words of its type, or of its keys."""
    if any(word in names for word in _TOOLS):
        is_result = any(word in names for word in _RESULTS)
        return "tool_result_in_message" if is_result else "tool_use_in_message"
    found = (reason for reason, words in _MEDIA.items() if any(word in names for word in words))
    return next(found, _OTHER)
