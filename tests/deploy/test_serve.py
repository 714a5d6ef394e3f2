"""The server as its clients see it: OpenAI's API over the adapters of a tiny study."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyllama_lab.deploy.__main__ import main
from tinyllama_lab.deploy.assistant import Assistant
from tinyllama_lab.deploy.completer import Completion
from tinyllama_lab.deploy.selection import select
from tinyllama_lab.deploy.serving.scheduler import Scheduler, StoppingError
from tinyllama_lab.deploy.serving.serve import Address, HttpServer, load, vllm_command
from tinyllama_lab.deploy.serving.server import MOST_BYTES, Service
from tinyllama_lab.errors import ConfigError
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import TrialFolder, trial_key

pytestmark = pytest.mark.usefixtures("dora_alone")

TOKENS = 400
_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
Json = dict[str, Any]


@pytest.fixture(scope="module")
def study(another_lab: Any) -> StudyFolder:
    """Two ranks and an adapter that cannot run beside them, trained on the tiny base."""
    study = StudyFolder(another_lab.folder / "sweeps", "tiny")
    for rank, variant in ((2, "lora"), (4, "lora"), (3, "dora")):
        changes = {"lora.r": rank, "lora.variant": variant, "train.lr": 0.05}
        config = another_lab.configure(changes)
        trial = TrialFolder(study.trials_dir / f"r{rank}-{trial_key(config)}")
        trial.write_config(config)
        another_lab.run([trial])
    return study


@pytest.fixture(scope="module")
def said() -> list[str]:
    """Lines for people."""
    return []


@pytest.fixture(scope="module")
def service(study: StudyFolder, said: list[str]) -> Service:
    """The loaded study; every server gets a scheduler of its own."""
    assistant, served = load(select(study.root, "tiny", "r=4"), "cpu", said.append)
    models = tuple(each.label for each in served)
    return Service(assistant, None, models, "tiny", TOKENS)  # type: ignore[arg-type]


class Client:
    """Talks to a server on this machine."""

    def __init__(self, port: int, service: Service) -> None:
        self.port, self.service = port, service

    def connect(
        self, path: str, body: Json | bytes | None = None, method: str = "", **headers: str
    ) -> http.client.HTTPConnection:
        """Send a request; `Host_` and the like set headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        named = {name.strip("_").replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("POST" if body is not None else "GET"), path, data, named)
        return connection

    def ask(self, path: str, body: Any = None, **options: str) -> tuple[int, Any, Any]:
        """Return status, JSON and headers of an answer."""
        connection = self.connect(path, body, **options)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, json.loads(text), response.headers

    def chat(self, question: str = "Book a room", **fields: Any) -> Json:
        """Return a whole answer, which must come."""
        status, answer, _ = self.ask(CHAT, body_of(question, **fields))
        assert status == 200, answer
        return dict(answer)

    def stream(self, question: str = "Book a room", **fields: Any) -> list[Json]:
        """Return the events of a streamed answer, which ends as OpenAI's do."""
        connection = self.connect(CHAT, body_of(question, stream=True, **fields))
        response = connection.getresponse()
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, last, empty = response.read().decode().split("\n\n")
        connection.close()
        assert (last, empty) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def in_progress(self) -> int:
        return int(self.ask("/health")[1]["in_progress"])


CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "a"}
DRAWN: Json = {"model": "base", "temperature": 1.5, "seed": 3, "max_tokens": 40}  # a varied text


def body_of(question: str, **fields: Any) -> Json:
    messages = [{"role": "user", "content": question}]
    return {"model": "default", "messages": messages, "max_tokens": 12, **fields}


def text_of(answer: Json) -> str:
    return str(answer["choices"][0]["message"]["content"])


@contextmanager
def serving(service: Service, completer: Any = None, queue: int = 64) -> Iterator[Client]:
    """Run a server on a free port, with its own scheduler."""
    scheduler = Scheduler(completer or service.assistant.completer, queue)
    server = HttpServer(replace(service, scheduler=scheduler))
    listener, _ = Address("127.0.0.1", 0, service.token).listen()
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield Client(listener.getsockname()[1], service)
    finally:
        server.should_exit = True
        thread.join()
        scheduler.close()
        service.assistant.completer.clear()


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with serving(service) as running:
        yield running


