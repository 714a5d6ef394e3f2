"""A pack folder: what the driver hands to a worker, and how the worker answers."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tinyllama_lab.trial import Trial, write_atomic

DRIVER_PID = "TINYLLAMA_LAB_DRIVER_PID"  # environment of a worker: the process that started it


class Exit(IntEnum):
    """What a worker's exit status means; anything else is a crash."""

    DONE = 0  # every trial of the pack has a result
    NO_BASE = 70  # the base or the device cannot be had: no trial was begun
    NO_SPACE = 74  # the disk is full: nothing can be recorded
    STOPPED = 75  # told to stop; what was done is saved


@dataclass(frozen=True)
class Task:
    """One trial to run, the base it is compared with, and what was typed for it."""

    trial: Trial
    base: Trial
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """What a worker is asked to do."""

    tasks: list[Task]
    hardware: dict[str, Any]
    profile: str  # how the model and the data came to be chosen, for the record


@dataclass(frozen=True)
class Pack:
    """Trials that one worker runs over one base."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "pack.json"

    @property
    def events_file(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def log_file(self) -> Path:
        return self.folder / "worker.log"

    @property
    def lock_file(self) -> Path:
        return self.folder / "worker.lock"

    def write(self, work: Work) -> None:
        """Describe the work; folders are relative, so that a study can be moved as a whole."""
        tasks = [
            {
                "trial": self._relative(task.trial),
                "base": self._relative(task.base),
                "overrides": task.overrides,
            }
            for task in work.tasks
        ]
        record = {"tasks": tasks, "hardware": work.hardware, "profile": work.profile}
        write_atomic(self.file, json.dumps(record, indent=2) + "\n")

    def read(self) -> Work:
        """The inverse of `write`."""
        record = json.loads(self.file.read_text(encoding="utf-8"))
        tasks = [
            Task(self._trial(task["trial"]), self._trial(task["base"]), tuple(task["overrides"]))
            for task in record["tasks"]
        ]
        return Work(tasks, record["hardware"], record["profile"])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock that says: the worker of this pack lives, with this process id."""
        with self.lock_file.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def living_worker(self) -> int | None:
        """The process id of a worker that still holds this pack, or None."""
        if not self.lock_file.exists():
            return None
        with self.lock_file.open("r") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return None
                except BlockingIOError:
                    file.seek(0)
                    text = file.read().strip()
                if text.isdigit():
                    return int(text)
                time.sleep(0.01)  # it has the lock and is about to write its id

    def _relative(self, trial: Trial) -> str:
        return os.path.relpath(trial.folder, self.folder)

    def _trial(self, folder: str) -> Trial:
        return Trial((self.folder / folder).resolve())
