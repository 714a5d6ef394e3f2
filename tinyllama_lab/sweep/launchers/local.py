"""Runs workers as processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tinyllama_lab.study.pack import DRIVER_PID, Pack
from tinyllama_lab.sweep.launchers import Workers
from tinyllama_lab.sweep.settings.profile import has_cuda

# the folder that holds the package, in a checkout or in site-packages
_ROOT = Path(__file__).parents[3]


def worker_environment() -> dict[str, str]:
    """Return the variables of this process, with this package on the import path."""
    path = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


class LocalWorker:
    """A worker in a session of its own, so that Ctrl-C reaches it only through the driver."""

    def __init__(self, pack: Pack, process: subprocess.Popen[bytes] | None = None) -> None:
        """Start a process, or take one that has the pack already."""
        if process is None:
            # a file, not a pipe: the worker must not block or die when the driver is gone
            with pack.log_file.open("ab") as log:
                process = _start([str(pack.folder)], subprocess.DEVNULL, log)
        self._process = process

    def exit_code(self) -> int | None:
        """See `Worker`."""
        return self._process.poll()

    def stop(self, patience_s: float) -> None:
        """See `Worker`."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(patience_s)
        except BaseException as error:
            # also after a second Ctrl-C: the worker must not outlive the driver
            self._process.kill()
            self._process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise


def workers(stopped: Callable[[], bool]) -> Workers:
    """See `tinyllama_lab.sweep.launchers.workers`; these workers get signals instead."""
    return LocalWorkers()


class LocalWorkers:
    """Starts each worker as a process.

    The first process starts at once, and imports torch while the driver prepares the pack.
    """

    def __init__(self) -> None:
        self._ahead: subprocess.Popen[bytes] | None = None
        # on a machine with GPUs, the pack says which one to use, before torch is imported
        if not has_cuda():
            with tempfile.TemporaryFile() as output:
                self._ahead = _start([], subprocess.PIPE, output)
            self._end = weakref.finalize(self, _end, self._ahead)

    def start(self, pack: Pack) -> LocalWorker:
        """See `Workers`."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return LocalWorker(pack)
        self._end.detach()
        return LocalWorker(pack, ahead if _give(ahead, pack) else None)


def _start(arguments: list[str], stdin: int, output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tinyllama_lab.core.worker", *arguments],
        stdin=stdin,
        stdout=output,
        stderr=output,
        env={**worker_environment(), DRIVER_PID: str(os.getpid())},
        start_new_session=True,
    )


def _give(process: subprocess.Popen[bytes], pack: Pack) -> bool:
    """Name the pack to a waiting process; return False if it has ended."""
    assert process.stdin is not None
    try:
        with process.stdin as pipe:
            pipe.write(json.dumps(str(pack.folder)).encode() + b"\n")
    except BrokenPipeError:
        process.wait()
        return False
    return process.poll() is None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that got no pack."""
    process.kill()
    process.communicate()