class Wrapped:
    """A completer that does something before every step."""

    def __init__(self, inner: Any, before: Callable[[], None]) -> None:
        self.inner, self.before, self.steps = inner, before, 0

    def begin(self, request: Any) -> Completion:
        return self.inner.begin(request)  # type: ignore[no-any-return]

    def step(self) -> list[Completion]:
        self.steps += 1
        self.before()
        return self.inner.step()  # type: ignore[no-any-return]

    def clear(self) -> None:
        self.inner.clear()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- models and answers ----------------------------------------------------------------------


def test_every_done_trial_that_fits_is_a_model_and_others_are_named(
    client: Client, study: StudyFolder, said: list[str]
) -> None:
    _, listed, _ = client.ask("/v1/models")
    names = {path.name.split("-")[0]: path.name for path in study.trials_dir.iterdir()}
    cards = {card["id"]: card for card in listed["data"]}
    assert set(cards) == {"default", "base", names["r2"], names["r4"]}
    assert cards["default"]["root"] == names["r4"]
    (line,) = said
    assert f"start again with trial={names['r3'].removeprefix('r3-')}" in line
    assert client.ask(f"/v1/models/{names['r2']}")[1] == cards[names["r2"]]
    assert client.ask("/v1/models/r9")[0] == 404


def test_an_answer_is_that_of_chat(
    client: Client, study: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, trial in zip(client.service.models, ("trial=r=4", "trial=r=2"), strict=True):
        options = [f"sweeps_dir={study.root}", "study=tiny", "tokens=12", "device=cpu"]
        main(["chat", trial, *options, "--once", "Book a room"])
        answer = client.chat(model=name)
        assert text_of(answer) == capsys.readouterr().out.removesuffix("\n")
        assert answer["object"] == "chat.completion" and answer["model"] == name


def test_a_stream_has_the_same_text_reason_and_usage(client: Client) -> None:
    whole = client.chat(model="base")
    events = client.stream(model="base", stream_options={"include_usage": True})
    deltas = [event["choices"][0] for event in events[:-1]]
    assert deltas[0]["delta"]["role"] == "assistant"
    assert "".join(d["delta"].get("content", "") for d in deltas) == text_of(whole)
    assert [d["finish_reason"] for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert "usage" not in client.stream(model="base")[-1]


def test_requests_of_all_models_at_once_are_answered_as_one_after_another(client: Client) -> None:
    names = [*client.service.models, "base"]
    wanted = [(names[n % 3], f"Question {'x' * n}", 5 + n) for n in range(12)]

    def text(request: tuple[str, str, int]) -> str:
        name, question, tokens = request
        return text_of(client.chat(question, model=name, max_tokens=tokens))

    alone = [text(request) for request in wanted]
    with ThreadPoolExecutor(len(wanted)) as pool:
        assert list(pool.map(text, wanted)) == alone
    assert len(set(alone)) > 3


def test_usage_counts_the_tokens_of_prompt_and_answer(client: Client) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    answer = client.chat(messages=messages, max_tokens=7)
    tokens = prompt_tokens(client, messages)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": tokens,
        "completion_tokens": 7,
        "total_tokens": tokens + 7,
    }


def test_a_conversation_has_a_system_turn_and_text_parts(client: Client) -> None:
    parts = [{"type": "text", "text": "Book "}, {"type": "text", "text": "a room"}]
    turns: list[Json] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi", "refusal": None},
        {"role": "user", "content": parts},
    ]
    answer = client.chat(messages=turns)
    turns[0]["role"], turns[-1]["content"] = "system", "Book a room"
    assert answer["usage"]["prompt_tokens"] == prompt_tokens(client, turns)


