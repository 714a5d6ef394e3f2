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

from tinyllama_lab.study.evaluations import read_requested, result_folder
from tinyllama_lab.study.events import EventLog, EventReader
from tinyllama_lab.study.files import no_link, write_atomic
from tinyllama_lab.study.trial import EVAL, Result, ResultFolder, TrialFolder

# Environment variable of a worker: the process that started it. On Linux the kernel signals a
# worker whose driver dies, and the worker stops. It compares its parent with this process once, at
# its start, because the driver may have died before the worker asked for that signal.
DRIVER_PID = "TINYLLAMA_LAB_DRIVER_PID"


class Exit(IntEnum):
    """Exit statuses of a worker; any other one is a crash."""

    # in the range of sysexits.h: Python itself ends with 1 or 2, and a signal counts as negative
    DONE = 0  # every trial of the pack has a result
    NO_BASE = 70  # the base or the device is not available: no trial was started
    NO_SPACE = 74  # the disk is full: nothing can be recorded
    STOPPED = 75  # the worker was asked to stop, and has saved its progress


@dataclass(frozen=True)
class Holder:
    """The process of a worker, and its host: several hosts may share the folders."""

    pid: int
    host: str


@dataclass(frozen=True)
class Pace:
    """How fast a trial will be, as earlier trials of its base were on this machine."""

    hardware: str  # the name of the CPU or GPU; a worker may run on another machine
    tokens_per_s: float  # of training
    scoring_s: float  # of all its scoring

    def seconds(self, tokens: int) -> float:
        """Return the seconds of a trial that trains on this many tokens."""
        return tokens / self.tokens_per_s + self.scoring_s


@dataclass(frozen=True)
class Task:
    """One trial to run, the base it is compared with, and the overrides that were typed for it.

    A trial that is done is only evaluated. `eval_settings` is the `eval` group to evaluate it
    with; None for the one in its configuration. `pace` is None where no earlier trial tells it.
    """

    trial: TrialFolder
    base: TrialFolder
    overrides: tuple[str, ...]
    eval_settings: dict[str, Any] | None = field(default=None, hash=False)  # it has no hash
    pace: Pace | None = None

    def read_config(self) -> dict[str, Any]:
        """Return the trial's configuration, with the `eval` group of the task."""
        config = self.trial.read_config()
        return config if self.eval_settings is None else {**config, EVAL: self.eval_settings}

    def read_result(self) -> Result | None:
        """Return the result of the task; None if it is still to be run."""
        return read_requested(self.trial, self.eval_settings)[0]

    @property
    def result_folder(self) -> ResultFolder:
        """The folder that the task's result is written to: the trial or an evaluation of it."""
        settings = self.eval_settings
        return result_folder(self.trial, settings) if settings else self.trial


@dataclass(frozen=True)
class BaseSettings:
    """The settings of the frozen base that the trials of a pack share.

    A worker cannot change them once it has started, so trials that differ in them need several.
    """

    model: dict[str, Any]
    quant: dict[str, Any]
    precision: str  # `train.precision`: the type of its matmuls
    deterministic: bool  # `train.deterministic`: whether every bit must be reproducible

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> BaseSettings:
        """Return the base that a trial with this configuration trains on."""
        train = config["train"]
        return cls(config["model"], config["quant"], train["precision"], train["deterministic"])

    @staticmethod
    def has_setting(key: str) -> bool:
        """Return whether a setting such as `quant.kind` belongs to the base."""
        is_of_group = key.partition(".")[0] in ("model", "quant")
        return is_of_group or key in ("train.precision", "train.deterministic")


@dataclass(frozen=True)
class StreamSettings:
    """Settings of a pack that receives trials while it runs, and may prune them."""

    max_concurrent: int  # number of trials that the driver keeps running
    rungs: tuple[float, ...] = ()  # shares of its steps after which a trial is evaluated
    rung_rows: int = 1  # held-out rows that are evaluated then


