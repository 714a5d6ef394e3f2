"""A running worker: its trials, the events it writes, and the results it leaves."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from tinyllama_lab.study.events import Event, EventReader, read_events
from tinyllama_lab.study.files import no_link
from tinyllama_lab.study.pack import Pack, Task
from tinyllama_lab.study.trial import Result, State, TrialFolder
from tinyllama_lab.sweep.execution.slots import Slot
from tinyllama_lab.sweep.launchers import Worker
from tinyllama_lab.sweep.plan import Planned

LONGEST_LOOK_S = 5.0  # between two looks of a driver that was not stopped meanwhile


@dataclass
class Silence:
    """How long a worker has written no heartbeat.

    Only time in which this driver looked counts: it may have been stopped itself.
    """

    seconds: float = 0.0
    longest_s: float = 0.0  # that ended by itself
    is_named: bool = False  # whether the user was told of it
    _beat: int | None = None
    _looked_at: float = field(default_factory=time.monotonic)

    @property
    def has_beaten(self) -> bool:
        """Whether there was a heartbeat at all."""
        return self._beat is not None

    def look(self, beat: int | None) -> None:
        """Count the time since the last look, unless there was a heartbeat."""
        now = time.monotonic()
        if beat != self._beat:
            self.longest_s = max(self.longest_s, self.seconds)
            self.seconds, self._beat, self.is_named = 0.0, beat, False
        else:
            self.seconds += min(now - self._looked_at, LONGEST_LOOK_S)
        self._looked_at = now


@dataclass(eq=False)
class Running:
    """A pack that a worker runs. `open` are its trials that have no result yet."""

    pack: Pack
    open: list[Planned]
    slot: Slot
    takes_more: bool  # whether its stream of trials is still open
    # wall-clock time, because events carry wall-clock times
    began: float = field(default_factory=time.time)
    synced_at: float = 0.0
    worker: Worker = field(init=False)  # set last: `start` may return an ended worker

    def __post_init__(self) -> None:
        self.group = self.open[0].group
        self._events = EventReader(self.pack.events_file)
        self._readers: dict[Planned, EventReader] = {}
        self._silence = Silence()
        for planned in self.open:
            self._follow(planned)

    def add(self, planned: Planned, task: Task) -> None:
        """Add a trial to the pack."""
        self._follow(planned)
        self.open.append(planned)
        self.pack.add(task)

    def close(self) -> None:
        """Close the stream, so that the worker ends after its present trials."""
        if self.takes_more:
            self.takes_more = False
            self.pack.close()

    def silence(self) -> Silence:
        """Return how long the worker has been silent; to be called at every look."""
        self._silence.look(self.pack.last_beat())
        return self._silence

    def phases(self) -> list[str]:
        """Return the phases that the worker has reported since the last call."""
        return [str(e["name"]) for e in self._events.poll() if e["kind"] == "phase"]

    def news(self, planned: Planned) -> list[Event]:
        """Return the events of a trial since the last call."""
        return self._readers[planned].poll()

    def was_running(self) -> list[Planned]:
        """Return the trials that the worker was running when it ended."""
        return [planned for planned in self.open if _was_running(planned.trial, self.began)]

    def base_failure(self, planned: Planned) -> Result:
        """Return the result of a trial whose base could not be loaded."""
        errors = [
            event for event in read_events(self.pack.events_file) if event["kind"] == "error"
        ]
        last = errors[-1] if errors else {"message": "the base could not be loaded"}
        result = self.failure(planned, "no_base", last["message"])
        if last.get("out_of_memory"):
            result.state = State.OOM
        return result

    def failure(self, planned: Planned, name: str, message: str) -> Result:
        """Return the result of a trial whose worker ended without writing one.

        The end of the worker's log is copied to the trial: the next command deletes the pack.
        """
        trial, tail = planned.trial, self.log_tail()
        trial.folder.mkdir(parents=True, exist_ok=True)
        with open(trial.log_file, "a", encoding="utf-8", opener=no_link) as log:
            log.write(f"the end of the worker's log:\n{tail}\n")
        # the worker counts attempts in its result, but it did not write one
        attempts = sum(e.get("state") == "running" for e in read_events(trial.events_file))
        error = {"class": name, "message": message, "log_tail": tail}
        typed = list(planned.overrides)
        key = planned.result_folder.key
        return Result(key, trial.name, State.FAILED, error, typed, max(1, attempts))

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of the worker's log."""
        path = self.pack.log_file
        if not path.exists():
            return ""
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _follow(self, planned: Planned) -> None:
        """Read the events of a trial from here on, without those of earlier attempts."""
        file = planned.trial.events_file
        self._readers[planned] = EventReader(file, _size(file))


def _was_running(trial: TrialFolder, since: float) -> bool:
    states = [e for e in read_events(trial.events_file) if e["kind"] == "state"]
    # a killed worker of an earlier command may also have left the state "running"
    return bool(states) and states[-1]["state"] == "running" and states[-1]["time"] >= since


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
