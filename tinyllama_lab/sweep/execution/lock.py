"""Locks a study for one driver, and ends workers that a killed driver left behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.files import TEMPORARY, no_link, remove_temporaries, write_atomic
from tinyllama_lab.study.study import StudyFolder

KILLED_WITHIN_S = 2.0  # time for SIGKILL to take effect on a busy machine


@contextmanager
def locked(study: StudyFolder) -> Iterator[None]:
    """Lock the study for this driver. The kernel frees the lock when this process ends.

    Raises:
        StudyError: another driver has locked it; the message names its process.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    # never deleted: two drivers could then hold locks on two files of this name
    with open(study.lock_file, "a", opener=no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(
                f"a study has one driver at a time, and {_lock_owner(study)} runs {study.name}; "
                "wait for it, end it, or take another study=<name>"
            ) from None
        # only for the message to other drivers: the kernel keeps the lock itself
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        write_atomic(study.driver_file, json.dumps(owner))
        _end_orphans(study)
        remove_temporaries(study.folder.glob(TEMPORARY))
        yield


def _lock_owner(study: StudyFolder) -> str:
    try:
        owner = json.loads(study.driver_file.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    # the file may be missing, or damaged by hand: the message then names no process
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _end_orphans(study: StudyFolder, patience_s: float = 5.0) -> None:
    """End the workers of an earlier driver, which would write into the folders of this one.

    Raises:
        StudyError: a worker runs on another host, or does not end even when killed.
    """
    for pack in study.packs():
        begin = time.monotonic()
        while (worker := pack.living_worker()) is not None:
            waited = time.monotonic() - begin
            # a process number of another host may be any process here: do not signal it
            is_elsewhere = worker.host != socket.gethostname()
            if is_elsewhere or waited > patience_s + KILLED_WITHIN_S:
                raise StudyError(
                    f"a worker of an earlier command must end before {study.name} goes on, and "
                    f"{pack.lock_file} is still locked by process {worker.pid} on {worker.host}; "
                    "end it there"
                )
            _signal(worker.pid, signal.SIGKILL if waited > patience_s else signal.SIGTERM)
            time.sleep(0.1)
        shutil.rmtree(pack.folder, ignore_errors=True)  # a worker that starts late finds no work


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return  # it has ended, or belongs to another user; the caller checks the lock again
