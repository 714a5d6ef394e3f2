"""The turns of a chat, from the spellings that are in use to one.

OpenAI's `role` and `content`, ShareGPT's `from` and `value`, exported chats such as `sender` and
`text`, weights of single turns, and tool calls; `parts.py` reads contents in parts. What a turn
cannot say is no error: the row is unusable, for a reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tinyllama_lab.data.formats.cells import (
    Number,
    UnusableRow,
    as_json,
    as_text,
    is_blank,
    is_missing,
    parsed_cell,
    to_python,
)
from tinyllama_lab.data.formats.parts import THINKING, read_content

_ROLE_SPELLINGS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": (
        *("assistant", "gpt", "chatgpt", "ai", "bot", "chatbot", "model"),
        *("bard", "bing", "claude", "llm"),
    ),
    "tool": ("tool", "function", "observation", "tool_response", "function_response", "ipython"),
    "tool_call": ("function_call", "tool_call"),
}
ROLES = {name: role for role, names in _ROLE_SPELLINGS.items() for name in names}
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "parts")
# keys of exported chats; a role key of these counts where it holds a role that is known
EXPORT_ROLE_KEYS = ("sender", "author", "speaker", "type", "name")
EXPORT_CONTENT_KEYS = ("text", "message", "body")
# 0 or false: read, not learned (OpenAI and Mistral; Axolotl; ms-swift)
WEIGHT_KEYS = ("weight", "train", "loss", "loss_mask")
_ZERO, _ONE = ("0", "0.0", "false"), ("1", "1.0", "true")
_CONTENT_OR_CALL_KEYS = (*CONTENT_KEYS, "tool_calls", "function_call")
_MAX_LISTED_KEYS = 8  # in a message to the user
_ATTACHMENT_KEYS = ("attachments", "files")  # Claude
_TEMPLATE_KEYS = {"tool": ("name", "tool_call_id"), "assistant": ("reasoning_content", "thinking")}


@dataclass(frozen=True, order=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str
    supervised: bool = True  # false for an assistant turn that the data gives the weight 0
    extra: str = ""  # its other keys that a chat template may read (tool calls), as JSON
    # what was found beside its text, as `parts.py` names it
    beside: frozenset[str] = field(default=frozenset(), compare=False)
    has_attachments: bool = field(default=False, compare=False)  # which are not used

    @property
    def has_thinking(self) -> bool:
        """Whether parts of it are thinking, which is not used."""
        return THINKING in self.beside

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing and calls no tool."""
        return is_blank(self.content) and "tool_calls" not in json.loads(self.extra or "{}")


class Chat(NamedTuple):
    """The turns of a chat up to its last assistant turn; none where a row is no chat."""

    turns: tuple[Turn, ...] = ()
    is_cut: bool = False  # whether others followed
    is_newly_read: bool = False  # whether it was read otherwise before `data.rendering=6`