def prompt_tokens(client: Client, messages: list[Json]) -> int:
    """Count the tokens of a prompt with transformers alone."""
    tokenizer: Any = client.service.assistant.base.tokenizer
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def test_a_stop_string_ends_the_answer_before_it_and_no_part_of_it_is_sent(client: Client) -> None:
    text = text_of(client.chat(**DRAWN))
    pieces = streamed(client.stream(**DRAWN))
    assert "".join(pieces) == text and len(pieces) > 10
    for number in (1, 4, 9):
        stop = pieces[number][-2:] + pieces[number + 1][:2]  # of two tokens
        before = text[: text.index(stop)]
        assert not any(stop in piece for piece in pieces)
        for stops in (stop, ["never said", stop]):
            answer = client.chat(**DRAWN, stop=stops)
            assert text_of(answer) == before
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] < 40
            assert "".join(streamed(client.stream(**DRAWN, stop=stops))) == before
    unfinished = text[-4:] + "~~"
    assert text_of(client.chat(**DRAWN, stop=unfinished)) == text


def streamed(events: list[Json]) -> list[str]:
    """Return the pieces of text of a stream."""
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
    return [piece for piece in pieces if piece]


def test_a_seed_gives_the_same_answer_again_and_none_gives_another(client: Client) -> None:
    def draw(**fields: Any) -> str:
        return text_of(client.chat(model="base", temperature=1.5, max_tokens=20, **fields))

    assert draw(seed=1) == draw(seed=1)
    assert len({draw(seed=1), draw(seed=2), draw(), draw()}) == 4
    assert text_of(client.chat(temperature=0, seed=1)) == text_of(client.chat())


def test_beside_an_adapter_that_needs_peft_all_are_served_in_turn(
    study: StudyFolder, client: Client
) -> None:
    said: list[str] = []
    assistant, served = load(select(study.root, "tiny", "r=3"), "cpu", said.append)
    models = tuple(each.label for each in served)
    service = replace(client.service, assistant=assistant, models=models)
    with serving(service) as own, ThreadPoolExecutor(4) as pool:
        assert set(models) > set(client.service.models) and said == []
        work = [pool.submit(own.chat, model=model) for model in (*models, "base")]
        texts = [text_of(each.result()) for each in work]
    packed = [text_of(client.chat(model=model)) for model in client.service.models]
    assert set(packed) < set(texts) and len(set(texts)) == 4
    line = vllm_command(service, served)
    assert all(model in line for model in client.service.models) and models[0] not in line
    assert vllm_command(service, served[:1]) == ""


# ---- errors ----------------------------------------------------------------------------------

NEUTRAL: Json = {
    **{"n": 1, "top_p": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
    **{"user": "me", "stop": None, "seed": None, "tools": None, "logprobs": False},
    "response_format": {"type": "text"},
}


def test_parameters_that_ask_for_nothing_are_taken(client: Client) -> None:
    assert text_of(client.chat(**NEUTRAL)) == text_of(client.chat())


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"top_p": 0.9}, "top_p", "top_p must be 1 on this server, got 0.9"),
        ({"n": 2}, "n", "n must be 1 on this server, got 2"),
        ({"logprobs": True}, "logprobs", "must be false"),
        ({"tools": [{}]}, "tools", "tools must be"),
        ({"presence_penalty": 1}, "presence_penalty", "must be 0"),
        ({"guided_json": {}}, "guided_json", "guided_json is not supported by this server"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2, got 2.5"),
        ({"temperature": "hot"}, "temperature", 'valid number, got "hot"'),
        ({"seed": 1.5}, "seed", "got 1.5"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, got 0"),
        ({"max_tokens": TOKENS + 1}, "max_tokens", f"at most {TOKENS} .*tokens={TOKENS + 1}"),
        ({"messages": [{**USER, "content": 5}]}, "messages.0.content", "a string or a list of"),
        ({"stop": 5}, "stop", "it must be a string or a list of strings, got 5"),
        ({"stream": "yes"}, "stream", 'got "yes"'),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [{**USER, "role": "tool"}]}, "messages.0.role", 'got "tool"'),
        ({"messages": [{**USER, "name": "me"}]}, "messages.0.name", "is not supported"),
        ({"messages": [USER, USER]}, "messages", "in turn.*got user, user"),
        ({"messages": [{**USER, "role": "assistant"}]}, "messages", "the last of the user"),
        ({"messages": [USER, {**USER, "role": "system"}]}, "messages", "got user, system"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
            "should be 'text', got \"image_url\"",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "is required"),
        ({"model": None}, "model", "model is required"),
    ],
)
def test_what_is_wrong_or_not_supported_is_refused_by_name(
    client: Client, fields: Json, param: str, message: str
) -> None:
    status, answer, _ = client.ask(CHAT, body_of("a", **fields))
    assert status == 400 and set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert re.search(message, error["message"])


