"""Handles Ctrl-C and SIGTERM at points where no operation is half done.

Python raises KeyboardInterrupt between any two instructions. Inside a database transaction that
leaves an inconsistent state, and inside a finalizer the exception is lost. While the driver
follows workers, the first signal is therefore only recorded, and its loop ends at the next turn.
A second signal raises at once. A message is printed when the signal arrives, because saving the
trained state may take seconds.
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
    """Receives the signals that ask a driver to stop. `came` says whether one has arrived."""

    def __init__(self) -> None:
        self.came = False
        self._deferring = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle SIGTERM, which a cluster or a shutdown sends, like Ctrl-C.

        Outside the main thread this does nothing: Python delivers signals only to the main
        thread, and the surrounding program handles them there.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        # the surrounding program, such as a notebook, gets its own handlers back
        before = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record the first signal; the code inside must call `check` regularly."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived."""
        if self.came:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: Any) -> None:
        # the second signal raises at once, even inside a transaction
        if self._deferring and not self.came:
            self.came = True
            _answer()
            return
        raise KeyboardInterrupt


def _answer() -> None:
    """Print `ANSWER` with a system call: the signal may have interrupted a buffered write."""
    with suppress(OSError, ValueError, AttributeError):  # no standard error, or it is closed
        os.write(sys.stderr.fileno(), f"\n{ANSWER}\n".encode())
