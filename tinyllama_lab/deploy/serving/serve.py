"""`deploy serve`: loads a study's adapters and runs the server until it is stopped."""

from __future__ import annotations

import asyncio
import errno
import shlex
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import uvicorn

from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.config.variants import VARIANTS
from tinyllama_lab.deploy.assistant import Assistant
from tinyllama_lab.deploy.selection import Selection, named_adapters
from tinyllama_lab.deploy.serving.scheduler import Scheduler
from tinyllama_lab.deploy.serving.server import BASE, DEFAULT, Service, create_app, is_loopback
from tinyllama_lab.errors import ConfigError, Interrupted, LabError

TOKEN_VARIABLE = "TINYLLAMA_LAB_TOKEN"
_GRACE_S = 3  # for the last bytes of answers when the server ends
# the values that its option takes
_VLLM_LORAS = 8  # decoded together; each takes memory
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Address:
    """Where the server listens, and what it takes at the same time."""

    host: str
    port: int  # 0: a free one
    token: str  # that clients must send; empty: none

    def listen(self) -> tuple[socket.socket, bool]:
        """Return a listening socket, and whether only this machine reaches it.

        Raises:
            ConfigError: the address is in use or not of this machine, or it needs a token.
        """
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM
            )[0]
        except (OSError, UnicodeError) as error:  # the latter for a name such as `x..y`
            reason = getattr(error, "strerror", None) or "not a name of a host"
            raise ConfigError(
                [f"host must be an address of this machine, got {self.host!r} ({reason})"]
            ) from None
        is_local = is_loopback(str(address[0]))
        if not is_local and not self.token:
            raise ConfigError(
                [
                    f"host={self.host} can be reached by other machines, which needs a token; "
                    f"set the environment variable {TOKEN_VARIABLE}, or take host=127.0.0.1"
                ]
            )
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError as error:
            listener.close()
            way = "another port, or port=0 for a free one"
            if error.errno == errno.EADDRNOTAVAIL:
                way = "an address of this machine, such as host=127.0.0.1"
            raise ConfigError(
                [
                    f"host={self.host} port={self.port} cannot be used ({error.strerror}); take "
                    f"{way}"
                ]
            ) from None
        return listener, is_local


def serve(
    selection: Selection, address: Address, device: str, most: tuple[int, int], say: _Say
) -> None:
    """Serve a study's adapters until Ctrl-C or SIGTERM.

    Args:
        selection: the trial that is the default model.
        address: where to listen.
        device: of the base.
        most: requests in progress, and tokens of an answer.
        say: prints a line for people.

    Raises:
        LabError: the address or the base cannot be used.
        SystemExit: with 130, the server was stopped.
    """
    try:
        _serve(selection, address, device, most, say)
    except KeyboardInterrupt:
        say("the server has ended")
        raise SystemExit(130) from None  # 128 + SIGINT, as shells report it


def _serve(
    selection: Selection, address: Address, device: str, most: tuple[int, int], say: _Say
) -> None:
    signal.signal(signal.SIGTERM, _interrupt)  # like Ctrl-C, also while the base is loaded
    listener, is_local = address.listen()
    with closing(listener):
        assistant, served = load(selection, device, say)
        models = tuple(each.label for each in served)
        queue, tokens = most
        scheduler = Scheduler(assistant.completer, queue)
        service = Service(
            assistant, scheduler, models, selection.study.name, tokens, address.token, is_local
        )
        url = _url(listener, address.host)
        for line in _start_lines(service, served, url):
            print(line, flush=True)
        try:
            HttpServer(service).run([listener])
        finally:
            scheduler.close()


_Say = Callable[[str], None]


def load(selection: Selection, device: str, say: _Say) -> tuple[Assistant, list[Selection]]:
    """Load the base and the adapters of all done trials that can share it.

    Returns:
        What answers, and the trials that were loaded, the selected one first.

    Raises:
        ModelError: the base cannot be loaded.
        StudyError: the adapter of the selected trial cannot.
    """
    first, *others = named_adapters(selection)
    assistant = Assistant(first, device)
    served = [first]
    for other in others:
        try:
            assistant.add(other)
            served.append(other)
        except LabError as error:
            say(f"left out: {error}")
    return assistant, served


class HttpServer(uvicorn.Server):
    """Runs a service until a signal comes, which is raised again at the end."""

    def __init__(self, service: Service) -> None:
        options: dict[str, Any] = {"log_level": "warning", "access_log": False}
        options |= {"proxy_headers": False, "server_header": False, "lifespan": "off"}
        app = create_app(service)
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=_GRACE_S, **options))
        self._scheduler = service.scheduler

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the answers in progress with an error, and then the connections."""
        # uvicorn would wait for them
        await asyncio.to_thread(self._scheduler.close)
        await super().shutdown(sockets)


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted


def _url(listener: socket.socket, host: str) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _start_lines(service: Service, served: Sequence[Selection], url: str) -> list[str]:
    """Return what a user needs to know when the server starts."""
    default = service.models[0]
    names = [f"  {DEFAULT:<10} is {default}", *(f"  {name}" for name in service.models)]
    token = ["-H", f"Authorization: Bearer ${TOKEN_VARIABLE}"] if service.token else []
    body = f'{{"model": "{DEFAULT}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    header = ["-H", "Content-Type: application/json"]
    curl = shlex.join(["curl", f"{url}/v1/chat/completions", *header, "-d", body])
    if token:  # in double quotes, in which the shell puts the variable
        curl += f' {token[0]} "{token[1]}"'
    vllm = vllm_command(service, served)
    return [
        f"serving {url} (chat page), {url}/v1 (OpenAI's API); Ctrl-C ends it",
        f"models of study {service.study}:",
        *names,
        f"  {BASE:<10} is the model before training",
        f"try it:\n  {curl}",
        *([f"on a GPU, for many users:\n  {vllm}"] if vllm else []),
    ]


def vllm_command(service: Service, served: Sequence[Selection]) -> str:
    """Return the command that serves the same adapters with vLLM, quoted for a shell.

    It is empty where there are none that vLLM takes: it has no DoRA, and no weights of the base.
    """
    loras = [(each, part(Science, each.trial.config).lora) for each in served]
    plain = [
        (each, lora)
        for each, lora in loras
        if lora.of_base is None and not VARIANTS[lora.variant].trains_magnitudes
    ]
    if not plain:
        return ""
    highest = max(lora.saved_rank for _, lora in plain)
    rank = next((r for r in _VLLM_RANKS if r >= highest), highest)
    adapters = [f"{each.label}={each.trial.row.trial.adapter_dir}" for each, _ in plain]
    base = str(service.assistant.base.model.name_or_path)
    options = ["--enable-lora", "--max-lora-rank", str(rank)]
    options += ["--max-loras", str(min(len(adapters), _VLLM_LORAS)), "--lora-modules", *adapters]
    template = plain[0][0].trial.row.trial.template_file
    if template.is_file():  # adapters of earlier versions have none
        options = ["--chat-template", str(template), *options]
    return shlex.join(["vllm", "serve", base, *options])
