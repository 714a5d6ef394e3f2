"""An answer in OpenAI's format, whole or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from tinyllama_lab.deploy.assistant import Assistant
from tinyllama_lab.deploy.completer import Request
from tinyllama_lab.deploy.serving.chat_request import ApiError, ChatRequest
from tinyllama_lab.deploy.serving.scheduler import Answer, BusyError, StoppingError
from tinyllama_lab.errors import LabError


class Generation:
    """An answer in progress, in OpenAI's format."""

    def __init__(
        self, chat: ChatRequest, request: Request, answer: Answer, assistant: Assistant
    ) -> None:
        self._chat, self._request, self._answer = chat, request, answer
        self._text = assistant.text_stream()
        self._stops = Stops(chat.stop)
        self._count = 0
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}

    def cancel(self) -> None:
        """End the work on the answer."""
        self._answer.is_cancelled = True

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Yield the text as it comes; closing the iterator cancels the request.

        Raises:
            LabError: the model failed, or the server ends.
        """
        async with aclosing(self._answer.tokens()) as tokens:
            async for token in tokens:
                self._count += 1
                if piece := self._stops.push(self._text.push(token)):
                    yield piece
                if self._stops.is_met:
                    return
        if piece := self._stops.end(self._text.end()):
            yield piece

    @property
    def reason(self) -> str | None:
        """Return why the answer ended, `stop` or `length`."""
        return "stop" if self._stops.is_met else self._answer.reason

    @property
    def usage(self) -> dict[str, int]:
        """Return the counts of tokens; an end token does not count."""
        prompt = len(self._request.prompt_ids)
        counts = {"prompt_tokens": prompt, "completion_tokens": self._count}
        return {**counts, "total_tokens": prompt + self._count}

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        text = "".join([piece async for piece in self.pieces()])
        message = {"role": "assistant", "content": text}
        choice = {**self._choice(), "message": message, "finish_reason": self.reason}
        return {**self._body("chat.completion", [choice]), "usage": self.usage}

    async def events(self) -> AsyncGenerator[str, None]:
        """Yield the answer as server-sent events."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async with aclosing(self.pieces()) as pieces:
                async for piece in pieces:
                    yield self._chunk({"content": piece})
        except LabError as error:  # the status was sent already
            yield _event(api_error(error).body)
            return
        yield self._chunk({}, self.reason)
        if self._chat.stream_options.include_usage:
            yield _event({**self._body("chat.completion.chunk", []), "usage": self.usage})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], reason: str | None = None) -> str:
        choice = {**self._choice(), "delta": delta, "finish_reason": reason}
        usage = {"usage": None} if self._chat.stream_options.include_usage else {}
        return _event({**self._body("chat.completion.chunk", [choice]), **usage})

    def _choice(self) -> dict[str, Any]:
        return {"index": 0, "logprobs": None}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "model": self._chat.model, "choices": choices}


class Stops:
    """Passes a text on up to the first stop string, and never a part of one.

    Attributes:
        is_met: whether a stop string came.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Take stop strings, none of them empty."""
        self._stops = list(stops)
        self._kept = ""  # may begin a stop string
        self.is_met = False

    def push(self, piece: str) -> str:
        """Return the text that surely comes before every stop string."""
        text = self._kept + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_met, self._kept = True, ""
            return text[: min(found)]
        safe = next(n for n in range(len(text) + 1) if self._may_begin(text[n:]))
        self._kept = text[safe:]
        return text[:safe]

    def _may_begin(self, end: str) -> bool:
        return not end or any(stop.startswith(end) for stop in self._stops)

    def end(self, piece: str) -> str:
        """Return what is left of the text, whose last piece this is."""
        text = self.push(piece)
        return text if self.is_met else text + self._kept


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def api_error(error: LabError) -> ApiError:
    """Return the answer to a client whose request was refused or failed."""
    if isinstance(error, BusyError | StoppingError):
        code = "queue_full" if isinstance(error, BusyError) else "server_ends"
        return ApiError(503, str(error), code, headers={"Retry-After": "1"})
    return ApiError(500, str(error), "model_failed")
