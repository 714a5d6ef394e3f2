"""The end of the whole command: no check is waited for beyond it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from tinyllama_lab.sweep.doctor.finding import Finding, warning

T = TypeVar("T")
PATIENT = "python -m tinyllama_lab plan -m, with the same settings"  # has no deadline


class Deadline:
    """The moment at which everything must be said."""

    def __init__(self, seconds: float, began: float | None = None) -> None:
        """Set it.

        Args:
            seconds: until then.
            began: when they began, by `time.monotonic`; None: now.
        """
        self._end = (time.monotonic() if began is None else began) + seconds

    def left(self) -> float:
        """Return the seconds until then, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def start(self, function: Callable[[], T], at_most_s: float = math.inf) -> Callable[[], T]:
        """Start a function, and return one that waits for its value.

        That one raises `TimeoutError` at the deadline, or `at_most_s` after the start if this
        comes first.
        """
        future: Future[T] = Future()
        end = min(self._end, time.monotonic() + at_most_s)

        def work() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # raised where the value is waited for
                future.set_exception(error)

        # no timeout ends the look-up of a name or the reading of a network disk, so the function
        # is left alone in a thread, which does not keep the process from ending
        threading.Thread(target=work, daemon=True).start()
        return lambda: future.result(max(0.0, end - time.monotonic()))


def in_time(topic: str, findings: Callable[[], list[Finding]], remedy: str) -> Iterator[Finding]:
    """Yield what a check found, or that it did not end in time.

    Args:
        topic: of the line that says so.
        findings: of `Deadline.start`.
        remedy: what to do then.
    """
    try:
        yield from findings()
    except TimeoutError:
        yield late(topic, remedy)


def late(topic: str, remedy: str) -> Finding:
    """Return the line of a check that did not end in time."""
    return warning(topic, f"not checked in time; {remedy}")