def read_turns(value: Any) -> Chat:
    """The turns of a chat up to its last assistant turn.

    Raises:
        UnusableRow: `empty_chat`, `bad_messages`, `unknown_role`, `no_user_turn`,
            `no_assistant_turn`, `bad_weight`, `bad_tool_call`, `empty_prompt`,
            `empty_response`, `empty_turn` (an assistant turn in the middle), `not_text` (of a
            weight), or what `read_content` says.
    """
    try:
        turns = [_turn(message) for message in messages_of(value)]
    except RecursionError:
        raise UnusableRow("bad_messages", "a message is nested too deeply") from None
    is_newly_read = any(turn.beside for turn in turns)
    turns = [turn for turn in turns if turn.role != "system" or not is_blank(turn.content)]
    last = max((n for n, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if last < 0:
        raise UnusableRow("no_assistant_turn")
    asked = tuple(turns[: last + 1])
    if not any(turn.role == "user" for turn in asked):
        raise UnusableRow("no_user_turn")
    for number, turn in enumerate(asked):
        if turn.role in ("user", "assistant") and turn.is_empty:
            middle = "empty_turn" if turn.role == "assistant" else "empty_prompt"
            raise UnusableRow("empty_response" if number == last else middle)
    return Chat(asked, last + 1 < len(turns), is_newly_read)


def messages_of(value: Any) -> list[Mapping[Any, Any]]:
    """The messages of a cell, one for each that speaks.

    Raises:
        UnusableRow: `empty_chat` or `bad_messages`.
    """
    messages: list[Mapping[Any, Any]] = []
    if is_pairs(value):
        spoken = (zip(("user", "assistant"), p, strict=True) for p in turn_list(value) or ())
        return [{"role": r, "content": t} for p in spoken for r, t in p if not is_missing(t)]
    for message in turn_list(value) or ():
        if not isinstance(message, Mapping):
            raise UnusableRow("bad_messages", "a message must be an object")
        if _is_keyed_by_role(message):
            messages += [{"role": role, "content": text} for role, text in message.items()]
        else:
            messages.append(message)
    if not messages and _is_empty_cell(value):
        raise UnusableRow("empty_chat")
    if not messages:
        raise UnusableRow("bad_messages", "a list of messages is needed")
    return messages


def turn_list(value: Any) -> list[Any] | None:
    """The messages of a cell: a list, its text, or an object of equally long lists."""
    value = parsed_cell(value)
    if isinstance(value, Mapping) and any(k in value for k in (*ROLE_KEYS, *EXPORT_ROLE_KEYS)):
        columns = {key: to_python(column) for key, column in value.items()}
        if all(isinstance(column, list) for column in columns.values()):
            cells = zip(*columns.values(), strict=False)
            return [dict(zip(columns, row, strict=True)) for row in cells]
    return list(value) if isinstance(value, list | tuple) else None


def is_chat(value: Any) -> bool:
    """Whether a cell holds messages: objects that name who speaks, and what is said.

    A list of other objects, such as an answer in JSON, is none: at least one role is known. Under
    the keys of exported chats, every role must be known, and a text is none.
    """
    messages = turn_list(value) or []
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        return False
    if all(_is_keyed_by_role(message) for message in messages):
        spoken = {ROLES[str(key).strip().casefold()] for m in messages for key in m}
        return {"user", "assistant"} <= spoken and not isinstance(value, str)
    if all(any(key in message for key in _CONTENT_OR_CALL_KEYS) for message in messages):
        if any(_role(_first_value(message, ROLE_KEYS)) for message in messages):
            return True
    return not isinstance(value, str) and _is_export(messages)


def is_pairs(value: Any) -> bool:
    """Whether a cell is a list of `[question, answer]`, as Gradio stores a chat.

    Either may be missing, as the answer to the last question is.
    """

    def is_said(text: Any) -> bool:
        return isinstance(text, str) and not isinstance(text, Number)

    pairs = turn_list(value) or []
    return any(isinstance(p, list | tuple) and all(map(is_said, p)) for p in pairs) and all(
        isinstance(p, list | tuple) and len(p) == 2 and all(is_missing(t) or is_said(t) for t in p)
        for p in pairs
    )


def _is_export(messages: Sequence[Mapping[Any, Any]]) -> bool:
    """Whether a user and an assistant speak, and nobody who is not known."""
    spoken = {_role(_speaker(message)) for message in messages}
    keys = (*_CONTENT_OR_CALL_KEYS, *EXPORT_CONTENT_KEYS)
    have_content = all(any(key in message for key in keys) for message in messages)
    return have_content and None not in spoken and {"user", "assistant"} <= spoken


def is_unanswered(value: Any) -> bool:
    """Whether the last message of a chat is one that nobody has answered in it."""
    if not is_chat(value):
        return False
    return _role(_speaker(messages_of(value)[-1])) in ("system", "user", "tool")


def read_tools(value: Any) -> str:
    """The definitions of tools as a JSON list; empty where there are none.

    Raises:
        UnusableRow: `bad_tools`.
    """
    tools = parsed_cell(value)
    if is_missing(tools) or (isinstance(tools, str) and not tools.strip()):
        return ""
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise UnusableRow("bad_tools", "a list of tool definitions is needed")
    try:
        return as_json(tools) if tools else ""
    except RecursionError:
        raise UnusableRow("bad_tools", "it is nested too deeply") from None


def _is_keyed_by_role(message: Mapping[Any, Any]) -> bool:
    """Whether its keys are who speaks: `{"human": "...", "assistant": "..."}`."""
    return bool(message) and all(str(key).strip().casefold() in ROLES for key in message)


def _turn(message: Mapping[Any, Any]) -> Turn:
    role = _role(name := _speaker(message))
    if role is None:
        keys = ", ".join(str(key) for key in list(message)[:_MAX_LISTED_KEYS])
        raise UnusableRow(
            "unknown_role",
            "a message must be by system, user, assistant or tool, or by a usual name for these, "
            f"got {f'no role beside the keys {keys}' if name is None else repr(str(name)[:40])}",
        )
    content = _content(message)
    if role == "tool_call":
        calls = _extra({"tool_calls": content}, "assistant")
        return Turn("assistant", "", _is_supervised(message), calls)
    parsed = read_content(content, may_be_object=role == "tool")
    is_assistant = role == "assistant"
    return Turn(
        role,
        parsed.text,
        supervised=not is_assistant or _is_supervised(message),
        extra=_extra(message, role),
        beside=parsed.beside,
        has_attachments=any(not _is_empty_value(message, key) for key in _ATTACHMENT_KEYS),
    )


def _role(name: Any) -> str | None:
    """The role that a name stands for; None where it is not known."""
    return ROLES.get(name.strip().casefold()) if isinstance(name, str) else None


def _speaker(message: Mapping[Any, Any]) -> Any:
    """Who speaks; of the keys of exported chats, the first that holds a known role."""
    if not is_missing(usual := _first_value(message, ROLE_KEYS)):
        return usual
    cells = [message.get(key) for key in EXPORT_ROLE_KEYS]
    names = [cell.get("role") if isinstance(cell, Mapping) else cell for cell in cells]
    there = [name for name in names if not is_missing(name)]
    return next(filter(_role, there), next(iter(there), None))


def _content(message: Mapping[Any, Any]) -> Any:
    """What is said; an export may leave one of two keys empty."""
    usual, other = _first_value(message, CONTENT_KEYS), _first_value(message, EXPORT_CONTENT_KEYS)
    is_export = is_missing(_first_value(message, ROLE_KEYS))
    return other if is_missing(usual) or (is_export and _is_empty_cell(usual)) else usual


def _first_value(message: Mapping[Any, Any], keys: tuple[str, ...]) -> Any:
    return next((message[key] for key in keys if not is_missing(message.get(key))), None)


def _is_empty_value(message: Mapping[Any, Any], key: str) -> bool:
    value = to_python(message.get(key))
    return is_missing(value) or value in ("", [], {})


def _is_empty_cell(value: Any) -> bool:
    """Whether a cell holds no chat at all."""
    value = parsed_cell(value)
    return is_missing(value) or value in ([], {}) or (isinstance(value, str) and is_blank(value))


def _is_supervised(message: Mapping[Any, Any]) -> bool:
    if not _is_empty_value(message, "train_detail"):
        raise UnusableRow("bad_weight", "parts of a turn cannot be weighted")
    keys = [key for key in (*WEIGHT_KEYS, "masked") if key in message]
    weights = {key: as_text(message[key]).strip().casefold() for key in keys}
    for key, weight in weights.items():
        if weight not in ("", *_ZERO, *_ONE):
            raise UnusableRow("bad_weight", f"{key} must be 0 or 1, got {weight[:40]!r}")
    masked = weights.pop("masked", "")
    return masked not in _ONE and not any(weight in _ZERO for weight in weights.values())


def _extra(message: Mapping[Any, Any], role: str) -> str:
    """What else of a turn a template may read: names, reasoning, an assistant's tool calls."""
    kept = {
        key: message[key]
        for key in _TEMPLATE_KEYS.get(role, ())
        if not _is_empty_value(message, key)
    }
    keys = ("function_call", "tool_calls") if role == "assistant" else ()
    present = (parsed_cell(message[key]) for key in keys if not _is_empty_value(message, key))
    calls: Any = next(present, [])
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list | tuple):
        raise UnusableRow("bad_tool_call", "a list of tool calls is needed")
    if calls:
        kept["tool_calls"] = [_normalized_call(call) for call in calls]
    return as_json(kept) if kept else ""


def _normalized_call(call: Any) -> dict[str, Any]:
    """A tool call as templates read it: OpenAI's form, its arguments an object and no text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UnusableRow("bad_tool_call", "a tool call must name its function")
    arguments = parsed_cell(function.get("arguments", {}))
    normalized = {**function, "arguments": arguments}
    outer = {"type": "function"} if function is call else dict(call)
    return {**outer, "function": normalized}