@dataclass(frozen=True)
class Work:
    """The work of one worker. Without a stream, `tasks` is complete from the start."""

    tasks: list[Task]
    base: BaseSettings
    hardware: dict[str, Any]
    profile: str  # why this model and this data were chosen, for the environment of results
    gpu: str | None = None  # the only GPU it may use, as in CUDA_VISIBLE_DEVICES
    stream: StreamSettings | None = None


@dataclass(frozen=True)
class Pack:
    """The folder of the trials that one worker runs on one base."""

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

    @property
    def heartbeat_file(self) -> Path:
        return self.folder / "heartbeat"

    def beat(self) -> None:
        """Show the driver that the worker lives; for the worker.

        Raises:
            OSError: the folder is gone.
        """
        self.heartbeat_file.touch()

    def last_beat(self) -> int | None:
        """Return a number that changes with every heartbeat; None if there was none."""
        try:
            return self.heartbeat_file.stat().st_mtime_ns
        except OSError:  # clocks of two hosts differ, so the time itself means nothing
            return None

    def write(self, work: Work) -> None:
        """Create the folder with the work of a worker, which is started afterwards.

        The folders of trials are relative, so that a study can be moved as a whole.
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
            self.close()  # a pack of known trials is a stream that is closed from the start

    def read(self) -> Work:
        """Read what `write` has written."""
        record = json.loads(self.file.read_text(encoding="utf-8"))
        tasks = [self._task(task) for task in record["tasks"]]
        stream = record["stream"]
        if stream is not None:
            stream = StreamSettings(**{**stream, "rungs": tuple(stream["rungs"])})
        base = BaseSettings(**record["base"])
        shared = record["hardware"], record["profile"], record["gpu"]
        return Work(tasks, base, *shared, stream)

    def add(self, task: Task) -> None:
        """Add a task to the stream of a running worker."""
        EventLog(self.tasks_file).append("task", **self._record(task))

    def close(self) -> None:
        """Close the stream: the worker ends after its last task."""
        EventLog(self.tasks_file).append("closed")

    def arrivals(self) -> Arrivals:
        """Return a reader of the tasks that are added after `write`; for the worker."""
        return Arrivals(self, EventReader(self.tasks_file))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the pack as its worker, and write this process and host into the lock file.

        The kernel frees the lock when the process ends, however it ends. A file with a process
        number alone would stay after a crash.
        """
        # not "w": that would empty another worker's file
        with open(self.lock_file, "a+", opener=no_link) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(f"{os.getpid()} {socket.gethostname()}")
            file.flush()  # whoever finds the file locked reads the process from it
            yield

    def living_worker(self) -> Holder | None:
        """Return the worker that has locked this pack; None if it has ended."""
        if not self.lock_file.exists():
            return None
        with self.lock_file.open("r") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return None  # closing the file frees the lock again
                except BlockingIOError:
                    file.seek(0)
                    words = file.read().split()
                if len(words) == 2:
                    return Holder(int(words[0]), words[1])
                time.sleep(0.01)  # it has the lock and is about to write its id

    def _record(self, task: Task) -> dict[str, Any]:
        trial, base = (os.path.relpath(t.folder, self.folder) for t in (task.trial, task.base))
        folders = {"trial": trial, "base": base}
        settings = {"overrides": task.overrides, "scoring": task.eval_settings}
        return {**folders, **settings, "pace": asdict(task.pace) if task.pace else None}

    def _task(self, record: Mapping[str, Any]) -> Task:
        trial, base = (TrialFolder((self.folder / record[k]).resolve()) for k in ("trial", "base"))
        pace = Pace(**record["pace"]) if record["pace"] else None
        return Task(trial, base, tuple(record["overrides"]), record["scoring"], pace)


@dataclass
class Arrivals:
    """Reads the tasks that the driver adds while a pack runs."""

    pack: Pack
    reader: EventReader
    closed: bool = False

    def poll(self) -> list[Task]:
        """Return the tasks that were added since the last call."""
        events = self.reader.poll()
        self.closed = self.closed or any(event["kind"] == "closed" for event in events)
        return [self.pack._task(event) for event in events if event["kind"] == "task"]
