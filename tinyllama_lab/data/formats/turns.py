"""Reads the turns of a chat from all common formats into one.

Read are OpenAI's `role` and `content`, ShareGPT's `from` and `value`, exported chats such as
`sender` and `text`, weights of single turns, and tool calls; `parts.py` reads contents in parts. A
message that cannot be read is not an error: its row is unusable, for a reason that is counted.
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

# names of roles in public data sets: `prompter` is that of OpenAssistant, `observation` that of
# LLaMA-Factory, `ipython` that of Llama 3, `developer` that of newer OpenAI models
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
# keys of exported chats; such a role key counts only if it holds a known role
EXPORT_ROLE_KEYS = ("sender", "author", "speaker", "type", "name")
EXPORT_CONTENT_KEYS = ("text", "message", "body")
# 0 or false: the turn is context, not supervised (OpenAI and Mistral; Axolotl; ms-swift)
WEIGHT_KEYS = ("weight", "train", "loss", "loss_mask")
_ZERO, _ONE = ("0", "0.0", "false"), ("1", "1.0", "true")
_CONTENT_OR_CALL_KEYS = (*CONTENT_KEYS, "tool_calls", "function_call")
_MAX_LISTED_KEYS = 8  # in a message to the user
_ATTACHMENT_KEYS = ("attachments", "files")  # in exports of Claude
# other keys of a message that chat templates read, by role
_TEMPLATE_KEYS = {"tool": ("name", "tool_call_id"), "assistant": ("reasoning_content", "thinking")}


@dataclass(frozen=True, order=True)
class Turn:
    """One message of a chat.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        supervised: false for an assistant turn that the data gives the weight 0.
        extra: JSON of the other keys that a chat template may read, such as tool calls.
        extras: what the content had besides its text; see `parts.Content`.
        has_attachments: whether the message had attachments, which are not used.
    """

    role: str
    content: str
    supervised: bool = True
    extra: str = ""
    # the last two do not change what is trained on, so turns that differ only in them are equal
    extras: frozenset[str] = field(default=frozenset(), compare=False)
    has_attachments: bool = field(default=False, compare=False)

    @property
    def has_thinking(self) -> bool:
        """Whether the content had thinking, which is not used."""
        return THINKING in self.extras

    @property
    def is_empty(self) -> bool:
        """Whether the turn has no text and calls no tool."""
        return is_blank(self.content) and "tool_calls" not in json.loads(self.extra or "{}")


class Chat(NamedTuple):
    """The turns of a chat up to its last assistant turn; none if a row is not a chat.

    Attributes:
        is_cut: whether more turns followed.
        is_newly_read: whether it was read otherwise before version 6 of `data.rendering`.
    """

    turns: tuple[Turn, ...] = ()
    is_cut: bool = False
    is_newly_read: bool = False


def read_turns(value: Any) -> Chat:
    """Return the turns of a chat up to its last assistant turn.

    Empty system turns are dropped.

    Raises:
        UnusableRow: `empty_chat`, `bad_messages`, `unknown_role`, `no_user_turn`,
            `no_assistant_turn`, `bad_weight`, `bad_tool_call`, `empty_prompt`, `empty_response`,
            `empty_turn` (an assistant turn in the middle), `not_text` (of a weight), or a reason
            of `read_content`.
    """
    try:
        turns = [_turn(message) for message in messages_of(value)]
    except RecursionError:
        raise UnusableRow("bad_messages", "a message is nested too deeply") from None
    is_newly_read = any(turn.extras for turn in turns)
    # templates would render an empty system turn, which differs from none
    turns = [turn for turn in turns if turn.role != "system" or not is_blank(turn.content)]
    last = max((n for n, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if last < 0:
        raise UnusableRow("no_assistant_turn")
    kept = tuple(turns[: last + 1])
    if not any(turn.role == "user" for turn in kept):
        raise UnusableRow("no_user_turn")
    for number, turn in enumerate(kept):
        if turn.role in ("user", "assistant") and turn.is_empty:
            middle = "empty_turn" if turn.role == "assistant" else "empty_prompt"
            raise UnusableRow("empty_response" if number == last else middle)
    return Chat(kept, last + 1 < len(turns), is_newly_read)


def messages_of(value: Any) -> list[Mapping[Any, Any]]:
    """Return the messages of a cell, one for each turn.

    Raises:
        UnusableRow: `empty_chat` or `bad_messages`.
    """
    messages: list[Mapping[Any, Any]] = []
    if is_pairs(value):
        pairs = (zip(("user", "assistant"), p, strict=True) for p in turn_list(value) or ())
        return [{"role": r, "content": t} for pair in pairs for r, t in pair if not is_missing(t)]
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
        raise UnusableRow("bad_messages", "a chat must be a list of messages")
    return messages


def turn_list(value: Any) -> list[Any] | None:
    """Return the messages of a cell as a list.

    Args:
        value: a list, a string that holds one, or an object of equally long lists.

    Returns:
        The list; None if the cell is none of these.
    """
    value = parsed_cell(value)
    # `datasets` may store a list of objects as an object of lists
    if isinstance(value, Mapping) and any(k in value for k in (*ROLE_KEYS, *EXPORT_ROLE_KEYS)):
        columns = {key: to_python(column) for key, column in value.items()}
        if all(isinstance(column, list) for column in columns.values()):
            cells = zip(*columns.values(), strict=False)
            return [dict(zip(columns, row, strict=True)) for row in cells]
    return list(value) if isinstance(value, list | tuple) else None


def is_chat(value: Any) -> bool:
    """Return whether a cell holds messages: objects that say who speaks, and what.

    At least one role must be known, so that other lists of objects, such as an answer in JSON, do
    not count. With the keys of exported chats, every role must be known, and a string does not
    count.
    """
    messages = turn_list(value) or []
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        return False
    if all(_is_keyed_by_role(message) for message in messages):
        roles = {ROLES[str(key).strip().casefold()] for m in messages for key in m}
        # a string of such objects may be an answer in JSON
        return {"user", "assistant"} <= roles and not isinstance(value, str)
    if all(any(key in message for key in _CONTENT_OR_CALL_KEYS) for message in messages):
        if any(_role(_first_value(message, ROLE_KEYS)) for message in messages):
            return True
    return not isinstance(value, str) and _is_export(messages)


def is_pairs(value: Any) -> bool:
    """Return whether a cell is a list of `[question, answer]`, as Gradio stores a chat.

    Either may be missing, as the answer to the last question often is.
    """

    def is_said(text: Any) -> bool:
        return isinstance(text, str) and not isinstance(text, Number)

    pairs = turn_list(value) or []
    return any(isinstance(p, list | tuple) and all(map(is_said, p)) for p in pairs) and all(
        isinstance(p, list | tuple) and len(p) == 2 and all(is_missing(t) or is_said(t) for t in p)
        for p in pairs
    )


def _is_export(messages: Sequence[Mapping[Any, Any]]) -> bool:
    """Return whether a user and an assistant speak, and nobody with an unknown role."""
    roles = {_role(_speaker(message)) for message in messages}
    keys = (*_CONTENT_OR_CALL_KEYS, *EXPORT_CONTENT_KEYS)
    have_content = all(any(key in message for key in keys) for message in messages)
    return have_content and None not in roles and {"user", "assistant"} <= roles


def is_unanswered(value: Any) -> bool:
    """Return whether a cell holds a chat whose last message is not an answer."""
    if not is_chat(value):
        return False
    return _role(_speaker(messages_of(value)[-1])) in ("system", "user", "tool")


def read_tools(value: Any) -> str:
    """Return the definitions of tools as a JSON list; an empty string if there are none.

    Raises:
        UnusableRow: `bad_tools`.
    """
    tools = parsed_cell(value)
    if is_missing(tools) or (isinstance(tools, str) and not tools.strip()):
        return ""
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise UnusableRow("bad_tools", "tools must be a list of definitions")
    try:
        return as_json(tools) if tools else ""
    except RecursionError:
        raise UnusableRow("bad_tools", "a definition is nested too deeply") from None


def _is_keyed_by_role(message: Mapping[Any, Any]) -> bool:
    """Return whether the keys of a message are roles: `{"human": "...", "assistant": "..."}`."""
    return bool(message) and all(str(key).strip().casefold() in ROLES for key in message)


def _turn(message: Mapping[Any, Any]) -> Turn:
    """Return a message as a turn.

    Raises:
        UnusableRow: as `read_turns` for a single message.
    """
    role = _role(name := _speaker(message))
    if role is None:
        keys = ", ".join(str(key) for key in list(message)[:_MAX_LISTED_KEYS])
        got = f"no role among the keys {keys}" if name is None else repr(str(name)[:40])
        raise UnusableRow(
            "unknown_role",
            "the role of a message must be system, user, assistant or tool, or a usual name for "
            f"one of these, got {got}",
        )
    content = _content(message)
    if role == "tool_call":  # a turn of its own for a call, whose content is the call as JSON
        calls = _extra({"tool_calls": content}, "assistant")
        return Turn("assistant", "", _is_supervised(message), calls)
    parsed = read_content(content, may_be_object=role == "tool")
    is_assistant = role == "assistant"
    return Turn(
        role,
        parsed.text,
        supervised=not is_assistant or _is_supervised(message),
        extra=_extra(message, role),
        extras=parsed.extras,
        has_attachments=any(not _is_empty_value(message, key) for key in _ATTACHMENT_KEYS),
    )


def _role(name: Any) -> str | None:
    """Return the role that a name stands for; None if it is unknown."""
    return ROLES.get(name.strip().casefold()) if isinstance(name, str) else None


def _speaker(message: Mapping[Any, Any]) -> Any:
    """Return who speaks.

    Among the keys of exported chats, the first with a known role counts.
    """
    if not is_missing(usual := _first_value(message, ROLE_KEYS)):
        return usual
    cells = [message.get(key) for key in EXPORT_ROLE_KEYS]
    names = [cell.get("role") if isinstance(cell, Mapping) else cell for cell in cells]
    present = [name for name in names if not is_missing(name)]
    return next(filter(_role, present), next(iter(present), None))


def _content(message: Mapping[Any, Any]) -> Any:
    """Return what a message says.

    Exports may hold the text under a second key, and leave the usual one empty.
    """
    usual, other = _first_value(message, CONTENT_KEYS), _first_value(message, EXPORT_CONTENT_KEYS)
    is_export = is_missing(_first_value(message, ROLE_KEYS))
    return other if is_missing(usual) or (is_export and _is_empty_cell(usual)) else usual


def _first_value(message: Mapping[Any, Any], keys: tuple[str, ...]) -> Any:
    """Return the first value under these keys that is not missing; None if all are."""
    return next((message[key] for key in keys if not is_missing(message.get(key))), None)


def _is_empty_value(message: Mapping[Any, Any], key: str) -> bool:
    """Return whether a key of a message is missing, or holds an empty value."""
    value = to_python(message.get(key))
    return is_missing(value) or value in ("", [], {})


def _is_empty_cell(value: Any) -> bool:
    """Return whether a cell holds nothing that could be a chat."""
    value = parsed_cell(value)
    return is_missing(value) or value in ([], {}) or (isinstance(value, str) and is_blank(value))


def _is_supervised(message: Mapping[Any, Any]) -> bool:
    """Return whether an assistant turn is trained on, by its weight.

    Raises:
        UnusableRow: `bad_weight` or `not_text`.
    """
    if not _is_empty_value(message, "train_detail"):
        raise UnusableRow("bad_weight", "parts of a turn cannot be weighted")
    keys = [key for key in (*WEIGHT_KEYS, "masked") if key in message]
    weights = {key: as_text(message[key]).strip().casefold() for key in keys}
    for key, weight in weights.items():
        if weight not in ("", *_ZERO, *_ONE):
            raise UnusableRow("bad_weight", f"{key} must be 0 or 1, got {weight[:40]!r}")
    masked = weights.pop("masked", "")  # the opposite of a weight
    return masked not in _ONE and not any(weight in _ZERO for weight in weights.values())


def _extra(message: Mapping[Any, Any], role: str) -> str:
    """Return JSON of what else a template may read: names, reasoning, an assistant's tool calls.

    Returns:
        The JSON; an empty string if there is nothing.

    Raises:
        UnusableRow: `bad_tool_call`.
    """
    kept = {
        key: message[key]
        for key in _TEMPLATE_KEYS.get(role, ())
        if not _is_empty_value(message, key)
    }
    # `function_call` is the older form of OpenAI, with a single call
    keys = ("function_call", "tool_calls") if role == "assistant" else ()
    present = (parsed_cell(message[key]) for key in keys if not _is_empty_value(message, key))
    calls: Any = next(present, [])
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list | tuple):
        raise UnusableRow("bad_tool_call", "tool calls must be a list")
    if calls:
        kept["tool_calls"] = [_normalized_call(call) for call in calls]
    return as_json(kept) if kept else ""


def _normalized_call(call: Any) -> dict[str, Any]:
    """Return a tool call in OpenAI's form, with arguments as an object, as templates read it.

    Raises:
        UnusableRow: `bad_tool_call`.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UnusableRow("bad_tool_call", "a tool call must name its function")
    arguments = parsed_cell(function.get("arguments", {}))
    normalized = {**function, "arguments": arguments}
    outer = {"type": "function"} if function is call else dict(call)
    return {**outer, "function": normalized}
