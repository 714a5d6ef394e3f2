"""The scheduler completes every trial once or records a failure, whatever ends a process."""

from __future__ import annotations

import io
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests import grid, studies
from tests.fake_worker import CODES, Ended, FakeWorker, FakeWorkers, ProcessWorkers, act
from tinyllama_lab.errors import StudyError
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.machine import cpu_name
from tinyllama_lab.study.pack import Pace, Pack, Task
from tinyllama_lab.study.trial import Result, State, TrialFolder
from tinyllama_lab.sweep.execution import running, schedule
from tinyllama_lab.sweep.execution.display import Display
from tinyllama_lab.sweep.execution.interrupts import Interrupts
from tinyllama_lab.sweep.execution.schedule import Scheduler
from tinyllama_lab.sweep.execution.slots import Slot, SlotPool
from tinyllama_lab.sweep.launchers import Workers
from tinyllama_lab.sweep.plan import Plan
from tinyllama_lab.sweep.tracking.tracker import NullTracker, Tracker

GRID = ("lora.r=2,4", "seed=0,1")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "POLL_S", 0)


class Recorder(Tracker):
    """A tracker that records its calls in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []

    def follow(self, trial: TrialFolder, label: str, params: Mapping[str, Any]) -> None:
        self.calls.append(("follow", trial.key, label))

    def finish(self, trial: TrialFolder, result: Result) -> None:
        self.calls.append(("finish", trial.key, result.state))

    def count(self, what: str) -> Counter[str]:
        return Counter(key for name, key, _ in self.calls if name == what)


def run(plan: Plan, workers: Workers, tracker: Tracker | None = None) -> str:
    """Run a plan, and return what is printed."""
    text = io.StringIO()
    with Display(plan.todo, Console(file=text, width=200)) as display:
        Scheduler(plan, workers, tracker or NullTracker(), display, Interrupts()).run()
    return text.getvalue()


def outcome(plan: Plan) -> dict[str, tuple[str, int]]:
    """Return state and attempts of every trial with a result on disk, by label."""
    ended = {p.label: p.trial.read_result()[0] for p in plan.trials}
    return {label: (str(r.state), r.attempts) for label, r in ended.items() if r}


def test_a_grid_is_completed_and_each_trial_once(tmp_path: Path) -> None:
    plan, workers, tracker = grid.plan(tmp_path, *GRID), FakeWorkers(), Recorder()
    run(plan, workers, tracker)
    base = plan.base(plan.trials[0]).key
    assert set(outcome(plan).values()) == {("done", 1)} and len(plan.results) == 4
    assert workers.completions == {base: 1, **{p.trial.key: 1 for p in plan.trials}}
    assert tracker.count("finish") == tracker.count("follow")
    assert tracker.count("finish") == {p.trial.key: 1 for p in plan.trials}
    assert len(workers.packs) == 1 and not workers.started[0].stopped
    assert grid.plan(tmp_path, *GRID).todo == []


def test_a_pack_tells_its_worker_what_was_typed_and_which_machine(tmp_path: Path) -> None:
    plan, workers = grid.plan(tmp_path, *GRID, "hardware.threads=2"), FakeWorkers()
    run(plan, workers)
    work = workers.packs[0].read()
    assert work.hardware["threads"] == 2 and work.hardware["max_attempts"] == 3
    assert work.tasks == [
        Task(p.trial, plan.base(p), p.overrides, p.config["eval"]) for p in plan.trials
    ]
    config = plan.trials[0].trial.read_config()
    assert "hardware" not in config and "tracking" not in config and config["lora"]["r"] == 2


def test_tasks_hold_the_speed_of_earlier_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ("hardware.device=cpu", "data.eval_n=10", "eval.max_new_tokens=20")
    plan, first = grid.plan(tmp_path, *GRID, *typed), FakeWorkers()
    run(plan, first)
    assert {task.pace for task in first.packs[0].read().tasks} == {None}
    monkeypatch.setitem(studies.ENVIRONMENT, "hardware", cpu_name())
    config = plan.trials[0].config
    keys = {
        "model.identity": [config["model"]["identity"]],
        "train.precision": [config["train"]["precision"]],
        "lora.targets": [config["lora"]["targets"]],
        "lora.r": [2, 8, 32],
        "data.n": [500],
    }
    studies.simulated_study(tmp_path, keys, seeds=(0,), name="before")
    plan, workers = grid.plan(tmp_path, "lora.r=16,64", *typed), FakeWorkers()
    run(plan, workers)
    # the median rank took 0.0532 s a row of 85 tokens, and 20 s of scoring: 8 rows, and texts of
    # 2 * 8 tokens at an eighth of a row each
    pace = Pace(cpu_name(), pytest.approx(85 / 0.0532), pytest.approx(20 / 10 * (10 + 5)))
    assert [task.pace for task in workers.packs[0].read().tasks] == [pace, pace]


def test_a_worker_that_ended_before_it_was_returned_is_followed(tmp_path: Path) -> None:
    class Inline(FakeWorkers):
        def start(self, pack: Pack) -> FakeWorker:
            worker = super().start(pack)
            while worker.exit_code() is None:
                pass
            return worker

    plan, tracker = grid.plan(tmp_path, *GRID), Recorder()
    run(plan, Inline(), tracker)
    assert tracker.count("follow") == tracker.count("finish")
    assert set(tracker.count("follow")) == {p.trial.key for p in plan.trials}


def test_workers_side_by_side_share_a_grid_and_the_machine(tmp_path: Path) -> None:
    plan, workers = grid.plan(tmp_path, *GRID, "quant=none,nf4"), FakeWorkers()
    with Display(plan.todo, Console(file=io.StringIO())) as display:
        room = SlotPool([Slot("0"), Slot("1"), Slot("2")])
        args = (plan, workers, NullTracker(), display, Interrupts(), room)
        Scheduler(*args).run()
    assert len(outcome(plan)) == 8 and set(outcome(plan).values()) == {("done", 1)}
    works = [pack.read() for pack in workers.packs]
    assert [len(work.tasks) for work in works] == [2, 1, 1, 2, 1, 1]
    assert [work.gpu for work in works[:3]] == ["0", "1", "2"]
    assert {work.hardware["workers"] for work in works} == {3}
    assert room.take() is not None  # all were given back


def test_each_base_has_its_worker_and_its_evaluation(tmp_path: Path) -> None:
    plan, workers = grid.plan(tmp_path, *GRID, "quant=none,nf4"), FakeWorkers()
    run(plan, workers)
    assert len(workers.packs) == 2 and len(outcome(plan)) == 8
    assert len(list((tmp_path / "_base").iterdir())) == 2
    again = FakeWorkers()
    run(grid.plan(tmp_path, "lora.r=8"), again)
    assert len(again.completions) == 1  # the base was there


@pytest.mark.parametrize("deaths", [1, 2])
@pytest.mark.parametrize("which", [0, 2, 3])
def test_a_trial_that_loses_its_worker_runs_again(tmp_path: Path, deaths: int, which: int) -> None:
    plan, tracker = grid.plan(tmp_path, *GRID), Recorder()
    victim = plan.trials[which].trial.key
    workers = FakeWorkers({victim: ["kill"] * deaths})
    said = run(plan, workers, tracker)
    attempts = {p.trial.key: outcome(plan)[p.label] for p in plan.trials}
    assert attempts.pop(victim) == ("done", deaths + 1)
    assert set(attempts.values()) == {("done", 1)}
    sent = tracker.count("finish")
    assert set(workers.completions.values()) == {1} == {sent[p.trial.key] for p in plan.trials}
    assert len(workers.packs) > deaths and said.count("by signal 9") == deaths


def test_a_trial_that_always_loses_its_worker_fails_and_the_rest_goes_on(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, *GRID)
    victim = plan.trials[1]
    workers = FakeWorkers({victim.trial.key: ["kill"] * 9})
    run(plan, workers)
    found = outcome(plan)
    assert found.pop(victim.label) == ("failed", 3)
    assert len(found) == 3 and set(found.values()) == {("done", 1)}
    error = plan.results[victim.trial.key].error
    assert error and error["class"] == "killed"
    assert "by signal 9, 3 times" in error["message"] and "the log of" in error["log_tail"]
    for pack in workers.packs:
        shutil.rmtree(pack.folder)  # as the next command does
    assert "the log of" in victim.trial.log_file.read_text()
    again = grid.plan(tmp_path, *GRID)
    assert [p.label for p in again.todo] == [victim.label]
    assert grid.plan(tmp_path, *GRID, "retry=none").todo == []


@pytest.mark.parametrize("most", [1, 2, 5])
def test_how_often_a_worker_may_be_lost_is_a_setting(tmp_path: Path, most: int) -> None:
    plan = grid.plan(tmp_path, f"hardware.max_attempts={most}")
    run(plan, FakeWorkers({plan.trials[0].trial.key: ["crash"] * 9}))
    assert list(outcome(plan).values()) == [("failed", most)]


@pytest.mark.parametrize("fault", ["crash", "stopped", "silent"])
def test_any_other_exit_before_the_result_is_a_lost_worker(tmp_path: Path, fault: str) -> None:
    plan = grid.plan(tmp_path, *GRID)
    said = run(plan, FakeWorkers({plan.trials[0].trial.key: [fault]}))
    assert sorted(outcome(plan).values()) == [("done", 1)] * 3 + [("done", 2)]
    assert "with exit status" in said


def test_a_worker_without_a_sign_of_life_is_named_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "POLL_S", 0.01)
    monkeypatch.setattr(schedule, "SILENCE_AT_FIRST", 100)  # only of one that never beats
    plan = grid.plan(tmp_path, *GRID, "hardware.silence_s=0.3")
    workers = FakeWorkers({plan.trials[2].trial.key: ["hang"]})
    said = run(plan, workers)
    assert sorted(outcome(plan).values()) == [("done", 1)] * 3 + [("done", 2)]
    assert [worker.stopped for worker in workers.started] == [True, False]
    assert "a worker has not responded for 0 s" in said
    assert "a worker did not respond and was killed; trying 2 trial(s) again" in said


def test_a_driver_that_was_stopped_itself_does_not_take_that_for_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(running.time, "monotonic", lambda: now[0])
    silence = running.Silence()
    for beat in (1, 2, 2, 2):
        now[0] += 0.2
        silence.look(beat)
    assert silence.seconds == pytest.approx(0.4)
    now[0] += 3600
    silence.look(2)
    assert silence.seconds == pytest.approx(0.4 + running.LONGEST_LOOK_S)
    silence.look(3)
    assert silence.seconds == 0 and silence.longest_s == pytest.approx(5.4)


def test_a_pack_whose_worker_never_begins_a_trial_fails(tmp_path: Path) -> None:
    class Broken(FakeWorkers):
        def start(self, pack: Pack) -> FakeWorker:
            super().start(pack)
            return FakeWorker(iter(()), code=127)

    plan, workers = grid.plan(tmp_path, *GRID), Broken()
    run(plan, workers)
    assert set(outcome(plan).values()) == {("failed", 1)} and len(outcome(plan)) == 4
    assert len(workers.packs) == 3


@pytest.mark.parametrize(("fault", "ended"), [("no_base", "failed"), ("no_memory", "oom")])
def test_without_its_base_a_pack_fails_and_the_others_go_on(
    fault: str, ended: str, tmp_path: Path
) -> None:
    plan = grid.plan(tmp_path, *GRID, "quant=none,nf4")
    lost = {p.label for p in plan.trials if p.config["quant"]["kind"] == "nf4"}
    base = next(plan.base(p).key for p in plan.trials if p.label in lost)
    run(plan, FakeWorkers({base: [fault]}))
    found = outcome(plan)
    assert {label for label, (state, _) in found.items() if state == ended} == lost
    assert len(found) == 8
    errors = [r.error for r in plan.results.values() if r.error]
    assert {(e["class"], e["message"]) for e in errors} == {("no_base", f"{fault} on purpose")}
    again, workers = grid.plan(tmp_path, *GRID, "quant=none,nf4"), FakeWorkers()
    run(again, workers)
    assert {state for state, _ in outcome(again).values()} == {"done"}
    assert sum(workers.completions.values()) == 5


def test_trials_and_base_of_other_numerics_are_made_anew(tmp_path: Path) -> None:
    plan, workers = grid.plan(tmp_path, *GRID), FakeWorkers()
    run(plan, workers)
    base = plan.base(plan.trials[0])
    for folder in (plan.trials[1].trial, base):
        result, _ = folder.read_result()
        assert result is not None
        result.environment = {"numerics": 1}
        folder.commit(result, [folder.adapter_dir / "weights"])
    again = grid.plan(tmp_path, *GRID, "retry=outdated")
    assert again.todo == [again.trials[1]] and again.todo[0].is_outdated
    run(again, workers)
    counts = [workers.completions[planned.trial.key] for planned in again.trials]
    assert counts == [1, 2, 1, 1] and workers.completions[base.key] == 2
    assert not grid.plan(tmp_path, *GRID, "retry=outdated").todo


def test_a_full_disk_stops_the_sweep_and_keeps_what_is_done(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, *GRID)
    workers = FakeWorkers({plan.trials[2].trial.key: ["no_space"]})
    with pytest.raises(StudyError, match="is full; free some space and run the command again"):
        run(plan, workers)
    assert len(outcome(plan)) == 2 and len(workers.packs) == 1
    run(grid.plan(tmp_path, *GRID), workers)
    assert len(outcome(plan)) == 4 and set(workers.completions.values()) == {1}


@pytest.mark.parametrize("state", ["diverged", "oom", "failed", "pruned"])
def test_a_trial_that_ends_badly_is_a_result_and_not_tried_again_at_once(
    tmp_path: Path, state: str
) -> None:
    plan, tracker = grid.plan(tmp_path, *GRID), Recorder()
    victim = plan.trials[1]
    workers = FakeWorkers({victim.trial.key: [state]})
    said = run(plan, workers, tracker)
    assert outcome(plan)[victim.label] == (state, 1) and len(workers.packs) == 1
    assert ("finish", victim.trial.key, State(state)) in tracker.calls
    assert f"{victim.label}: {state} ({state} on purpose)" in said
    again = {p.label for p in grid.plan(tmp_path, *GRID).todo}
    assert again == ({victim.label} if state == "oom" else set())


def test_a_failed_trial_that_is_asked_for_again_is_missing_until_it_ends(tmp_path: Path) -> None:
    key = grid.plan(tmp_path).trials[0].trial.key
    run(grid.plan(tmp_path), FakeWorkers({key: ["failed"]}))
    plan = grid.plan(tmp_path, "retry=all")
    with pytest.raises(KeyboardInterrupt):
        run(plan, Interrupting(after=3))
    assert outcome(plan) == {}
    run(grid.plan(tmp_path), FakeWorkers())
    assert list(outcome(plan).values()) == [("done", 3)]


class Interrupting(FakeWorkers):
    """Ctrl-C arrives when the driver has checked `after` times."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def start(self, pack: Pack) -> FakeWorker:
        worker = super().start(pack)
        ask = worker.exit_code

        def exit_code() -> int | None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return ask()

        worker.exit_code = exit_code  # type: ignore[method-assign]
        return worker


