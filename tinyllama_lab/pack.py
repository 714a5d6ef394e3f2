"""A pack folder: what the driver hands to a worker, and how the worker answers."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tinyllama_lab.trial import Trial, write_atomic


class Exit(IntEnum):
    """What a worker's exit status means; anything else is a crash."""

    DONE = 0  # every trial of the pack has a result
    NO_BASE = 70  # the base or the device cannot be had: no trial was begun
    NO_SPACE = 74  # the disk is full: nothing can be recorded
    STOPPED = 75  # told to stop; what was done is saved


@dataclass(frozen=True)
class Work:
    """What a worker is asked to do."""

    trials: dict[Trial, list[str]]  # with what was typed for each
    base: Trial
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
        record = {
            "base": self._relative(work.base),
            "hardware": work.hardware,
            "profile": work.profile,
            "trials": [
                {"folder": self._relative(trial), "overrides": overrides}
                for trial, overrides in work.trials.items()
            ],
        }
        write_atomic(self.file, json.dumps(record, indent=2) + "\n")

    def read(self) -> Work:
        """The inverse of `write`."""
        record = json.loads(self.file.read_text(encoding="utf-8"))
        trials = {self._trial(entry["folder"]): entry["overrides"] for entry in record["trials"]}
        base = self._trial(record["base"])
        return Work(trials, base, record["hardware"], record["profile"])

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
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read().strip()
                return int(text) if text.isdigit() else None
        return None

    def _relative(self, trial: Trial) -> str:
        return os.path.relpath(trial.folder, self.folder)

    def _trial(self, folder: str) -> Trial:
        return Trial((self.folder / folder).resolve())
