"""Ctrl-C and SIGTERM, taken where nothing is cut in two.

Python raises KeyboardInterrupt between any two instructions: inside a database transaction it
leaves a mess, inside a finalizer it is lost. While a worker is followed, a signal is therefore
only noted, and the loop that follows ends at its next turn. A second one is raised at once.
The user is answered when the signal comes, because saving what is trained may take seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

ANSWER = "stopping: what is trained is saved; press Ctrl-C again to stop without saving"


class Interrupts:
    """The signals that ask a driver to stop."""

    def __init__(self) -> None:
        self.came = False
        self._deferring = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Treat a SIGTERM, as a cluster or a shutdown sends it, as Ctrl-C is treated.

        In any thread but the main one, signals stay with the program around: Python delivers them
        to the main thread alone.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note the first signal; whoever enters calls `check` now and then."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def check(self) -> None:
        """Raise KeyboardInterrupt where a signal has come."""
        if self.came:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: Any) -> None:
        if self._deferring and not self.came:
            self.came = True
            _answer()
            return
        raise KeyboardInterrupt


def _answer() -> None:
    """Print `ANSWER` past Python's buffers, which the signal may have come in the middle of."""
    with suppress(OSError, ValueError, AttributeError):  # no standard error, or it is closed
        os.write(sys.stderr.fileno(), f"\n{ANSWER}\n".encode())
