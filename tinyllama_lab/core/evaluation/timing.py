"""How fast tokens are generated, whatever generates them. Nothing here imports torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_REPEATS = 3
# generates as many tokens as the first argument says, and calls the second after each of them
Generate = Callable[[int, Callable[[], None]], Any]


@dataclass(frozen=True)
class Speed:
    """Decoding speed of every repeat.

    Attributes:
        first_ms: milliseconds to the first token of every row.
        tokens_per_s: tokens a second after it, summed over all rows.
    """

    first_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)


def measure_speed(
    generate: Generate, tokens: int, rows: int = 1, settle: Callable[[], None] | None = None
) -> Speed:
    """Time the generation of a first token and `tokens` more, three times.

    A short warm-up run is not timed.

    Args:
        generate: see `Generate`; it must not stop at an end token.
        tokens: after the first one.
        rows: how many rows each call generates.
        settle: waits for the device, before the clock is read.
    """
    # two tokens, so that the prompt's pass and a decoding step have both run once
    _ticks(generate, 2, settle)
    speed = Speed()
    for _ in range(_REPEATS):
        ticks = _ticks(generate, tokens + 1, settle)
        speed.first_ms.append(1000 * (ticks[1] - ticks[0]))
        # 1e-9: a coarse clock may not have moved in between
        speed.tokens_per_s.append(rows * tokens / max(ticks[-1] - ticks[1], 1e-9))
    return speed


def _ticks(generate: Generate, tokens: int, settle: Callable[[], None] | None) -> list[float]:
    """Return clock readings in seconds: at the beginning, then after every token."""
    ticks: list[float] = []

    def tick() -> None:
        if settle is not None:
            settle()
        ticks.append(time.perf_counter())

    tick()
    generate(tokens, tick)
    return ticks
