"""Chooses the tokens of a CPU's micro-batches by measuring sizes in the first rounds.

Larger micro-batches make better matmuls and take more memory. Where the gain ends depends on
caches, cores and model. The choice changes speed and rounding, never what a trial asks for. With
`train.deterministic` the size is fixed, because it decides the order of sums.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tinyllama_lab.core.context import CPU_TOKENS, WorkerContext
from tinyllama_lab.core.engines.packed import fused_cpu
from tinyllama_lab.data.cache import cache_dir
from tinyllama_lab.errors import CacheError
from tinyllama_lab.study.files import write_atomic
from tinyllama_lab.study.machine import cpu_name

logger = logging.getLogger(__name__)

SIZES = (CPU_TOKENS, 2 * CPU_TOKENS, 4 * CPU_TOKENS)
ROUNDS = 4  # of each size; the first one also prepares the kernels for new shapes


class MicroBatchSize:
    """The size for every round of a pool: some in turn at first, then the best one.

    Larger rounds, in which more sizes differ, are measured when they come.

    Measurements are kept in the user's cache after every round, so short runs add up.
    """

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._chosen: int | None = None
        self._speeds: dict[int, list[float]] | None = None  # tokens/s of the rounds, by size
        self._useful: list[int] = []  # sizes that differ for the round at hand

    def begin(self) -> None:
        """Set the size of the shared context, which another pool may have changed."""
        self._context.measured_tokens = self._chosen

    @property
    def is_chosen(self) -> bool:
        """Return whether a size won; until then all of them are taken in turn."""
        return self._chosen is not None

    def next(self, round_tokens: int, fitting: Sequence[int]) -> int:
        """Return the size for the next round.

        Args:
            round_tokens: of all batches; a size that holds them all ends the candidates.
            fitting: sizes for which there is memory, in ascending order; empty if the size must
                not be chosen.
        """
        context = self._context
        pairs = zip((0, *fitting), fitting, strict=False)
        self._useful = [size for smaller, size in pairs if smaller < round_tokens]
        is_given = context.hardware.micro_batch_tokens or context.fitting_tokens
        if is_given or len(self._useful) < 2:
            self._useful = []
            return context.micro_batch_tokens
        if self._speeds is None:
            self._speeds = self._stored()
        speeds = self._speeds_of_useful()
        if _are_measured(speeds):
            self._chosen = context.measured_tokens = best_size(speeds)
        else:
            # in turn, so that a change of the machine's speed meets all sizes alike; the largest
            # first, because it is most often the best
            fewest = min(map(len, speeds.values()))
            context.measured_tokens = max(n for n, of in speeds.items() if len(of) == fewest)
        return context.micro_batch_tokens

    def note(self, tokens: int, seconds: float) -> str | None:
        """Record a round of `next`'s size; return what was measured once a size is chosen."""
        size, speeds = self._context.measured_tokens, self._speeds_of_useful()
        if size not in speeds or _are_measured(speeds) or self._context.fitting_tokens:
            return None
        speeds[size].append(round(tokens / seconds, 1))
        self._store()
        if not _are_measured(speeds):
            return None
        self._chosen = self._context.measured_tokens = best_size(speeds)
        medians = {n: round(statistics.median(of)) for n, of in speeds.items()}
        measured = ", ".join(f"{speed} tokens/s at {n}" for n, speed in medians.items())
        return f"micro-batches of {self._chosen} tokens from now on: measured {measured}"

    def _speeds_of_useful(self) -> dict[int, list[float]]:
        if self._speeds is None:
            return {}
        return {size: self._speeds.setdefault(size, []) for size in self._useful}

    def _stored(self) -> dict[int, list[float]]:
        """Return the tokens/s that earlier workers measured for each size, maybe none."""
        try:
            stored = json.loads(self._file().read_text(encoding="utf-8"))["tokens_per_s"]
            return {int(n): [float(speed) for speed in speeds] for n, speeds in stored.items()}
        except (OSError, CacheError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _store(self) -> None:
        speeds = self._stored()  # another worker may have measured meanwhile
        for size, rounds in (self._speeds or {}).items():
            speeds[size] = max(speeds.get(size, []), rounds, key=len)
        stored = {"for": self._facts(), "tokens_per_s": speeds}
        try:
            write_atomic(self._file(), json.dumps(stored, indent=2) + "\n")
        except (OSError, CacheError) as error:  # the next worker measures again
            logger.warning("the speed of micro-batches was not kept: %s", error)

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
            "fused_loops": fused_cpu.can_run(torch.empty(1, dtype=base.dtype)),
            "model": [base.parameters, config.num_hidden_layers, config.hidden_size],
            "weights": base.weights,
            "dtype": str(base.dtype),
            "keep_dequantized": self._context.hardware.keep_dequantized,
        }


def _are_measured(speeds: dict[int, list[float]]) -> bool:
    return all(len(rounds) >= ROUNDS for rounds in speeds.values())


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
