"""Shows the progress of a sweep: a bar on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import time
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from tinyllama_lab.config.schema import ALL
from tinyllama_lab.errors import shown
from tinyllama_lab.study.events import Event
from tinyllama_lab.sweep.plan import GUESSED_ROWS, Planned

LINE_EVERY_S = 10.0
_NARROW = 110  # columns; a narrower terminal has a short bar and no clock
# phases that a worker names before it trains; `_phase_of` shows them as "loading"
_LOADING = ("starting the worker", "starting", "reading the data", "loading the base")


class Display:
    """Progress of a sweep: trials done, phase, loss, tokens per second and time left.

    A terminal of 80 columns shows the bar, the time left, the phase and the loss; a wider one
    shows more. Lines in a file or a pipe begin with the time of day.

    Work is counted in forward passes of one row. The time left is the remaining work divided by
    the speed so far, which excludes loading the base and the steps before a trial was resumed.
    """

    def __init__(self, todo: list[Planned], console: Console) -> None:
        self._console = console
        self._known = list(todo)
        self._all_rows = float(GUESSED_ROWS)  # rows of data.n=all
        self._known_work = sum(map(self._work_of, todo))
        self._more = (
            0  # trials that will be added; their work is taken to be the mean of the known ones
        )
        self._done_trials = 0
        self._done_work = 0.0
        self._parts: dict[Planned, float] = {}  # work done, by running trial
        self._resumed_work = 0.0  # part of `_parts` that an earlier command did
        self._noted: set[str] = set()
        self._now, self._phase = "starting the worker", "loading"
        self._losses: dict[Planned, float] = {}  # the latest training loss, by running trial
        self._tokens_per_s = 0.0
        self._began: float | None = None
        self._left_s: float | None = None  # as it was at `_estimated_at`
        self._estimated_at = 0.0
        self._line, self._line_at = "", time.monotonic()
        self._bar_width = 12 if console.width < _NARROW else 24
        self._bar = self._progress_bar()
        self._task = self._bar.add_task("", total=1.0, **self._fields())

    def _progress_bar(self) -> Progress:
        columns: list[ProgressColumn] = [
            TextColumn("{task.fields[trials]}", markup=False),
            BarColumn(bar_width=self._bar_width),
            TextColumn("{task.percentage:>3.0f} %", markup=False),
            TextColumn("{task.fields[line]}", markup=False),
        ]
        if self._console.width >= _NARROW:
            columns.insert(3, TimeElapsedColumn())
        # `refresh` prints plain lines instead
        is_off = not self._console.is_terminal
        return Progress(*columns, console=self._console, disable=is_off, transient=True)

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
        """Show the phase that a worker reports."""
        self._now, self._phase = name, _phase_of(name)
        self.refresh()

    def add(self, planned: Planned) -> None:
        """Count one more trial."""
        self._known.append(planned)
        self._known_work += self._work_of(planned)

    def expect(self, more: int) -> None:
        """Set the number of trials that will still be added."""
        self._more = more

    def progress(self, planned: Planned, event: Event) -> None:
        """Show an event of a running trial; the events of a pack's trials interleave."""
        before = self._parts.get(planned, 0.0)
        if event["kind"] == "metric" and event.get("steps"):
            self._count_rows(planned, event["steps"])
        training = self._work_of(planned) - planned.evaluation_work
        if event["kind"] == "metric" and event.get("steps"):
            self._tokens_per_s = event.get("tokens_per_s") or self._tokens_per_s
            self._parts[planned] = training * event["step"] / event["steps"]
            if before == 0:  # the first step of this command; earlier ones took no time here
                self._resumed_work += training * (event["step"] - 1) / event["steps"]
            self._phase = "training"
            if (loss := event.get("values", {}).get("train/loss")) is not None:
                self._losses[planned] = loss
            step = f"training, step {event['step']}/{event['steps']}"
            self._now = f"{self._running(planned)}: {step}"
        elif event["kind"] == "phase":
            # a phase after training means that the share of training is complete
            self._parts[planned] = before if event["name"] == "training" else training
            self._phase = _phase_of(event["name"])
            self._now = f"{self._running(planned)}: {event['name']}"
        elif event["kind"] == "note":
            self._note(planned, str(event.get("text")))
        self._estimate()
        self.refresh()

    def _work_of(self, planned: Planned) -> float:
        return planned.work_with(self._all_rows)

    def _count_rows(self, planned: Planned, steps: int) -> None:
        """Compute the number of rows of `data.n=all` from the number of steps of such a trial."""
        train = planned.config["train"]
        if planned.config["data"]["n"] != ALL or train["max_steps"] is not None:
            return
        rows = steps * train["batch_size"] / train["epochs"]
        # the number of rows changes the work of every trial with `data.n=all`
        if rows != self._all_rows:
            self._all_rows = rows
            self._known_work = sum(map(self._work_of, self._known))

    def _note(self, planned: Planned, text: str) -> None:
        """Print a note of a trial, once for all trials that have the same one."""
        if text not in self._noted:
            self._noted.add(text)
            self.say(f"note: {planned.label}: {text}")

    def finished(self, planned: Planned) -> None:
        """Count a trial that has its result."""
        self._done_trials += 1
        self._done_work += self._work_of(planned)
        self._parts.pop(planned, None)
        self._losses.pop(planned, None)
        self._estimate()
        self.refresh()

    def say(self, text: str) -> None:
        """Print a line above the bar; a line in a file or a pipe begins with the time of day."""
        clock = "" if self._console.is_terminal else time.strftime("%H:%M:%S ")
        self._console.print(
            shown(clock + text, 2000), highlight=False, markup=False, soft_wrap=True
        )

    def refresh(self) -> None:
        """Redraw the bar, or print a line if the output is not a terminal."""
        fields = self._fields()
        self._bar.update(self._task, total=self._total, completed=self._work(), **fields)
        if not self._console.is_terminal and time.monotonic() - self._line_at > LINE_EVERY_S:
            line = " | ".join(filter(None, [fields["trials"], self._phase, *self._numbers()]))
            if line != self._line:  # print no line twice
                self._line, self._line_at = line, time.monotonic()
                self.say(line)

    def _running(self, planned: Planned) -> str:
        """Return the label of a trial, and how many run along with it."""
        others = len(self._parts.keys() - {planned})
        return f"{planned.label} and {others} more" if others else planned.label

    @property
    def _total(self) -> float:
        known = self._known_work
        return known + self._more * (known / len(self._known) if self._known else 1.0) or 1.0

    def _work(self) -> float:
        return self._done_work + sum(self._parts.values())

    def _fields(self) -> dict[str, Any]:
        """Return the texts around the bar, without the parts that do not fit on the line."""
        trials = f"{self._done_trials}/{len(self._known) + self._more} trials"
        speed, loss, left, now = self._numbers()
        clock = 0 if self._console.width < _NARROW else len("0:00:00 ")
        # the width of the other columns, with a space behind each
        taken = len(f"{trials} {'-' * self._bar_width} 100 % ") + clock
        room = max(0, self._console.width - taken)
        line = f"{left}  {self._phase}"
        for part in filter(None, (loss, speed, now)):
            line += f"  {part}" if len(line) + 2 + len(part) <= room else ""
        return {"trials": trials, "line": line[:room]}

    def _numbers(self) -> tuple[str, str, str, str]:
        """Return the texts for speed, mean training loss, time left and current activity."""
        speed = f"{self._tokens_per_s:.0f} tokens/s" if self._tokens_per_s else ""
        loss = f"loss {fmean(self._losses.values()):.3f}" if self._losses else ""
        return speed, loss, self._time_left(), self._now

    def _estimate(self) -> None:
        """Compute the time left from the speed so far.

        It is not counted down in between: without progress it would promise an end.
        """
        now, work = time.monotonic(), self._work()
        done = work - self._resumed_work
        self._began = self._began or now
        # trials of a pack step together, but their events come one after the other
        if done > 0 and all(self._parts.values()):
            self._left_s = (now - self._began) * (self._total - work) / done
            self._estimated_at = now

    def _time_left(self) -> str:
        if self._left_s is None:
            return "time left: not known yet"
        left_s = max(1.0, self._left_s)
        if time.monotonic() - self._estimated_at > left_s:  # without any progress
            return "longer than expected" if self._work() < self._total else "done"
        return f"{left_s / 60:.0f} min left" if left_s >= 90 else f"{left_s:.0f} s left"


def _phase_of(name: str) -> str:
    """Return loading, training or scoring for the phase that a worker names."""
    if name in _LOADING or name.startswith("downloading "):
        return "loading"
    return "training" if name == "training" else "scoring"
