"""A pack folder: what the driver hands to a worker, and how the worker answers."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from tinyllama_lab.study.evaluations import place_of_result, read_asked
from tinyllama_lab.study.events import EventLog, EventReader
from tinyllama_lab.study.files import write_atomic
from tinyllama_lab.study.trial import EVAL, Result, ResultFolder, TrialFolder

DRIVER_PID = "TINYLLAMA_LAB_DRIVER_PID"  # environment of a worker: the process that started it


class Exit(IntEnum):
    """What a worker's exit status means; anything else is a crash."""

    DONE = 0  # every trial of the pack has a result
    NO_BASE = 70  # the base or the device cannot be had: no trial was begun
    NO_SPACE = 74  # the disk is full: nothing can be recorded
    STOPPED = 75  # asked to stop; what was done is saved


@dataclass(frozen=True)
class Holder:
    """The process of a worker, and where it runs: folders may be shared by several hosts."""

    pid: int
    host: str


@dataclass(frozen=True)
class Task:
    """One trial to run, the base it is compared with, and what was typed for it.

    A trial that is done is only scored: as `scoring` asks, another `eval` group than the one in
    its configuration. Without it, that one counts.
    """

    trial: TrialFolder
    base: TrialFolder
    overrides: tuple[str, ...]
    scoring: dict[str, Any] | None = field(default=None, hash=False)

    def read_config(self) -> dict[str, Any]:
        """The configuration of the trial, to be scored as the task asks."""
        config = self.trial.read_config()
        return config if self.scoring is None else {**config, EVAL: self.scoring}

    def read_result(self) -> Result | None:
        """What came of the task; None where it is still to be done."""
        return read_asked(self.trial, self.scoring)[0]

    @property
    def place_of_result(self) -> ResultFolder:
        """What its result is written to."""
        return place_of_result(self.trial, self.scoring) if self.scoring else self.trial


@dataclass(frozen=True)
class BaseSettings:
    """The frozen base that the trials of a pack share, as their configuration describes it."""

    model: dict[str, Any]
    quant: dict[str, Any]
    precision: str  # of its matmuls: `train.precision`
    deterministic: bool  # whether every bit must be reproducible: `train.deterministic`

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> BaseSettings:
        """The base that a trial with this configuration trains on."""
        train = config["train"]
        return cls(config["model"], config["quant"], train["precision"], train["deterministic"])


@dataclass(frozen=True)
class StreamSettings:
    """Trials that come one after another while the pack runs, and may be ended early."""

    max_concurrent: int  # how many the driver keeps under way
    rungs: tuple[float, ...] = ()  # shares of its steps after which a trial is scored
    rung_rows: int = 1  # held-out rows that are scored then


@dataclass(frozen=True)
class Work:
    """What a worker is asked to do. Without a stream, all tasks are there from the start."""

    tasks: list[Task]
    base: BaseSettings
    hardware: dict[str, Any]
    profile: str  # how the model and the data came to be chosen, for the record
    gpu: str | None = None  # the only one it may use, as CUDA_VISIBLE_DEVICES names it
    stream: StreamSettings | None = None


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
    def tasks_file(self) -> Path:
        return self.folder / "tasks.jsonl"

    @property
    def log_file(self) -> Path:
        return self.folder / "worker.log"

    @property
    def lock_file(self) -> Path:
        return self.folder / "worker.lock"

    def write(self, work: Work) -> None:
        """Describe the work; folders are relative, so that a study can be moved as a whole.

        Without stream settings no more tasks come: the stream is closed from the start.
        """
        record = {
            "tasks": [self._record(task) for task in work.tasks],
            "base": asdict(work.base),
            "hardware": work.hardware,
            "profile": work.profile,
            "gpu": work.gpu,
            "stream": asdict(work.stream) if work.stream else None,
        }
        write_atomic(self.file, json.dumps(record, indent=2) + "\n")
        if work.stream is None:
            self.close()

    def read(self) -> Work:
        """The inverse of `write`."""
        record = json.loads(self.file.read_text(encoding="utf-8"))
        tasks = [self._task(task) for task in record["tasks"]]
        stream = record["stream"]
        if stream is not None:
            stream = StreamSettings(**{**stream, "rungs": tuple(stream["rungs"])})
        base = BaseSettings(**record["base"])
        shared = record["hardware"], record["profile"], record["gpu"]
        return Work(tasks, base, *shared, stream)

    def add(self, task: Task) -> None:
        """Hand one more task to the worker."""
        EventLog(self.tasks_file).append("task", **self._record(task))

    def close(self) -> None:
        """Tell the worker that no more tasks come."""
        EventLog(self.tasks_file).append("closed")

    def arrivals(self) -> Arrivals:
        """What was handed over after `write`; for the worker."""
        return Arrivals(self, EventReader(self.tasks_file))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that says: the worker of this pack lives, as this process on this host."""
        with self.lock_file.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(f"{os.getpid()} {socket.gethostname()}")
            file.flush()
            yield

    def living_worker(self) -> Holder | None:
        """The worker that still holds this pack, or None."""
        if not self.lock_file.exists():
            return None
        with self.lock_file.open("r") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return None
                except BlockingIOError:
                    file.seek(0)
                    words = file.read().split()
                if len(words) == 2:
                    return Holder(int(words[0]), words[1])
                time.sleep(0.01)  # it has the lock and is about to write its id

    def _record(self, task: Task) -> dict[str, Any]:
        trial, base = (os.path.relpath(t.folder, self.folder) for t in (task.trial, task.base))
        folders = {"trial": trial, "base": base}
        return {**folders, "overrides": task.overrides, "scoring": task.scoring}

    def _task(self, record: Mapping[str, Any]) -> Task:
        trial, base = (TrialFolder((self.folder / record[k]).resolve()) for k in ("trial", "base"))
        return Task(trial, base, tuple(record["overrides"]), record["scoring"])


@dataclass
class Arrivals:
    """Tasks that come while a pack runs."""

    pack: Pack
    reader: EventReader
    closed: bool = False

    def poll(self) -> list[Task]:
        """Those that are new."""
        found = self.reader.poll()
        self.closed = self.closed or any(event["kind"] == "closed" for event in found)
        return [self.pack._task(event) for event in found if event["kind"] == "task"]