def test_ctrl_c_at_any_moment_stops_the_worker_and_loses_nothing(tmp_path: Path) -> None:
    for after in range(0, 30, 2):
        root = tmp_path / str(after)
        workers = Interrupting(after)
        with pytest.raises(KeyboardInterrupt):
            run(first := grid.plan(root, *GRID), workers)
        assert workers.started[-1].stopped
        done = outcome(first)
        assert {p.label for p in first.trials if p.trial.key in first.results} <= set(done)
        second, rest = grid.plan(root, *GRID), FakeWorkers(completions=workers.completions)
        assert len(second.todo) == 4 - len(done)
        run(second, rest)
        assert len(outcome(second)) == 4 and set(rest.completions.values()) == {1}


class Fate(FakeWorkers):
    """Between any two writes, the worker dies, the driver stops, or a write is cut off."""

    def __init__(self, seed: int, completions: Counter[str]) -> None:
        super().__init__(completions=completions)
        self.dice = random.Random(seed)

    def start(self, pack: Pack) -> FakeWorker:
        worker = super().start(pack)
        worker.steps = self._fated(pack)
        return worker

    def _fated(self, pack: Pack) -> Any:
        for _ in act(pack, {}, self.completions):
            yield
            chance = self.dice.random()
            if chance < 0.10:
                self._cut_a_line(pack)
                raise KeyboardInterrupt if chance < 0.04 else Ended(CODES["kill"])

    def _cut_a_line(self, pack: Pack) -> None:
        files = [
            trial.events_file
            for trial in (t.trial for t in pack.read().tasks)
            if trial.events_file.exists()
        ]
        for path in self.dice.sample(files, min(1, len(files))):
            with path.open("ab") as file:
                file.write(b'{"kind": "metric", "step"')


