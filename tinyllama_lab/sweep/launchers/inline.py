"""Runs the worker inside the driver's process, for a debugger. No progress is shown."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from tinyllama_lab.study.pack import Pack
from tinyllama_lab.sweep.launchers import Workers


class InlineWorker:
    """A worker that has ended before it is returned."""

    def __init__(self, exit_code: int) -> None:
        self._exit_code = exit_code

    def exit_code(self) -> int | None:
        """See `Worker`."""
        return self._exit_code

    def stop(self, patience_s: float) -> None:
        """Do nothing: the worker has ended."""


def workers(stopped: Callable[[], bool]) -> Workers:
    """See `tinyllama_lab.sweep.launchers.workers`."""
    return InlineWorkers(stopped)


class InlineWorkers:
    """Runs each pack to its end inside `start`."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def start(self, pack: Pack) -> InlineWorker:
        """See `Workers`."""
        # by name: the driver must not import the worker, whose torch takes seconds to load
        worker = importlib.import_module("tinyllama_lab.core.worker")
        return InlineWorker(int(worker.run_pack(pack.folder, self._stopped)))

    def close(self) -> None:
        """Do nothing: nothing was started ahead."""
