"""Decoding speed: time to the first token, and tokens per second after it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import Engine, WorkItem

_REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """Decoding speed of every repeat.

    Attributes:
        first_ms: milliseconds to the first token of every row.
        tokens_per_s: tokens a second after it, summed over all rows.
    """

    first_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)


def prompts(heldout: Sequence[Example], count: int) -> list[Example]:
    """Return `count` examples, starting again from the first if there are fewer."""
    return list(itertools.islice(itertools.cycle(heldout), count))


def measure(
    engine: Engine[Any],
    adapter: Any,
    examples: Sequence[Example],
    tokens: int,
    device: torch.device,
) -> Speed:
    """Time the generation of a first token and `tokens` more for all examples, three times.

    A short warm-up run is not timed. End tokens are ignored, so that every run generates the
    same number of tokens.
    """
    items = [WorkItem(adapter, example) for example in examples]
    # two tokens, so that the prompt's pass and a decoding step have both run once
    _ticks(engine, items, 2, device)
    speed = Speed()
    for _ in range(_REPEATS):
        ticks = _ticks(engine, items, tokens + 1, device)
        speed.first_ms.append(1000 * (ticks[1] - ticks[0]))
        # 1e-9: a coarse clock may not have moved in between
        speed.tokens_per_s.append(len(items) * tokens / max(ticks[-1] - ticks[1], 1e-9))
    return speed


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the median under `name`, and minimum and maximum under `_min` and `_max`."""
    return {
        name: statistics.median(values),
        f"{name}_min": min(values),
        f"{name}_max": max(values),
    }


def speed_metrics(speed: Speed, prefix: str = "perf/") -> dict[str, float]:
    """Return time to first token and tokens per second, by metric name."""
    return {
        **spread(f"{prefix}first_token_ms", speed.first_ms),
        **spread(f"{prefix}decode_tokens_per_s", speed.tokens_per_s),
    }


def _ticks(
    engine: Engine[Any], items: list[WorkItem[Any]], tokens: int, device: torch.device
) -> list[float]:
    """Return clock readings in seconds: at the beginning, then after every token."""
    ticks: list[float] = []

    def tick() -> None:
        if device.type == "cuda":
            # without waiting for the kernels, the clock would time only their launch
            torch.cuda.synchronize(device)
        ticks.append(time.perf_counter())

    tick()
    engine.generate(items, tokens, stop=False, on_token=tick)
    return ticks
