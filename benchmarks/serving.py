"""How fast the server answers many requests together, and whether its memory stays.

    python -m benchmarks.serving                # 32 requests to 4 adapters: together, and in turn
    python -m benchmarks.serving --soak 2000    # memory over 2,000 requests

Needs a study with adapters, such as that of `make demo`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil

from tinyllama_lab.config.command import SWEEPS_DIR
from tinyllama_lab.metrics import MIB

ADAPTERS = 4
QUESTIONS = (
    "Book me a room in Paris for two nights.",
    "When does the last train to the airport leave?",
    "Cancel my flight on Friday, please.",
    "Which restaurants near the station are open late?",
)
SOAK_CLIENTS, SOAK_TOKENS, SOAK_LINES = 8, 4, 10
LEAVES = 10  # every tenth client of the soak leaves in the middle of its answer


@dataclass(frozen=True)
class Running:
    """A server in a process of its own."""

    process: psutil.Process
    port: int

    def ask(self, path: str, body: dict[str, Any] | None = None, whole: bool = True) -> Any:
        """Return the JSON of an answer; with `whole=False`, leave after its first bytes.

        Raises:
            RuntimeError: the answer is an error.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
        response = connection.getresponse()
        text = response.read() if whole else response.read(1)
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"the server must answer, got {response.status}: {text.decode()}")
        return json.loads(text) if whole else None

    def chat(self, model: str, number: int, tokens: int, whole: bool = True) -> tuple[float, str]:
        """Return the seconds that an answer took, and its text."""
        messages = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
        body = {"model": model, "messages": messages, "max_tokens": tokens, "stream": not whole}
        begin = time.perf_counter()
        answer = self.ask("/v1/chat/completions", body, whole)
        text = answer["choices"][0]["message"]["content"] if whole else ""
        return time.perf_counter() - begin, text

    def adapters(self) -> list[str]:
        """Return the models that are adapters."""
        cards = self.ask("/v1/models")["data"]
        return [card["id"] for card in cards if card["parent"] and card["id"] == card["root"]]

    def resident_mib(self) -> float:
        """Return the resident memory of the server."""
        return float(self.process.memory_info().rss) / MIB


@contextmanager
def server(study: Sequence[str]) -> Iterator[Running]:
    """Start a server on a free port, and end it."""
    command = [sys.executable, "-m", "tinyllama_lab.deploy", "serve", "port=0", *study]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start; its message is above")
        yield Running(psutil.Process(process.pid), int(found[1]))
    finally:
        process.terminate()
        process.communicate()


def compare(running: Running, requests: int, tokens: int) -> None:
    """Print what the same requests take one after another and together."""
    models = running.adapters()[:ADAPTERS]
    work = [(models[n % len(models)], n // len(models), tokens) for n in range(requests)]
    for model in models:  # the first answers are slower
        running.chat(model, 0, 2)
    begin = time.perf_counter()
    alone = [running.chat(*each) for each in work]
    alone_s = time.perf_counter() - begin
    # the wait of each, if all had come at the same time
    turns = [sum(seconds for seconds, _ in alone[: n + 1]) for n in range(requests)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(requests) as pool:
        together = list(pool.map(lambda each: running.chat(*each), work))
    together_s = time.perf_counter() - begin
    same = sum(a == b for (_, a), (_, b) in zip(alone, together, strict=True))
    print(f"{requests} requests to {len(models)} adapters, {tokens} tokens at most:\n")
    print("| | p50 of the wait, s | until all are answered, s |\n|---|---|---|")
    print(f"| one after another | {median(turns):.2f} | {alone_s:.2f} |")
    print(f"| together | {median(seconds for seconds, _ in together):.2f} | {together_s:.2f} |")
    print(f"\nalone on the server, p50 {median(seconds for seconds, _ in alone):.2f} s;", end=" ")
    print(f"{same} of {requests} answers have the same text both ways")


def soak(running: Running, requests: int) -> None:
    """Print the server's resident memory while many requests come and some clients leave."""
    models = [*running.adapters(), "base"]

    def ask(number: int) -> None:
        model, whole = models[number % len(models)], number % LEAVES > 0
        running.chat(model, number, SOAK_TOKENS if whole else 100, whole)

    print("| requests | resident, MiB |\n|---|---|")
    print(f"| 0 | {running.resident_mib():,.0f} |", flush=True)
    step = -(-requests // SOAK_LINES)
    begin = time.perf_counter()
    with ThreadPoolExecutor(SOAK_CLIENTS) as pool:
        for first in range(0, requests, step):
            last = min(first + step, requests)
            list(pool.map(ask, range(first, last)))
            print(f"| {last} | {running.resident_mib():,.0f} |", flush=True)
    seconds = time.perf_counter() - begin
    left = running.ask("/health")["in_progress"]
    print(f"\n{requests / seconds:.1f} requests/s; {left} in progress at the end")


def main() -> None:
    """Measure one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--study", default="quickstart")
    parser.add_argument("--sweeps-dir", default=SWEEPS_DIR)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24, help="the most of an answer")
    parser.add_argument("--soak", type=int, default=0, help="requests of the memory test")
    arguments = parser.parse_args()
    with server([f"study={arguments.study}", f"sweeps_dir={arguments.sweeps_dir}"]) as running:
        if arguments.soak:
            soak(running, arguments.soak)
        else:
            compare(running, arguments.requests, arguments.tokens)


if __name__ == "__main__":
    main()
