"""The HTTP server: OpenAI's chat completions over one base and the adapters of a study."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from base64 import b64encode
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from tinyllama_lab.deploy.assistant import Assistant
from tinyllama_lab.deploy.serving.chat_request import ApiError, ChatRequest, parse
from tinyllama_lab.deploy.serving.generation import Generation, api_error
from tinyllama_lab.deploy.serving.scheduler import Scheduler
from tinyllama_lab.errors import DataError, LabError

BASE, DEFAULT = "base", "default"  # names of models, beside those of trials
MOST_BYTES = 2**20  # of a request's body
_PAGE = Path(__file__).with_name("chat_page.html")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Service:
    """What the server answers with.

    `models` are the names of the adapters, the default one first.
    """

    assistant: Assistant
    scheduler: Scheduler
    models: tuple[str, ...]
    study: str
    tokens: int  # the most of an answer
    token: str = ""  # that clients must send; empty: none
    is_local: bool = True  # only programs of this machine reach it
    # one at a time: a tokenizer is not made for several threads
    _writing: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)

    def adapter(self, model: str) -> str | None:
        """Return the adapter that a model's name means; None is the base.

        Raises:
            ApiError: there is no such model.
        """
        if model in (BASE, DEFAULT):
            return None if model == BASE else self.models[0]
        if model not in self.models:
            raise ApiError(
                404,
                f"the model {model[:80]!r} does not exist; GET /v1/models lists those that do",
                "model_not_found",
                "model",
            )
        return model

    async def begin(self, chat: ChatRequest) -> Generation:
        """Put a request into the queue.

        Raises:
            ApiError: it cannot be answered.
            LabError: the queue is full, or the server ends.
        """
        adapter = self.adapter(chat.model)
        messages, tokens = chat.conversation(), chat.tokens(self.tokens)
        self.scheduler.check_room()  # before the work below, which a full queue would waste
        write = partial(self.assistant.request, adapter, messages, tokens, chat.sampling)
        try:
            async with self._writing:
                # a long text takes seconds, in which other answers go on
                request = await asyncio.to_thread(write)
        except DataError as error:
            code = "context_length_exceeded" if "must fit" in str(error) else None
            raise ApiError(400, str(error), code, "messages") from None
        return Generation(chat, request, self.scheduler.begin(request), self.assistant)


def create_app(service: Service) -> FastAPI:
    """Return the server's application."""
    # its pages of documentation would load scripts of other hosts
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(_Guard, service=service)
    _add_error_handlers(app)
    cards, (page_text, page_headers) = _cards(service), _page()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(cards.values())}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        service.adapter(name)
        return cards[name]

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        chat = parse(await _body(request))
        generation = await service.begin(chat)
        if chat.stream:
            return _Stream(generation)
        try:
            answer = await _unless_gone(request, generation.whole())
        finally:
            generation.cancel()
        return Response() if answer is None else JSONResponse(answer)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if service.scheduler.is_closed:
            raise ApiError(503, "the model cannot go on; start the server again", "server_ends")
        return {"status": "ok", "in_progress": service.scheduler.in_progress}

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(page_text, headers=page_headers)

    return app


def _cards(service: Service) -> dict[str, dict[str, Any]]:
    """Return what `/v1/models` says of every model, by name."""
    roots = {DEFAULT: service.models[0], **{name: name for name in (*service.models, BASE)}}
    own = {"object": "model", "created": int(time.time()), "owned_by": service.study}
    return {
        name: {"id": name, **own, "root": root, "parent": None if root == BASE else BASE}
        for name, root in roots.items()
    }


class _Stream(StreamingResponse):
    """An answer as server-sent events."""

    def __init__(self, generation: Generation) -> None:
        headers = {"Cache-Control": "no-store"}
        super().__init__(generation.events(), headers=headers, media_type="text/event-stream")
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; end the work when the client leaves, even before the first one."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


def _page() -> tuple[str, dict[str, str]]:
    """Return the chat page, and headers that allow its own script and this server alone."""
    text = _PAGE.read_text(encoding="utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}


async def _body(request: Request) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: it is too long.
    """
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BYTES:
            text = f"a request must have at most {MOST_BYTES} bytes; shorten the conversation"
            raise ApiError(413, text, "request_too_large", headers={"Connection": "close"})
    return bytes(body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result | None:
    """Return the result of `work`; when the client leaves, cancel it and return None."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


class _Guard:
    """Lets those requests in that may come in."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer requests of other sites and those without the token with an error."""
        if scope["type"] == "http" and (error := self._refusal(Request(scope))):
            await _response(error)(scope, receive, send)
        elif scope["type"] == "http":
            await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> ApiError | None:
        host = request.headers.get("host", "")
        if self._service.is_local and not is_loopback(_name(host)):
            # another site whose name was pointed to this machine
            text = f"the header Host must name this machine, got {host[:80]!r}; use localhost"
            return ApiError(403, text, "wrong_host")
        origin = request.headers.get("origin")
        if origin is not None and _host_of(origin) != host:
            return ApiError(403, "pages of other sites may not use this server", "wrong_origin")
        if self._service.token and request.scope["path"].startswith("/v1"):
            sent = request.headers.get("authorization", "")
            wanted = f"Bearer {self._service.token}"
            # headers come as Latin-1; compared as bytes, since letters may be any
            if not hmac.compare_digest(sent.encode("latin-1"), wanted.encode()):
                text = "this server wants its token, as `Authorization: Bearer <token>`"
                challenge = {"WWW-Authenticate": "Bearer"}
                return ApiError(401, text, "invalid_api_key", headers=challenge)
        return None


def _host_of(origin: str) -> str | None:
    """Return the host and port of an `Origin` header; None if it is malformed."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _name(host: str) -> str:
    """Return the name or the address in a `Host` header, without the port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Return whether a name or an address means this machine alone."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return _response(error)

    @app.exception_handler(LabError)
    async def failed(request: Request, error: LabError) -> Response:
        return _response(api_error(error))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path[:80]}: {str(error.detail).lower()}"
        return _response(ApiError(error.status_code, text, headers=error.headers))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return _response(ApiError(500, "the server failed; its log says why", "internal_error"))
