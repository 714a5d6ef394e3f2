"""Runs workers as processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tinyllama_lab.study.pack import DRIVER_PID, Pack
from tinyllama_lab.sweep.launchers import Workers

# the folder that holds the package, in a checkout or in site-packages
_ROOT = Path(__file__).parents[3]


def worker_environment() -> dict[str, str]:
    """Return the variables of this process, with this package on the import path."""
    path = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


class LocalWorker:
    """A worker in a session of its own, so that Ctrl-C reaches it only through the driver."""

    def __init__(self, pack: Pack) -> None:
        environment = {**worker_environment(), DRIVER_PID: str(os.getpid())}
        # a file, not a pipe: the worker must not block or die when the driver is gone
        with pack.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tinyllama_lab.core.worker", str(pack.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

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
    """Starts each worker as a process."""

    def start(self, pack: Pack) -> LocalWorker:
        """See `Workers`."""
        return LocalWorker(pack)