@pytest.mark.parametrize("seed", range(32))
def test_random_deaths_never_lose_or_repeat_a_trial(tmp_path: Path, seed: int) -> None:
    completions: Counter[str] = Counter()
    overrides = (*GRID, "quant=none,nf4", "hardware.max_attempts=1000")
    for restart in range(200):
        plan = grid.plan(tmp_path, *overrides)
        if not plan.todo:
            break
        try:
            run(plan, Fate(1000 * seed + restart, completions))
        except KeyboardInterrupt:
            continue
    assert plan.todo == [] and plan.notes == []
    assert {p.trial.key for p in plan.trials} < set(completions)
    assert set(completions.values()) == {1} and len(completions) == 8 + 2
    for planned in plan.trials:
        states = [e["state"] for e in read_events(planned.trial.events_file) if "state" in e]
        result = plan.results[planned.trial.key]
        assert result.state is State.DONE and result.attempts == states.count("running")
        assert states.count("done") <= 1


def test_processes_that_really_die_are_replaced(tmp_path: Path) -> None:
    plan = grid.plan(tmp_path, *GRID)
    once, always = plan.trials[0].trial.key, plan.trials[3].trial.key
    run(plan, ProcessWorkers({once: ["kill"], always: ["kill", "crash", "kill"]}))
    assert sorted(outcome(plan).values()) == [("done", 1)] * 2 + [("done", 2), ("failed", 3)]
    error = plan.results[always].error
    assert error and "by signal 9" in error["message"] and error["log_tail"] == "ends with -9"
