"""Trains and scores a stream of trials, each with the engine that supports it.

The driver sends trials one after another while others train. A pack whose trials are all
known from the start is a stream that is already closed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from tinyllama_lab.config.variants import VARIANTS
from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.engines.base import Engine
from tinyllama_lab.core.engines.packed.any_decoder import has_own_products
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.packed.llama import why_not_llama
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.evaluation.bases import Bases
from tinyllama_lab.core.models import lora
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.training.attempt import Attempt
from tinyllama_lab.core.training.pack_check import why_not_packed
from tinyllama_lab.core.training.pool import Pool
from tinyllama_lab.core.training.rungs import LOOK_EVERY_S
from tinyllama_lab.core.training.tasks import make_attempts
from tinyllama_lab.errors import ModelError
from tinyllama_lab.study.pack import Arrivals, Task


class TrialStream:
    """The trials of a stream, sorted by the engine that supports them."""

    def __init__(self, context: WorkerContext, arrivals: Arrivals, tasks: Sequence[Task]) -> None:
        self._context = context
        self._arrivals = arrivals
        self._packed: list[Attempt] = []
        self._unpacked: list[Attempt] = []
        self._add(tasks)

    @property
    def is_closed(self) -> bool:
        """Return whether no more trials will come."""
        return self._arrivals.closed

    def take(self, packed: bool) -> list[Attempt]:
        """Return the trials of one engine that have arrived since the last call."""
        self._add(self._arrivals.poll())
        queue = self._packed if packed else self._unpacked
        attempts = list(queue)
        queue.clear()
        return attempts

    def wait(self) -> bool | None:
        """Wait for a trial; return whether the next to run is packed.

        Return None when all trials have run and no more will come.

        Raises:
            StoppedError: the worker was asked to stop.
        """
        while not (self._packed or self._unpacked):
            if self._arrivals.closed:
                return None
            self._context.check_stop()
            # tasks come through a file, which gives no signal
            time.sleep(LOOK_EVERY_S)
            self._add(self._arrivals.poll())
        return bool(self._packed)

    def engine(self, packed: bool, deterministic: bool) -> Engine[Any]:
        """Return the engine for the trials that can be packed, or for the others."""
        base = self._context.base
        if not packed:
            return PeftEngine(base)
        keep_dequantized = self._context.hardware.keep_dequantized
        # sharing a matmul changes the last bits of a result, depending on the other trials
        return PackedEngine(base, not deterministic, keep_dequantized)

    @cached_property
    def _why_not_packed(self) -> str | None:
        # before the first engine: PEFT replaces the modules that this looks at
        return why_not_packed(self._context.base, self._context.hardware.workers or 1)

    def _add(self, tasks: Sequence[Task]) -> None:
        # a restarted worker reads all tasks again, also those that already have a result
        open_tasks = [task for task in tasks if task.read_result() is None]
        attempts = make_attempts(self._context, open_tasks)
        packed, unpacked = split_by_engine(
            self._context.base, attempts, lambda: self._why_not_packed
        )
        self._packed += packed
        self._unpacked += unpacked


def run_stream(
    context: WorkerContext, bases: Bases, stream: TrialStream, deterministic: bool
) -> None:
    """Train and score all trials until the stream is closed and empty.

    Raises:
        StoppedError: the worker was asked to stop.
    """
    pools: dict[bool, Pool] = {}
    # a pool stays for later trials of its kind, and with it what it has learned about memory
    while (packed := stream.wait()) is not None:
        if stream.is_closed:  # the other engine is not needed again: free its memory
            pools.pop(not packed, None)
        if packed not in pools:
            pools[packed] = Pool(context, stream.engine(packed, deterministic), bases)
        # PEFT changes the base's modules while an adapter is attached, so no trial can be sorted
        arriving = partial(stream.take, packed) if packed else tuple
        pools[packed].run(stream.take(packed), arriving)


def split_by_engine(
    base: Base, attempts: Sequence[Attempt], why_not: Callable[[], str | None]
) -> tuple[list[Attempt], list[Attempt]]:
    """Return the attempts that can be packed, and those that need PEFT; others fail here.

    Each result records its engine, and why it was not the fastest one. `why_not` returns why no
    adapter of the base can be packed; it is asked only for settings that fit the base.
    """
    slower = why_not_llama(base.model)
    engine = f"packed in transformers ({slower})" if slower else "packed"
    packed: list[Attempt] = []
    unpacked: list[Attempt] = []
    for attempt in attempts:
        try:
            lora.check(base.model, attempt.science.lora)
            why = attempt.science.lora.not_packed or why_not()
            if why is None and slower and _needs_plain_products(base, attempt):
                why = "DoRA scales products that only their own layers compute"
            _check_weights(base, attempt)
            _check_init(attempt, why)
        except ModelError as error:
            attempt.fail(error)
            continue
        if note := lora.left_out(base.model, attempt.science.lora):
            attempt.log.append("note", text=note)
        if why:
            attempt.log.append("note", text=f"trains one adapter at a time, not in a pack: {why}")
        attempt.result.environment["engine"] = engine if why is None else f"peft ({why})"
        (unpacked if why else packed).append(attempt)
    return packed, unpacked


def _needs_plain_products(base: Base, attempt: Attempt) -> bool:
    reads_weights = VARIANTS[attempt.science.lora.variant].reads_weights
    return reads_weights and has_own_products(base.model)


def _check_init(attempt: Attempt, why_not_packed: str | None) -> None:
    """Refuse first values that PEFT takes out of the weights, which other trials share."""
    settings = attempt.science.lora
    if settings.shifts_base and why_not_packed:
        raise ModelError(
            f"lora.init={settings.init} needs adapters that can be packed, got a base where they "
            f"cannot ({why_not_packed}); set lora.init=default"
        )


def _check_weights(base: Base, attempt: Attempt) -> None:
    """Refuse DoRA on an int8 base on a CPU.

    There the first matmul quantizes int8 weights, and DoRA reads them before it.
    """
    quant, variant = attempt.science.quant.kind, attempt.science.lora.variant
    on_cpu = quant == "int8" and base.device.type == "cpu"
    if on_cpu and VARIANTS[variant].reads_weights:
        raise ModelError(
            f"lora.variant={variant} needs a GPU on an int8 base, got the CPU; "
            "set lora.variant=lora, or quant=nf4"
        )
