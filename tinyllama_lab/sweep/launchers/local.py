"""Runs workers as processes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tinyllama_lab.study.files import no_link
from tinyllama_lab.study.pack import DRIVER_PID, Pack
from tinyllama_lab.sweep.launchers import Workers
from tinyllama_lab.sweep.launchers.lifeline import Lifeline, end_group
from tinyllama_lab.sweep.settings.profile import has_cuda

# the folder that holds the package, in a checkout or in site-packages
_ROOT = Path(__file__).parents[3]
PROGRAM = ("-m", "tinyllama_lab.core.worker")  # by name: the driver must not import it
KILLED_WITHIN_S = 5.0  # time for SIGKILL to take effect on a busy machine


def worker_environment() -> dict[str, str]:
    """Return the variables of this process, with this package on the import path."""
    path = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


class LocalWorker:
    """A worker in a session of its own, so that Ctrl-C reaches it only through the driver."""

    def __init__(self, pack: Pack, lifeline: Lifeline, ahead: _Ahead | None = None) -> None:
        """Start a process, or take one that was started ahead and knows the pack."""
        self._pack, self._lifeline, self._ahead = pack, lifeline, ahead
        self._is_settled = False
        if ahead is not None:
            self._process = ahead.process
            return
        # a file, not a pipe: the worker must not block or die when the driver is gone
        with open(pack.log_file, "ab", opener=no_link) as log:
            self._process = _start(lifeline, [str(pack.folder)], subprocess.DEVNULL, log)

    def exit_code(self) -> int | None:
        """See `Worker`."""
        code = self._process.poll()
        if code is not None and not self._is_settled:
            self._is_settled = True
            end_group(self._process.pid)  # what it has started and left
            self._lifeline.release(self._process.pid)
            if self._ahead is not None:
                self._ahead.keep_output(self._pack)
        return code

    def stop(self, patience_s: float) -> None:
        """See `Worker`."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(patience_s)
        except BaseException as error:
            # also after a second Ctrl-C: the worker must not outlive the driver
            end_group(self._process.pid)
            # a process that waits for a broken disk dies later, before it does anything else
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILLED_WITHIN_S)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        finally:
            self.exit_code()


def workers(stopped: Callable[[], bool]) -> Workers:
    """See `tinyllama_lab.sweep.launchers.workers`; these workers get signals instead."""
    return LocalWorkers()


class LocalWorkers:
    """Starts each worker as a process.

    Without a GPU the first process starts at once, and imports torch while the driver prepares its
    pack. With GPUs the pack says which one to use, and that must be known before the imports.
    """

    def __init__(self) -> None:
        self._lifeline = Lifeline()
        self._ahead = None if has_cuda() else _Ahead.start(self._lifeline)

    def start(self, pack: Pack) -> LocalWorker:
        """See `Workers`."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.send(pack):
            return LocalWorker(pack, self._lifeline, ahead)
        return LocalWorker(pack, self._lifeline)

    def close(self) -> None:
        """See `Workers`."""
        if self._ahead is not None:
            self._ahead.end()
            self._ahead = None
        self._lifeline.close()


class _Ahead:
    """A worker process that waits for its pack."""

    def __init__(
        self, process: subprocess.Popen[bytes], output: IO[bytes], lifeline: Lifeline
    ) -> None:
        self.process, self._lifeline = process, lifeline
        self._output = output  # of the process, until it has a pack

    @classmethod
    def start(cls, lifeline: Lifeline) -> _Ahead | None:
        """Start it; None if that is not possible, because nothing depends on it."""
        try:
            output = tempfile.TemporaryFile()
            return cls(_start(lifeline, [], subprocess.PIPE, output), output, lifeline)
        except OSError:
            return None

    def send(self, pack: Pack) -> bool:
        """Send the pack; return False if the process has ended."""
        assert self.process.stdin is not None
        try:
            with self.process.stdin as pipe:
                pipe.write(json.dumps(str(pack.folder)).encode() + b"\n")
        except BrokenPipeError:
            self.end()
            return False
        return True

    def keep_output(self, pack: Pack) -> None:
        """Add to the pack's log what the process printed but could not write there itself."""
        # of a full disk the exit status tells
        with contextlib.suppress(OSError), self._output as output:
            output.seek(0)
            if text := output.read():
                with open(pack.log_file, "ab", opener=no_link) as log:
                    log.write(text)

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.communicate()
        self._lifeline.release(self.process.pid)
        self._output.close()


def _start(
    lifeline: Lifeline, arguments: list[str], stdin: int, output: IO[bytes]
) -> subprocess.Popen[bytes]:
    lifeline.open()  # first, so that no worker lives without it
    process = subprocess.Popen(
        [sys.executable, *PROGRAM, *arguments],
        stdin=stdin,
        stdout=output,
        stderr=output,
        env={**worker_environment(), DRIVER_PID: str(os.getpid())},
        start_new_session=True,
    )
    lifeline.hold(process.pid)
    return process
