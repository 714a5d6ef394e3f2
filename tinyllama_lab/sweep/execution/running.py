"""One worker that runs: what it was given, what it says, what it leaves behind."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from tinyllama_lab.study.events import Event, EventReader, read_events
from tinyllama_lab.study.pack import Pack, Task
from tinyllama_lab.study.trial import Result, State, Trial
from tinyllama_lab.sweep.execution.slots import Slot
from tinyllama_lab.sweep.launchers import Worker
from tinyllama_lab.sweep.plan import Planned


@dataclass(eq=False)
class Running:
    """A pack that a worker has in hand. `open` are its trials that have no result yet."""

    pack: Pack
    open: list[Planned]
    slot: Slot
    takes_more: bool  # its stream of trials was not closed yet
    began: float = field(default_factory=time.time)
    synced_at: float = 0.0
    worker: Worker = field(init=False)  # started last: a worker may have ended when it is there

    def __post_init__(self) -> None:
        self.group = self.open[0].group
        self._events = EventReader(self.pack.events_file)
        self._readers: dict[Planned, EventReader] = {}
        for planned in self.open:
            self._follow(planned)

    def add(self, planned: Planned, task: Task) -> None:
        """Hand one more trial over."""
        self._follow(planned)
        self.open.append(planned)
        self.pack.add(task)

    def close(self) -> None:
        """Let the worker end when it has done what it has."""
        if self.takes_more:
            self.takes_more = False
            self.pack.close()

    def phases(self) -> list[str]:
        """What the worker says it does now."""
        return [str(e["name"]) for e in self._events.poll() if e["kind"] == "phase"]

    def news(self, planned: Planned) -> list[Event]:
        """The events of a trial that were not seen yet."""
        return self._readers[planned].poll()

    def was_running(self) -> list[Planned]:
        """The trials that the worker was at."""
        return [planned for planned in self.open if _was_running(planned.trial, self.began)]

    def base_failure(self, planned: Planned) -> Result:
        """The result of a trial whose base could not be loaded."""
        errors = [
            event for event in read_events(self.pack.events_file) if event["kind"] == "error"
        ]
        last = errors[-1] if errors else {"message": "the base could not be loaded"}
        result = self.failure(planned, "no_base", last["message"])
        if last.get("out_of_memory"):
            result.state = State.OOM
        return result

    def failure(self, planned: Planned, name: str, message: str) -> Result:
        """The result of a trial whose worker cannot write one.

        The end of the worker's log goes into the trial's own: the next command deletes the pack's.
        """
        trial, tail = planned.trial, self.log_tail()
        trial.folder.mkdir(parents=True, exist_ok=True)
        with trial.log_file.open("a", encoding="utf-8") as log:
            log.write(f"the end of the worker's log:\n{tail}\n")
        attempts = sum(e.get("state") == "running" for e in read_events(trial.events_file))
        error = {"class": name, "message": message, "log_tail": tail}
        typed = list(planned.overrides)
        key = planned.place_of_result.key
        return Result(key, trial.name, State.FAILED, error, typed, max(1, attempts))

    def log_tail(self, lines: int = 20) -> str:
        """The end of the worker's log."""
        path = self.pack.log_file
        if not path.exists():
            return ""
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _follow(self, planned: Planned) -> None:
        """From here on: what earlier attempts wrote is not news."""
        file = planned.trial.events_file
        self._readers[planned] = EventReader(file, _size(file))


def _was_running(trial: Trial, since: float) -> bool:
    states = [e for e in read_events(trial.events_file) if e["kind"] == "state"]
    return bool(states) and states[-1]["state"] == "running" and states[-1]["time"] >= since


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