@pytest.mark.parametrize(
    ("path", "body", "method", "status", "code"),
    [
        (CHAT, b"{", "", 400, "invalid_json"),
        (CHAT, b"[]", "", 400, "invalid_json"),
        (CHAT, b'{"model": "base", "messages": NaN}', "", 400, "invalid_json"),
        (CHAT, b'{"model": "\\ud800"}', "", 400, "invalid_json"),
        (CHAT, b"\xff", "", 400, "invalid_json"),
        (CHAT, body_of("a", model="gpt-4"), "", 404, "model_not_found"),
        (CHAT, body_of("a room " * 4000), "", 400, "context_length_exceeded"),
        (CHAT, b" " * (MOST_BYTES + 1), "", 413, "request_too_large"),
        ("/v1/completions", {}, "", 404, None),
        ("/v2", None, "", 404, None),
        (CHAT, None, "GET", 405, None),
        ("/v1/models", {}, "POST", 405, None),
    ],
)
def test_every_error_has_openais_format(
    client: Client, path: str, body: Any, method: str, status: int, code: str | None
) -> None:
    got, answer, _ = client.ask(path, body, method=method)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["code"] == code and answer["error"]["message"]


def test_a_full_queue_is_said_and_free_again_later(service: Service) -> None:
    gate = threading.Event()
    slow = Wrapped(service.assistant.completer, lambda: bool(gate.wait(60)) and None)
    with serving(service, slow, queue=2) as client, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(client.chat, f"Question {n}") for n in range(2)]
        wait_until(lambda: client.in_progress() == 2)
        status, answer, headers = client.ask(CHAT, body_of("a"))
        assert (status, answer["error"]["code"]) == (503, "queue_full")
        assert answer["error"]["type"] == "server_error" and int(headers["Retry-After"]) > 0
        gate.set()
        assert all(text_of(each.result()) for each in running)
        assert client.in_progress() == 0
        client.chat()


