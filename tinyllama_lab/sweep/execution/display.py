"""What a person sees while a sweep runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tinyllama_lab.config.schema import ALL
from tinyllama_lab.data.sources import shown
from tinyllama_lab.study.events import Event
from tinyllama_lab.sweep.plan import GUESSED_ROWS, Planned

LINE_EVERY_S = 10.0
_NUMBERS = "{task.percentage:>3.0f} %  {task.fields[speed]}  {task.fields[left]}"


class Display:
    """Trials done, tokens a second and time left.

    Work is counted in forward passes of a row. Time left is the work that is left at the
    speed so far; loading the base does not count as work, and is not part of the speed.
    """

    def __init__(self, todo: list[Planned], console: Console) -> None:
        self._console = console
        self._known = list(todo)
        self._all_rows = float(GUESSED_ROWS)  # of data.n=all
        self._known_work = sum(map(self._work_of, todo))
        self._more = 0  # trials that will be added; until then they are taken to be like these
        self._done_trials = 0
        self._done_work = 0.0
        self._parts: dict[Planned, float] = {}  # work done of the trials that run
        self._noted: set[str] = set()
        self._now = "starting the worker"
        self._tokens_per_s = 0.0
        self._began: float | None = None
        self._deadline: float | None = None
        self._line, self._line_at = "", time.monotonic()
        self._bar = Progress(
            TextColumn("{task.fields[trials]}", markup=False),
            BarColumn(bar_width=24),
            TextColumn(_NUMBERS, markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(self._now, total=1.0, **self._fields())

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def phase(self, name: str) -> None:
        """The worker says what it does."""
        self._now = name
        self.refresh()

    def add(self, planned: Planned) -> None:
        """One more trial."""
        self._known.append(planned)
        self._known_work += self._work_of(planned)

    def expect(self, more: int) -> None:
        """So many will be added."""
        self._more = more

    def progress(self, planned: Planned, event: Event) -> None:
        """An event of a trial that runs; those of a pack come side by side."""
        before = self._parts.get(planned, 0.0)
        if event["kind"] == "metric" and event.get("steps"):
            self._count_rows(planned, event["steps"])
        training = self._work_of(planned) - planned.scoring_work
        if event["kind"] == "metric" and event.get("steps"):
            self._tokens_per_s = event.get("tokens_per_s") or self._tokens_per_s
            self._parts[planned] = training * event["step"] / event["steps"]
            step = f"training, step {event['step']}/{event['steps']}"
            self._now = f"{self._running(planned)}: {step}"
        elif event["kind"] == "phase":
            self._parts[planned] = before if event["name"] == "training" else training
            self._now = f"{self._running(planned)}: {event['name']}"
        elif event["kind"] == "note":
            self._note(planned, str(event.get("text")))
        self._estimate()
        self.refresh()

    def _work_of(self, planned: Planned) -> float:
        return planned.work_with(self._all_rows)

    def _count_rows(self, planned: Planned, steps: int) -> None:
        """The steps of a trial on all rows tell how many there are."""
        train = planned.config["train"]
        if planned.config["data"]["n"] != ALL or train["max_steps"] is not None:
            return
        rows = steps * train["batch_size"] / train["epochs"]
        if rows != self._all_rows:
            self._all_rows = rows
            self._known_work = sum(map(self._work_of, self._known))

    def _note(self, planned: Planned, text: str) -> None:
        """What nobody would expect; once, however many trials it happens to."""
        if text not in self._noted:
            self._noted.add(text)
            self.say(f"note: {planned.label}: {text}")

    def finished(self, planned: Planned) -> None:
        """A trial has its result."""
        self._done_trials += 1
        self._done_work += self._work_of(planned)
        self._parts.pop(planned, None)
        self._estimate()
        self.refresh()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(shown(text, 2000), highlight=False, markup=False, soft_wrap=True)

    def refresh(self) -> None:
        """Show the newest state."""
        work = self._work()
        fields = self._fields()
        self._bar.update(
            self._task, total=self._total, completed=work, description=self._now, **fields
        )
        if not self._console.is_terminal and time.monotonic() - self._line_at > LINE_EVERY_S:
            parts = [fields["trials"], fields["speed"].strip(), fields["left"], self._now]
            line = " | ".join(filter(None, parts))
            if line != self._line:  # a file needs no line that says nothing new
                self._line, self._line_at = line, time.monotonic()
                self.say(line)

    def _running(self, planned: Planned) -> str:
        """The trial, and how many run beside it."""
        others = len(self._parts.keys() - {planned})
        return f"{planned.label} and {others} more" if others else planned.label

    @property
    def _total(self) -> float:
        known = self._known_work
        return known + self._more * (known / len(self._known) if self._known else 1.0) or 1.0

    def _work(self) -> float:
        return self._done_work + sum(self._parts.values())

    def _fields(self) -> dict[str, Any]:
        speed = f"{self._tokens_per_s:.0f} tokens/s" if self._tokens_per_s else ""
        return {
            "trials": f"{self._done_trials}/{len(self._known) + self._more} trials",
            "speed": f"{speed:>12}",
            "left": self._time_left(),
        }

    def _estimate(self) -> None:
        """Say when all will be done, at the speed so far; between events the time runs down."""
        now, work = time.monotonic(), self._work()
        self._began = self._began or now
        if work > 0:
            self._deadline = now + (now - self._began) * (self._total - work) / work

    def _time_left(self) -> str:
        if self._deadline is None:
            return "time left: not known yet"
        left_s = self._deadline - time.monotonic()
        if left_s < 1:  # a guess that has run out says nothing
            return "longer than expected" if self._work() < self._total else "done"
        return f"{left_s / 60:.0f} min left" if left_s >= 90 else f"{left_s:.0f} s left"
