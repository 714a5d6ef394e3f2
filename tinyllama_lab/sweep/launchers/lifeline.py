"""Ends the workers of a driver that has died, however it died.

A worker takes no signal while it imports libraries or loads a base, and a stopped one takes none
at all. So a small process watches from outside. It runs this file alone, without the package,
and reads from a pipe which workers live. The kernel closes the pipe with the driver.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

GRACE_S = 3.0  # for workers to save, before they are killed


class Lifeline:
    """The pipe of one driver to the process that outlives it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        """Start the process, if it does not run yet."""
        if self._process is None:
            # -I and -S: nothing but the standard library is looked for, so that it starts at once
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what ends the driver's group must not end it
            )

    def hold(self, pid: int) -> None:
        """Let a worker, the leader of its process group, end with this driver."""
        self._send(pid)

    def release(self, pid: int) -> None:
        """Forget a worker that has ended, whose number may become that of another process."""
        self._send(-pid)

    def close(self) -> None:
        """End the process; no worker may be left."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _send(self, number: int) -> None:
        if self._process is None or self._process.stdin is None:
            return
        # somebody may have killed it: the signal of the kernel to workers remains
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"%d\n" % number)
            self._process.stdin.flush()


def end_group(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a worker and everything it has started."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return  # nothing of it is left


def watch(lines: Iterable[str]) -> None:
    """Follow which workers live, and end them when the driver has died."""
    workers: set[int] = set()
    for line in lines:
        number = int(line)
        workers.add(number) if number > 0 else workers.discard(-number)
    for pid in workers:
        end_group(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while any(map(_lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in workers:
        end_group(pid)


def _lives(pid: int) -> bool:
    """Return whether a process group has members."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    watch(sys.stdin)
