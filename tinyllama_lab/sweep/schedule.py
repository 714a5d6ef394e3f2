"""Runs packs: starts workers, follows what they write, and decides what is tried again."""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tinyllama_lab.errors import StudyError
from tinyllama_lab.events import EventReader, read_events
from tinyllama_lab.pack import Exit, Pack, Task, Work
from tinyllama_lab.sweep.display import Display
from tinyllama_lab.sweep.interrupts import Interrupts
from tinyllama_lab.sweep.plan import Plan, Planned, params
from tinyllama_lab.sweep.track import Tracker
from tinyllama_lab.sweep.workers import Worker, Workers
from tinyllama_lab.trial import Result, State, Trial, base_config

POLL_S = 0.2
SEND_EVERY_S = 2.0
STOP_PATIENCE_S = 4.0


@dataclass
class Running:
    """A pack that a worker has in hand."""

    pack: Pack
    trials: list[Planned]
    began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.events = EventReader(self.pack.events_file)
        self.readers = {p: EventReader(p.trial.events_file) for p in self.trials}
        for planned, reader in self.readers.items():  # what earlier attempts wrote is not news
            reader.offset = _size(planned.trial.events_file)
        self.open = list(self.trials)
        self.sent_at = 0.0


class Scheduler:
    """Works through a plan, one pack at a time."""

    def __init__(
        self,
        plan: Plan,
        workers: Workers,
        tracker: Tracker,
        display: Display,
        interrupts: Interrupts,
    ) -> None:
        self._plan = plan
        self._workers = workers
        self._tracker = tracker
        self._display = display
        self._interrupts = interrupts
        self._lost: Counter[str] = Counter()  # workers lost, by the key that was running

    def run(self) -> None:
        """Run what is left of the plan; results land in `plan.results`.

        Raises:
            StudyError: the disk is full.
            KeyboardInterrupt: the driver was told to stop; the worker has ended by then.
        """
        queue = deque(self._plan.packs())
        while queue:
            running = self._begin(queue.popleft())
            code = self._follow(running)
            for trials in reversed(self._settle(running, code)):
                queue.appendleft(trials)

    def _begin(self, trials: list[Planned]) -> Running:
        pack = Pack(self._plan.study.packs_dir / uuid.uuid4().hex[:8])
        for base, config in {self._plan.base(p): base_config(p.config) for p in trials}.items():
            result, why = base.read_result()
            if why:
                self._display.say(f"note: {why}; the base is scored again")
            if result is None:
                base.write_config(config)
        for planned in trials:
            planned.trial.write_config(planned.config)
            planned.trial.result_file.unlink(missing_ok=True)  # one that is to be done again
        tasks = [Task(p.trial, self._plan.base(p), p.overrides) for p in trials]
        pack.write(Work(tasks, asdict(self._plan.config.hardware), self._plan.profile))
        return Running(pack, trials)

    def _follow(self, running: Running) -> int:
        """Watch one worker from start to end."""
        with self._interrupts.deferred():
            worker = self._workers.start(running.pack)
            try:
                while (code := worker.exit_code()) is None:
                    self._interrupts.check()
                    self._look(running)
                    time.sleep(POLL_S)
                self._look(running)
                self._interrupts.check()
            except BaseException:
                self._stop(worker, running)
                raise
        return code

    def _stop(self, worker: Worker, running: Running) -> None:
        worker.stop(STOP_PATIENCE_S)
        self._look(running)
        for planned in list(running.open):  # a result may be newer than the last event read
            self._collect(running, planned)

    def _look(self, running: Running) -> None:
        for event in running.events.poll():
            if event["kind"] == "phase":
                self._display.phase(str(event["name"]))
        for planned in list(running.open):
            reader = running.readers[planned]
            fresh = reader.poll()
            for event in fresh:
                if event.get("state") == "running":
                    settings = params(planned, self._plan.swept)
                    self._tracker.follow(planned.trial, planned.label, settings)
                self._display.progress(planned, event)
            if fresh:
                self._collect(running, planned)
        self._send(running)
        self._display.refresh()

    def _send(self, running: Running) -> None:
        """Now and then, so that many metrics go in one batch: a batch costs what a metric does."""
        if time.monotonic() - running.sent_at > SEND_EVERY_S:
            running.sent_at = time.monotonic()
            for planned in running.open:
                self._tracker.send(planned.trial)

    def _collect(self, running: Running, planned: Planned) -> None:
        result, _ = planned.trial.read_result()
        if result is not None:
            running.open.remove(planned)
            self._record(planned, result)

    def _record(self, planned: Planned, result: Result) -> None:
        self._plan.results[planned.trial.key] = result
        self._tracker.finish(planned.trial, result)
        self._display.finished(planned)
        if result.state is not State.DONE:
            message = (result.error or {}).get("message", "")
            self._display.say(f"{planned.label}: {result.state} ({message})")

    def _settle(self, running: Running, code: int) -> list[list[Planned]]:
        """After a worker has ended: record failures, return the packs to be tried again."""
        for planned in list(running.open):
            self._collect(running, planned)
        if not running.open:
            return []
        if code == Exit.NO_SPACE:
            raise StudyError(
                f"a sweep needs free space for checkpoints and adapters, and the disk of "
                f"{self._plan.study.folder} is full; free some and run the same command again"
            )
        if code == Exit.NO_BASE:
            for planned in list(running.open):
                self._fail(running, planned, "no_base", _base_error(running.pack))
            return []
        return self._after_loss(running, code)

    def _after_loss(self, running: Running, code: int) -> list[list[Planned]]:
        """A worker that was killed or crashed costs the trial it was at one attempt.

        Where several ran side by side, nobody knows whose fault it was, or whether the kernel
        took memory back: the pack comes back in halves, and who is left alone is blamed.
        """
        cause = f"by signal {-code}" if code < 0 else f"with exit status {code}"
        current = [p for p in running.open if _was_running(p.trial, running.began)]
        side_by_side = len(current) > 1 and code != Exit.STOPPED
        charged = current or list(running.open)
        if code == Exit.STOPPED or side_by_side:
            charged = []
        for planned in charged:  # someone who stops a worker politely does not blame a trial
            self._lost[planned.trial.key] += 1
            if self._lost[planned.trial.key] >= self._plan.config.hardware.max_attempts:
                times = self._lost[planned.trial.key]
                text = f"its worker ended {cause}, {times} times; see {running.pack.log_file}"
                self._fail(running, planned, "killed", text)
        left = list(running.open)
        if not left:
            return []
        half = (len(left) + 1) // 2 if side_by_side else len(left)
        packs = [pack for pack in (left[:half], left[half:]) if pack]
        halves = " in halves" if len(packs) > 1 else ""
        self._display.say(f"a worker ended {cause}; trying {len(left)} trial(s) again{halves}")
        return packs

    def _fail(self, running: Running, planned: Planned, name: str, message: str) -> None:
        attempts = sum(e.get("state") == "running" for e in read_events(planned.trial.events_file))
        error = {"class": name, "message": message, "log_tail": _tail(running.pack.log_file)}
        result = Result(
            planned.trial.key,
            planned.trial.name,
            State.FAILED,
            error,
            list(planned.overrides),
            max(1, attempts),
        )
        planned.trial.commit(result)
        running.open.remove(planned)
        self._tracker.follow(planned.trial, planned.label, params(planned, self._plan.swept))
        self._record(planned, result)


def _was_running(trial: Trial, since: float) -> bool:
    states = [e for e in read_events(trial.events_file) if e["kind"] == "state"]
    return bool(states) and states[-1]["state"] == "running" and states[-1]["time"] >= since


def _base_error(pack: Pack) -> str:
    errors = [e["message"] for e in read_events(pack.events_file) if e["kind"] == "error"]
    return errors[-1] if errors else "the base could not be loaded"


def _tail(path: Path, lines: int = 20) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
