"""Chooses the tokens of a CPU's micro-batches by measuring sizes in the first rounds.

Larger micro-batches make better matmuls and take more memory. Where the gain ends depends on
caches, cores and model. The choice changes speed and rounding, never what a trial asks for. With
`train.deterministic` the size is fixed, because it decides the order of sums.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tinyllama_lab.core.context import CPU_TOKENS, WorkerContext
from tinyllama_lab.core.engines.packed import kernels
from tinyllama_lab.data.cache import cache_dir
from tinyllama_lab.study.files import write_atomic
from tinyllama_lab.study.machine import cpu_name

SIZES = (CPU_TOKENS, 2 * CPU_TOKENS, 4 * CPU_TOKENS)
ROUNDS = 4  # of each size; the first one also prepares the kernels for new shapes


class MicroBatchSize:
    """The size for every round of a pool: some in turn at first, then the best one."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._chosen: int | None = None
        self._speeds: dict[int, list[float]] = {}  # tokens/s of the rounds so far, by size

    def begin(self) -> None:
        """Set the size of the shared context, which another pool may have changed."""
        self._context.measured_tokens = self._chosen

    def next(self, round_tokens: int, fitting: Sequence[int]) -> int:
        """Return the size for the next round.

        Args:
            round_tokens: of all batches; a size that holds them all ends the candidates.
            fitting: sizes for which there is memory, in ascending order; empty if the size must
                not be chosen.
        """
        context = self._context
        is_given = context.hardware.micro_batch_tokens or context.fitting_tokens
        if self._chosen is not None or is_given:
            return context.micro_batch_tokens
        if not self._speeds:
            pairs = zip((0, *fitting), fitting, strict=False)
            useful = [size for smaller, size in pairs if smaller < round_tokens]
            if len(useful) < 2:  # a later round may have more tokens
                return context.micro_batch_tokens
            if (stored := self._stored(useful)) is not None:
                self._chosen = context.measured_tokens = stored
                return context.micro_batch_tokens
            self._speeds = {size: [] for size in useful}
        # in turn, so that a change of the machine's speed meets all sizes alike
        self._context.measured_tokens = min(self._speeds, key=lambda n: len(self._speeds[n]))
        return context.micro_batch_tokens

    def note(self, tokens: int, seconds: float) -> str | None:
        """Record a round of `next`'s size; return what was measured once a size is chosen."""
        size = self._context.measured_tokens
        if self._chosen is not None or size not in self._speeds or self._context.fitting_tokens:
            return None
        self._speeds[size].append(tokens / seconds)
        if any(len(speeds) < ROUNDS for speeds in self._speeds.values()):
            return None
        chosen = best_size(self._speeds)
        self._chosen = self._context.measured_tokens = chosen
        self._store(chosen)
        speeds = {n: round(statistics.median(found)) for n, found in self._speeds.items()}
        measured = ", ".join(f"{speed} tokens/s at {n}" for n, speed in speeds.items())
        return f"micro-batches of {chosen} tokens from now on: measured {measured}"

    def _stored(self, sizes: Sequence[int]) -> int | None:
        """Return the largest useful size up to the stored choice, if all sizes were measured."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads(self._file().read_text(encoding="utf-8"))
            if set(sizes) <= set(stored["measured"]):
                return max(n for n in sizes if n <= int(stored["tokens"]))
        return None

    def _store(self, chosen: int) -> None:
        facts = {"tokens": chosen, "measured": list(self._speeds), "for": self._facts()}
        with contextlib.suppress(OSError):  # a full cache: the next worker measures again
            write_atomic(self._file(), json.dumps(facts, indent=2) + "\n")

    def _file(self) -> Path:
        """Return a file in the user's cache for this machine, base and precision."""
        key = hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode()).hexdigest()
        return cache_dir() / f"micro-batch-{key[:16]}.json"

    def _facts(self) -> dict[str, Any]:
        base, config = self._context.base, self._context.base.model.config
        return {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "fused_loops": kernels.can_run(torch.empty(1, dtype=base.dtype)),
            "model": [base.parameters, config.num_hidden_layers, config.hidden_size],
            "weights": base.weights,
            "dtype": str(base.dtype),
            "keep_dequantized": self._context.hardware.keep_dequantized,
        }


def best_size(speeds: dict[int, list[float]]) -> int:
    """Return the smallest size that no larger one beats by more than the spread of the rounds.

    The spread is the median distance from the median, the larger of both sizes.

    Args:
        speeds: tokens/s of every round, by size in ascending order.
    """
    best, *larger = speeds
    for size in larger:
        gain = statistics.median(speeds[size]) - statistics.median(speeds[best])
        if gain > max(_spread(speeds[size]), _spread(speeds[best])):
            best = size
    return best


def _spread(values: Sequence[float]) -> float:
    middle = statistics.median(values)
    return statistics.median(abs(value - middle) for value in values)
