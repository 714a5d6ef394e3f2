"""Limits the time and memory of what a setting or a model's folder makes this process compute."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tinyllama_lab.errors import ModelError
from tinyllama_lab.metrics import MIB

_MOST_SECONDS = 5.0
_SOON_S = 1e-4  # a timer of 0 s would never end
_MOST_MIB = 1024  # beyond what the process has
_SIZE = "/proc/self/statm"  # its first number: pages of the process


def can_limit() -> bool:
    """Return whether `limited` has an effect here: signals reach the main thread alone."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def limited(what: str, remedy: str, seconds: float = _MOST_SECONDS) -> Iterator[None]:
    """Stop the block after some seconds, or when it takes too much memory.

    It has no limit where `can_limit` is false. Where a process's size is unknown, memory has none.

    Args:
        what: what is computed, for the message.
        remedy: what to do about it.
        seconds: of wall time.

    Raises:
        ModelError: the block took too much.
    """
    if not can_limit():
        yield
        return
    error = ModelError(
        f"{what} must take at most {seconds:g} s and {_MOST_MIB} MiB, and takes more; {remedy}"
    )

    def stop(number: int, frame: Any) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, stop)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    # a process has one such timer, which may be that of a caller
    left_s, interval_s = signal.setitimer(signal.ITIMER_REAL, seconds)
    begin = time.monotonic()
    try:
        _limit_memory(memory)
        yield
    except MemoryError:
        raise error from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.signal(signal.SIGALRM, before)
        if left_s:  # what ran out meanwhile comes now
            rest_s = max(left_s - (time.monotonic() - begin), _SOON_S)
            signal.setitimer(signal.ITIMER_REAL, rest_s, interval_s)


def _limit_memory(present: tuple[int, int]) -> None:
    with suppress(OSError, ValueError):
        with open(_SIZE, "rb", buffering=0) as file:  # for every conversation of a data set
            pages = int(file.read(100).split()[0])
        most = pages * resource.getpagesize() + _MOST_MIB * MIB
        if present[0] == resource.RLIM_INFINITY or most < present[0]:
            resource.setrlimit(resource.RLIMIT_AS, (most, present[1]))
