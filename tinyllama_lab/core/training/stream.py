"""A stream of trials: the driver hands them over one after another while others train."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.evaluation.bases import Bases
from tinyllama_lab.core.training.attempt import Attempt, take_up
from tinyllama_lab.core.training.pool import Pool
from tinyllama_lab.core.training.select import sort_out
from tinyllama_lab.study.pack import Arrivals, Task

LOOK_EVERY_S = 0.05  # while there is nothing to do


class TrialStream:
    """Trials as they come, by the engine that carries them."""

    def __init__(self, context: WorkerContext, arrivals: Arrivals, first: Sequence[Task]) -> None:
        self._context = context
        self._arrivals = arrivals
        self._packed: list[Attempt] = []
        self._single: list[Attempt] = []
        self._enter(first)

    def take(self, packed: bool) -> list[Attempt]:
        """Those of one engine that came since."""
        self._enter(self._arrivals.poll())
        waiting = self._packed if packed else self._single
        taken = list(waiting)
        waiting.clear()
        return taken

    def wait(self) -> bool | None:
        """Whether the next to run is packed; None where all have run and no more will come.

        Raises:
            StoppedError: the worker was told to stop.
        """
        while not (self._packed or self._single):
            if self._arrivals.closed:
                return None
            self._context.check_stop()
            time.sleep(LOOK_EVERY_S)
            self._enter(self._arrivals.poll())
        return bool(self._packed)

    def _enter(self, tasks: Sequence[Task]) -> None:
        missing = [task for task in tasks if task.read_result() is None]
        packed, single = sort_out(self._context.base, take_up(self._context, missing))
        self._packed += packed
        self._single += single


def run_stream(
    context: WorkerContext, bases: Bases, stream: TrialStream, deterministic: bool
) -> None:
    """Train and score all that come, until the driver says that no more do.

    Raises:
        StoppedError: the worker was told to stop.
    """
    pools: dict[bool, Pool] = {}
    base, keep_dequantized = context.base, context.hardware.keep_dequantized
    while (packed := stream.wait()) is not None:
        if packed not in pools:
            engine = (
                PackedEngine(base, (), not deterministic, keep_dequantized)
                if packed
                else PeftEngine(base)
            )
            pools[packed] = Pool(context, engine, bases)
        # PEFT changes the base's modules while an adapter is on it: nobody can be sorted in then
        arriving = partial(stream.take, packed) if packed else tuple
        pools[packed].run(stream.take(packed), arriving)
