"""Decoding speed: time to the first token, and tokens per second after it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import Engine, WorkItem
from tinyllama_lab.core.evaluation.timing import Speed, measure_speed


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
    """Time the generation of a first token and `tokens` more for all examples.

    End tokens are ignored, so that every run generates the same number of tokens.
    """
    items = [WorkItem(adapter, example) for example in examples]

    def generate(count: int, tick: Callable[[], None]) -> None:
        engine.generate(items, count, stop=False, on_token=tick)

    # without waiting for the kernels, the clock would time only their launch
    settle = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
    return measure_speed(generate, tokens, len(items), settle)


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
