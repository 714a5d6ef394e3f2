"""A pack whose trials run side by side, in a worker that the kernel may kill."""

from __future__ import annotations

import io
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from tests import grid
from tests.fake_worker import Ended, FakeWorker, act
from tinyllama_lab.study.events import EventLog, read_events
from tinyllama_lab.study.pack import Pack
from tinyllama_lab.study.trial import State
from tinyllama_lab.sweep.execution import schedule
from tinyllama_lab.sweep.execution.display import Display
from tinyllama_lab.sweep.execution.interrupts import Interrupts
from tinyllama_lab.sweep.execution.schedule import Scheduler
from tinyllama_lab.sweep.plan import Plan
from tinyllama_lab.sweep.tracking.tracker import NullTracker

GRID = ("lora.r=2,4,8", "seed=0,1")


@dataclass
class Greedy:
    """Starts workers that are killed as soon as more than `most` trials run in them at once."""

    most: int
    sizes: list[int] = field(default_factory=list)

    def start(self, pack: Pack) -> FakeWorker:
        """See `Workers`."""
        self.sizes.append(len(pack.read().tasks))
        return FakeWorker(self._act(pack))

    def _act(self, pack: Pack) -> Iterator[None]:
        tasks = pack.read().tasks
        if len(tasks) > self.most:
            for number, task in enumerate(tasks):
                log = EventLog(task.trial.events_file)
                log.append("state", state="running", attempt=1)
                log.append("metric", step=number + 1, steps=9, values={}, tokens_per_s=5.0)
            yield
            raise Ended(-signal.SIGKILL)
        yield from act(pack, {}, Counter())


def run(plan: Plan, workers: Greedy) -> str:
    """Run a plan, and return what is printed."""
    text = io.StringIO()
    with Display(plan.todo, Console(file=text, width=200)) as display:
        Scheduler(plan, workers, NullTracker(), display, Interrupts()).run()
    return text.getvalue()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "POLL_S", 0)


@pytest.mark.parametrize(("most", "sizes"), [(6, [6]), (3, [6, 3, 3]), (1, [6, 3, 2, 1, 1, 1])])
def test_a_pack_that_is_killed_comes_back_in_halves(
    tmp_path: Path, most: int, sizes: list[int]
) -> None:
    plan, workers = grid.plan(tmp_path, *GRID), Greedy(most)
    said = run(plan, workers)
    assert workers.sizes[: len(sizes)] == sizes
    assert {r.state for r in plan.results.values()} == {State.DONE} and len(plan.results) == 6
    assert ("again in halves" in said) == (most < 6)


def test_a_lost_pack_counts_as_no_attempt_of_its_trials(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, *GRID, "hardware.max_attempts=1")
    run(plan, Greedy(1))
    assert {r.state for r in plan.results.values()} == {State.DONE}


def test_a_trial_that_is_killed_alone_fails(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, *GRID, "hardware.max_attempts=2")
    run(plan, Greedy(0))
    errors = [r.error for r in plan.results.values()]
    assert len(errors) == 6 and all(error and error["class"] == "killed" for error in errors)


def test_the_display_counts_trials_that_run_side_by_side(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, *GRID)
    console = Console(file=io.StringIO(), width=200)
    with Display(plan.todo, console) as display:
        for planned in plan.todo[:3]:
            log = EventLog(planned.trial.events_file.parent / "events.jsonl")
            planned.trial.folder.mkdir(parents=True, exist_ok=True)
            log.append("metric", step=1, steps=2, values={}, tokens_per_s=70.0)
            for event in read_events(planned.trial.events_file):
                display.progress(planned, event)
        assert "and 2 more: training, step 1/2" in display._now
        shares = display._work() / sum(p.work for p in plan.todo)
        assert 0 < shares < 0.25
        for planned in plan.todo:
            display.finished(planned)
        assert display._work() == pytest.approx(sum(p.work for p in plan.todo))
