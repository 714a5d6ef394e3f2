"""Reads requests in OpenAI's format; what this server cannot do is refused by name."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from tinyllama_lab.core.dataset.chat_template import Message
from tinyllama_lab.core.engines.sampling import TokenSampling
from tinyllama_lab.errors import shown

_MOST_STOPS = 4  # as OpenAI's

# values of parameters that ask for nothing, as many clients send them
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}
_NO_EFFECT = ("user", "metadata", "safety_identifier", "service_tier", "prompt_cache_key")


class ApiError(Exception):
    """An error in OpenAI's format."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """Return the JSON that the client gets."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else _list_of("strings", stop)


def _in_parts(content: Any) -> Any:
    is_text = isinstance(content, str)
    return [{"type": "text", "text": content}] if is_text else _list_of("text parts", content)


def _list_of(what: str, value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError(f"it must be a string or a list of {what}")
    return value


NonEmpty = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[NonEmpty], BeforeValidator(_listed), Field(max_length=_MOST_STOPS)]
TextParts = Annotated[list[_TextPart], BeforeValidator(_in_parts)]


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: TextParts

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatRequest(_Strict):
    """The body of `POST /v1/chat/completions`."""

    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    stop: Stops = []
    seed: int | None = None
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def sampling(self) -> TokenSampling | None:
        """Return how tokens are drawn, None for greedy; without a seed, a random one is taken."""
        if not self.temperature:
            return None
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return TokenSampling(self.temperature, seed)

    def tokens(self, most: int) -> int:
        """Return the most tokens of the answer.

        Raises:
            ApiError: the request wants more than `most`.
        """
        for name in ("max_completion_tokens", "max_tokens"):
            wanted = getattr(self, name)
            if wanted is not None and wanted > most:
                raise ApiError(
                    400,
                    f"{name} must be at most {most} on this server, got {wanted}; start it with "
                    f"tokens={wanted} for longer answers",
                    param=name,
                )
            if wanted is not None:
                return int(wanted)
        return most

    def conversation(self) -> list[Message]:
        """Return the messages as `PromptFormat.prompt` takes them.

        Raises:
            ApiError: they are in another order.
        """
        turns = [
            {"role": "system" if m.role == "developer" else m.role, "content": m.text}
            for m in self.messages
        ]
        roles = [str(turn["role"]) for turn in turns]
        asked = roles[1:] if roles[0] == "system" else roles
        expected = [("user", "assistant")[number % 2] for number in range(len(asked))]
        if len(asked) % 2 == 0 or asked != expected:
            raise ApiError(
                400,
                "messages must be a system turn or none, and then user and assistant in turn, "
                f"the last of the user; got {', '.join(roles[:12])}",
                param="messages",
            )
        return turns


def parse(body: bytes) -> ChatRequest:
    """Return the request in a body.

    Raises:
        ApiError: it is not valid JSON, or wants what this server cannot do.
    """
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body must be JSON: {error}", "invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    for message in _messages(fields):
        _drop_empty(message)
    _drop_empty(fields)
    for name in [*_NEUTRAL, *_NO_EFFECT]:
        value = fields.pop(name, None)
        allowed = _NEUTRAL.get(name)
        if value is not None and allowed is not None and value not in allowed:
            values = " or ".join(json.dumps(each) for each in allowed)
            raise ApiError(
                400,
                f"{name} must be {values} on this server, got {_shown(value)}; leave it out",
                "unsupported_value",
                name,
            )
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def _messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    messages = fields.get("messages")
    return [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []


def _drop_empty(fields: dict[str, Any]) -> None:
    """Drop null fields in place: clients send them for parameters that are not set."""
    for name in [name for name, value in fields.items() if value is None]:
        del fields[name]


def _refusal(error: ValidationError) -> ApiError:
    """Return the first problem of a request, which names the parameter and what was received."""
    problem = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        text = f"{param} is not supported by this server; leave it out"
        return ApiError(400, text, "unsupported_parameter", param)
    if problem["type"] == "missing":
        return ApiError(400, f"{param} is required", "missing_required_parameter", param)
    said = problem["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    text = f"{param}: {said}, got {_shown(problem['input'])}"
    return ApiError(400, text, "invalid_value", param)


def _shown(value: Any) -> str:
    """Return a value as JSON, which clients write."""
    return shown(json.dumps(value, ensure_ascii=False))