def test_a_full_queue_costs_no_work_and_a_long_prompt_stops_nobody(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, written = threading.Event(), list[str]()
    write = Assistant.request

    def slowly(self: Assistant, label: Any, messages: Any, *rest: Any) -> Any:
        written.append(messages[-1]["content"])
        assert messages[-1]["content"] != "long" or gate.wait(60)
        return write(self, label, messages, *rest)

    monkeypatch.setattr(Assistant, "request", slowly)
    with serving(service, queue=1) as client, ThreadPoolExecutor(1) as pool:
        long = pool.submit(client.chat, "long")
        wait_until(lambda: written == ["long"])
        assert client.in_progress() == 0  # the event loop answers meanwhile
        gate.set()
        assert text_of(long.result())
        hold = threading.Event()
        slow = Wrapped(service.assistant.completer, lambda: bool(hold.wait(60)) and None)
        with serving(service, slow, queue=1) as busy:
            running = pool.submit(busy.chat, "first")
            wait_until(lambda: busy.in_progress() == 1)
            assert busy.ask(CHAT, body_of("second"))[0] == 503
            hold.set()
            running.result()
    assert written == ["long", "first"]


def test_who_waits_is_told_when_the_server_ends_beside_a_long_step(service: Service) -> None:
    gate = threading.Event()
    slow = Wrapped(service.assistant.completer, lambda: bool(gate.wait(60)) and None)

    async def ask() -> list[str]:
        scheduler = Scheduler(slow, 4)
        request = service.assistant.request(None, [{"role": "user", "content": "a"}], 4)
        running = scheduler.begin(request)
        while not slow.steps:
            await asyncio.sleep(0.01)
        answers = [running, scheduler.begin(request)]
        await asyncio.to_thread(scheduler.close)
        told = []
        for answer in answers:
            with pytest.raises(StoppingError) as caught:
                await asyncio.wait_for(anext(answer.tokens()), 10)
            told.append(str(caught.value))
        gate.set()
        return told

    try:
        assert len(asyncio.run(ask())) == 2
    finally:
        gate.set()
        service.assistant.completer.clear()


@pytest.mark.parametrize("stream", [True, False])
def test_the_work_for_a_client_that_leaves_ends(service: Service, stream: bool) -> None:
    slow = Wrapped(service.assistant.completer, lambda: time.sleep(0.02))
    with serving(service, slow) as client:
        # so that it does not end by itself: the tiny base never writes its end token here
        body = body_of("Book a room", model="base", max_tokens=TOKENS, stream=stream)
        connection = client.connect(CHAT, body)
        wait_until(lambda: slow.steps > 3)
        if stream:
            connection.getresponse().read(10)
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        wait_until(lambda: client.in_progress() == 0)
        assert slow.steps < TOKENS // 2
        steps = slow.steps
        client.chat(max_tokens=5)
        assert slow.steps - steps < 10  # the other request is not decoded any more


def test_a_failing_model_ends_its_requests_and_the_server_lives_on(service: Service) -> None:
    failures = [0]

    def fail() -> None:
        if failing.steps % 1000 == 4:
            failing.steps = 4
            failures[0] += 1
            raise RuntimeError("out of memory")

    inner: Any = service.assistant.completer
    failing = Wrapped(inner, fail)
    with serving(service, failing) as client:
        status, answer, _ = client.ask(CHAT, body_of("a"))
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "RuntimeError: out of memory" in answer["error"]["message"]
        assert inner.is_idle and not inner._decoder.items  # its caches are free
        expected = client.chat()  # the fifth step and later ones are well
        failing.steps = 0
        connection = client.connect(CHAT, body_of("Book a room", stream=True))
        lines = connection.getresponse().read().decode().strip().split("\n\n")
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "model_failed"
        assert text_of(client.chat()) == text_of(expected)
    assert failures == [2]


def test_a_completer_that_cannot_be_emptied_ends_all_requests(service: Service) -> None:
    class Broken(Wrapped):
        def clear(self) -> None:
            raise RuntimeError("the device is lost")

    def fail() -> None:
        raise RuntimeError("the device is lost")

    with serving(service, Broken(service.assistant.completer, fail)) as client:
        assert client.ask(CHAT, body_of("a"))[0] == 500
        wait_until(lambda: client.ask(CHAT, body_of("a"))[0] == 503)
        assert client.ask("/health")[0] == 503


# ---- who may come in -------------------------------------------------------------------------


def test_without_the_token_nothing_is_said(service: Service) -> None:
    with serving(replace(service, token="sécret", is_local=False)) as client:
        wrong: list[dict[str, str]] = [{}, {"Authorization": "Bearer secret"}, {"Host": "x?"}]
        for headers in (*wrong, {"Authorization": "sécret"}, {"Host": "x/y"}):
            status, answer, sent = client.ask("/v1/models", **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert sent["WWW-Authenticate"] == "Bearer"
        assert client.ask(CHAT, body_of("a"))[0] == 401
        right = "Bearer sécret".encode().decode("latin-1")
        assert client.ask("/v1/models", Authorization=right)[0] == 200
        assert client.ask("/health")[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_let_in_with_a_token_only(host: str) -> None:
    with pytest.raises(ConfigError, match="needs a token; set .* TINYLLAMA_LAB_TOKEN"):
        Address(host, 0, "").listen()
    try:
        listener, is_local = Address(host, 0, "secret").listen()
    except ConfigError as error:  # a machine without IPv6
        assert host == "::" and "cannot be used" in str(error)
        return
    listener.close()
    assert not is_local


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:9000"}, 200),  # through a tunnel
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "attacker.example"}, 403),  # a name that was pointed here
        ({"Host": "localhost.attacker.example:80"}, 403),
        ({"Host": "192.168.1.7"}, 403),
        ({"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
        ({"Host": "localhost:80", "Origin": "http://attacker.example"}, 403),
        ({"Host": "localhost:80", "Origin": "http://localhost:81"}, 403),
        ({"Host": "localhost:80", "Origin": "null"}, 403),
        ({"Host": "localhost:80", "Origin": "http://["}, 403),
    ],
)
def test_other_sites_cannot_use_a_server_of_this_machine(
    client: Client, headers: dict[str, str], status: int
) -> None:
    got, answer, sent = client.ask("/v1/models", **headers)
    assert got == status and ("error" in answer) == (status == 403)
    assert not any(name.lower().startswith("access-control") for name in sent)


# ---- the command -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["port=x"], "port must be an integer from 0, got 'x'"),
        (["port=70000"], "port must be at most 65535, got 70000"),
        (["queue=0"], "queue must be an integer from 1"),
        (["tokens=0"], "tokens must be an integer from 1"),
        (["device=tpu"], "device must be one of"),
        (["host=0.0.0.0"], "needs a token"),
        (["host=no.such.host.invalid"], "host must be an address of this machine"),
        (["host=192.0.2.1", "token=x"], "every user of this machine can see what is typed"),
        (["host=x..y"], "host must be an address of this machine"),
        (["temperature=1"], "this command takes .*got 'temperature=1'"),
    ],
)
def test_a_wrong_argument_is_refused_before_the_model_is_loaded(
    study: StudyFolder, arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINYLLAMA_LAB_TOKEN", raising=False)
    monkeypatch.setattr("tinyllama_lab.deploy.serving.serve.load", None)
    with pytest.raises(ConfigError, match=problem):
        main(["serve", f"sweeps_dir={study.root}", "study=tiny", "trial=r=4", *arguments])


def test_a_port_in_use_is_refused_in_one_sentence(study: StudyFolder) -> None:
    listener, _ = Address("127.0.0.1", 0, "").listen()
    port = listener.getsockname()[1]
    with pytest.raises(ConfigError, match=f"port={port} cannot be used .*port=0"):
        main(["serve", f"sweeps_dir={study.root}", "study=tiny", "trial=r=4", f"port={port}"])
    listener.close()


def test_the_command_prints_what_to_type_and_ends_in_the_middle_of_an_answer(
    study: StudyFolder, service: Service
) -> None:
    command = [sys.executable, "-m", "tinyllama_lab.deploy", "serve", f"sweeps_dir={study.root}"]
    options = ["study=tiny", "trial=r=4", "port=0", "tokens=1900"]
    process = subprocess.Popen(
        [*command, *options],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    first = process.stdout.readline()
    assert (found := re.search(r"http://127.0.0.1:(\d+) ", first)), process.communicate()[1]
    port = int(found[1])
    client = Client(port, service)
    body = body_of("a", **{**DRAWN, "max_tokens": 1900}, stream=True)
    response = client.connect(CHAT, body).getresponse()
    response.read(1000)  # some tokens
    process.send_signal(signal.SIGTERM)
    rest = response.read().decode()
    # `communicate` would not return what `readline` has buffered
    out, err = process.stdout.read(), process.stderr.read()
    assert process.wait(60) == 130, err
    assert '"code": "server_ends"' in rest
    assert "the server has ended" in err and "Traceback" not in err
    assert "curl http://127.0.0.1" in out and service.models[1] in out
    (line,) = [line for line in out.splitlines() if "vllm serve" in line]
    assert "--enable-lora --max-lora-rank 8 --max-loras 2 --lora-modules" in line
    template = Path(line.partition("--chat-template ")[2].split()[0])
    assert template == StudyFolder(study.root, "tiny").trials_dir / service.models[0] / (
        "adapter/chat_template.jinja"
    )
    assert "generation_prompt" in template.read_text()
    folders = dict(word.split("=", 1) for word in line.partition("--lora-modules ")[2].split())
    assert set(folders) == set(service.models)
    assert all((Path(path) / "adapter_config.json").is_file() for path in folders.values())


# ---- clients ---------------------------------------------------------------------------------


def test_openais_own_client_is_served(client: Client) -> None:
    openai = pytest.importorskip("openai", reason="the client of OpenAI is not installed")
    own = openai.OpenAI(
        base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0
    )
    assert {model.id for model in own.models.list()} > {"base", "default"}
    question: Any = {"model": "default", "messages": [USER], "max_tokens": 9}
    whole = own.chat.completions.create(**question)
    assert whole.usage.completion_tokens == 9 and whole.choices[0].finish_reason == "length"
    options = {"include_usage": True}
    events = list(own.chat.completions.create(**question, stream=True, stream_options=options))
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert events[-1].usage == whole.usage
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        own.chat.completions.create(**{**question, "model": "gpt-4"})
    with pytest.raises(openai.BadRequestError) as refused:
        own.chat.completions.create(**question, top_p=0.5)
    assert refused.value.param == "top_p"


# ---- the chat page ---------------------------------------------------------------------------

EVIL = "</div><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> <b>end</b>"


class Evil:
    """An assistant whose answers are markup."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def text_stream(self) -> Any:
        class Stream:
            def push(self, token: int) -> str:
                return EVIL

            def end(self) -> str:
                return ""

        return Stream()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start a headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed; CHROMIUM names one")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@contextmanager
def opened(browser: Any, client: Client, **options: Any) -> Iterator[Any]:
    """Open the page with its models; an error in the browser fails the test."""
    context = browser.new_context(**options)
    page, complaints, asked = context.new_page(), [], set[str]()
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.add(request.url))
    address = f"http://127.0.0.1:{client.port}/"
    page.goto(address)
    yield page
    context.close()
    assert all(url.startswith((address, "data:")) for url in asked)
    assert [text for text in complaints if "401" not in text] == []


def question(page: Any, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


@pytest.mark.slow
def test_the_page_shows_the_answers_of_an_adapter_and_of_the_base(
    client: Client, browser: Any
) -> None:
    with opened(browser, client, viewport={"width": 390, "height": 700}) as page:
        page.locator("#model option").nth(2).wait_for(state="attached")
        assert page.input_value("#model") == client.service.models[0]
        page.check("#compare")
        page.click("summary")
        page.fill("#tokens", "9")
        page.fill("#system", "Be brief.")
        question(page, "Book a room")
        page.get_by_text("9 tokens, ").nth(1).wait_for()
        messages = [{"role": "system", "content": "Be brief."}]
        messages.append({"role": "user", "content": "Book a room"})
        wanted = [
            text_of(client.chat(model=model, messages=messages, max_tokens=9))
            for model in (client.service.models[0], "base")
        ]
        assert page.locator(".text").all_text_contents() == wanted
        assert page.locator(".facts", has_text="tokens/s").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.click("#reset")
        assert page.locator(".turn").count() == 0


@pytest.mark.slow
def test_markup_in_an_answer_is_text_and_the_page_asks_for_the_token(
    service: Service, browser: Any
) -> None:
    evil: Any = Evil(service.assistant)
    with serving(replace(service, assistant=evil, token="secret")) as client:
        with opened(browser, client) as page:
            page.get_by_text("this server wants its token").wait_for()
            page.fill("#token", "secret")
            page.press("#token", "Tab")
            page.locator("#model option").nth(2).wait_for(state="attached")
            page.fill("#tokens", "2")
            question(page, EVIL)
            page.get_by_text("2 tokens, ").wait_for()
            assert page.locator(".text").text_content() == EVIL * 2
            assert page.locator(".question").text_content() == EVIL
            assert page.evaluate("window.hacked") is None
            assert page.locator("main img, main script, main b").count() == 0
