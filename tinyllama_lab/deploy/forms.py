"""What is measured of each form of a model, and how its speed and memory are taken.

Nothing here imports torch: a process that measures a GGUF file has llama.cpp's memory alone.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama_lab.metrics import MIB

REPEATS = 3  # of the timed generation


@dataclass(frozen=True)
class Task:
    """What a process measures.

    `examples` have `ids`, `loss_mask` and `prompt_ids`. `answers` are token ids of the adapter as
    trained; None where this is the form that generates them.
    """

    form: str  # `base`, `adapter`, `merged` or the type of a GGUF file
    trial: str  # folder of the trial
    path: str | None  # of the merged model or the file
    device: str
    tokens: int  # the most of an answer
    prompts: int  # how many examples are answered
    examples: list[dict[str, Any]]
    answers: list[list[int]] | None


@dataclass(frozen=True)
class Measured:
    """What was measured of one form."""

    losses: list[float]  # nats, summed over the supervised tokens of every example
    answers: list[list[int]]  # greedy, without end tokens
    texts: list[str]  # of the answers
    same_tokens: float | None  # share of the tokens of `Task.answers` that it would choose too
    decode_tokens_per_s: float
    first_token_ms: float
    resident_mib: float  # the highest while it gives one answer
    same_prompts: bool = True  # it reads the prompts as the tokens of training
    dtype: str = ""  # in which it computes


def share_of_same(chosen: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """Return the share of tokens of the answers that are chosen too, each after the true ones."""
    pairs = [p for a, b in zip(chosen, answers, strict=True) for p in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / max(len(pairs), 1)


def timed(generate: Callable[[int, Callable[[], None]], Any], tokens: int) -> tuple[float, float]:
    """Return milliseconds to the first token, and tokens a second after it, as medians.

    A short generation before is not timed.
    """
    generate(2, lambda: None)
    first_ms, speeds = [], []
    for _ in range(REPEATS):
        ticks = _ticks(generate, tokens + 1)
        first_ms.append(1000 * (ticks[1] - ticks[0]))
        speeds.append(tokens / max(ticks[-1] - ticks[1], 1e-9))
    return statistics.median(first_ms), statistics.median(speeds)


def _ticks(generate: Callable[[int, Callable[[], None]], Any], tokens: int) -> list[float]:
    """Return clock readings in seconds: at the beginning, then after every token."""
    ticks = [time.perf_counter()]
    generate(tokens, lambda: ticks.append(time.perf_counter()))
    return ticks


def peak_resident_mib() -> float:
    """Return the highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` of Linux contains the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
