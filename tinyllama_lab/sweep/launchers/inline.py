"""The worker inside the driver's own process, for a debugger. Nothing is shown until it ends."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from tinyllama_lab.study.pack import Pack


class InlineWorker:
    """A worker that has already ended when it is there."""

    def __init__(self, exit_code: int) -> None:
        self._exit_code = exit_code

    def exit_code(self) -> int | None:
        """See `Worker`."""
        return self._exit_code

    def stop(self, patience_s: float) -> None:
        """Nothing is left to stop."""


class InlineWorkers:
    """Runs a pack to its end before it returns."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def start(self, pack: Pack) -> InlineWorker:
        """See `Workers`."""
        # by name: the driver half imports nothing of the worker half, except here, when asked to
        worker = importlib.import_module("tinyllama_lab.core.worker")
        return InlineWorker(int(worker.run_pack(pack.folder, self._stopped)))
