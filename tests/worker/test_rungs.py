"""Rungs: right losses, reported once, without effect on training; pruned trials leave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.packs import (
    QUIET,
    Lab,
    Wrapped,
    events,
    losses,
    quickly,
    result,
    same_bits,
    states,
    weights,
)
from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.evaluation.bases import Bases
from tinyllama_lab.core.training.rungs import await_pruning
from tinyllama_lab.core.training.stream import TrialStream, run_stream
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.pack import Pack, StreamSettings, Task
from tinyllama_lab.study.trial import State, TrialFolder

pytestmark = pytest.mark.usefixtures("dora_alone")

STREAM = StreamSettings(max_concurrent=3, rungs=(0.25, 0.5), rung_rows=4)
CHANGES = {**QUIET, "train.deterministic": True, "train.max_steps": 8, "lora.dropout": 0.2}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


def streaming(lab: Lab, stream: StreamSettings = STREAM, **changes: Any) -> WorkerContext:
    return replace(lab.context(**changes), stream=stream)


def arrivals(lab: Lab, count: int = 3, **changes: Any) -> list[TrialFolder]:
    return [lab.trial({**CHANGES, **changes, "seed": seed}) for seed in range(count)]


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_rungs_change_no_bit_of_training(lab: Lab, tmp_path: Path, variant: str) -> None:
    changes = {"lora.variant": variant}
    plain = arrivals(replace(lab, folder=tmp_path / "plain"), 2, **changes)
    streamed = arrivals(replace(lab, folder=tmp_path / "streamed"), 2, **changes)
    lab.run(plain)
    lab.run(streamed, streaming(lab))
    for one, other in zip(streamed, plain, strict=True):
        same_bits(one, other)
        assert [e["step"] for e in events(one, "rung")] == [2, 4]
        assert events(other, "rung") == []


class Watch(Wrapped):
    """Computes the held-out loss of every adapter whenever the pack computes losses."""

    def __init__(self, inside: Any) -> None:
        super().__init__(inside)
        self.seen: list[list[float]] = []

    def example_losses(self, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
        found = super().example_losses(items)
        if not torch.is_grad_enabled():
            labels = torch.tensor([item.example.labels for item in items])
            self.seen.append((found / labels).tolist())
        return found


def test_a_rung_is_the_held_out_loss_of_its_first_rows(lab: Lab) -> None:
    (trial,) = arrivals(lab, 1)
    watches: list[Watch] = []

    def wrap(engine: Any) -> Any:
        watches.append(Watch(engine))
        return watches[-1]

    lab.run([trial], streaming(lab), wrap=wrap)
    first, second, *_ = watches[0].seen
    for seen, event in zip((first, second), events(trial, "rung"), strict=True):
        assert len(seen) == STREAM.rung_rows
        assert event["examples"] == pytest.approx(seen, abs=1e-5)
        assert min(seen) < event["values"]["rung/eval_loss"] < max(seen)


def test_the_loss_at_a_rung_is_that_of_a_trial_that_ends_there(lab: Lab, tmp_path: Path) -> None:
    changes = {"train.schedule": "constant", "train.warmup_ratio": 0.0}
    (whole,) = arrivals(replace(lab, folder=tmp_path / "a"), 1, **changes)
    lab.run([whole], streaming(lab, StreamSettings(1, (0.5,), 10_000)))
    (short,) = arrivals(
        replace(lab, folder=tmp_path / "b"), 1, **changes, **{"train.max_steps": 4}
    )
    lab.run([short])
    (event,) = events(whole, "rung")
    expected = result(short).metrics["eval/loss"]
    assert event["values"]["rung/eval_loss"] == pytest.approx(expected, rel=1e-6)


class Prunes(Wrapped):
    """A driver that prunes a trial as soon as it has reported a number of rungs."""

    def __init__(self, inside: Any, trial: TrialFolder, rungs: int) -> None:
        super().__init__(inside)
        self.trial, self.rungs = trial, rungs

    def micro_batches(
        self, items: Sequence[WorkItem[Any]], max_tokens: int
    ) -> list[list[WorkItem[Any]]]:
        told = len(events(self.trial, "rung"))
        if told >= self.rungs and not self.trial.result_file.exists():
            self.trial.prune("behind")
        return super().micro_batches(items, max_tokens)


def pruning(trial: TrialFolder, rungs: int = 1) -> Callable[[Any], Any]:
    return lambda engine: Prunes(engine, trial, rungs)


def test_a_pruned_trial_leaves_within_a_step_and_changes_no_other(
    lab: Lab, tmp_path: Path
) -> None:
    alone = arrivals(replace(lab, folder=tmp_path / "alone"))
    lab.run(alone)
    streamed = arrivals(replace(lab, folder=tmp_path / "streamed"))
    victim = streamed[1]
    lab.run(streamed, streaming(lab), wrap=pruning(victim))
    found = result(victim)
    assert found.state is State.PRUNED and found.error is not None
    assert found.error["message"] == "behind" and found.metrics["perf/trial_seconds"] > 0
    assert len(losses(victim)) == 3 and found.data["trained_tokens"] > 0
    assert losses(victim) == losses(alone[1])[:3]
    assert not victim.checkpoint_dir.exists() and not victim.prune_file.exists()
    assert states(victim) == ["running", "pruned"]
    for one in (0, 2):
        same_bits(streamed[one], alone[one])


def test_a_slot_that_a_pruned_trial_leaves_is_taken(lab: Lab) -> None:
    first, second = arrivals(lab, 2)
    lab.run([first, second], streaming(lab), wrap=pruning(first), max_concurrent=1)
    assert [result(t).state for t in (first, second)] == [State.PRUNED, State.DONE]


def test_a_rung_is_reported_once_although_the_worker_is_stopped(lab: Lab) -> None:
    trials = arrivals(lab, 2)
    context = streaming(lab)
    lab.context = lambda stopped=None, **changes: replace(
        context, stopped=stopped or context.stopped
    )  # type: ignore[method-assign]
    for calls in (9, 14, 19):
        lab.stop(trials, calls)
    lab.run(trials)
    for trial in trials:
        assert [e["rung"] for e in events(trial, "rung")] == [0, 1]
        assert result(trial).state is State.DONE and result(trial).attempts == 4


def test_a_pruning_decision_outlives_its_worker(lab: Lab) -> None:
    (trial,) = arrivals(lab, 1)
    trial.prune("behind, said before the driver died")
    lab.run([trial], streaming(lab))
    assert result(trial).state is State.PRUNED and len(losses(trial)) == 1


def test_a_short_trial_has_the_rungs_it_has_room_for(lab: Lab) -> None:
    (trial,) = arrivals(lab, 1, **{"train.max_steps": 1})
    lab.run([trial], streaming(lab, StreamSettings(8, (0.1, 0.2, 0.9), 4)))
    assert events(trial, "rung") == [] and result(trial).state is State.DONE
    assert result(trial).environment["adapters_at_once"] == 1  # whatever there was room for


def test_in_a_search_a_result_does_not_wait_for_the_others(lab: Lab) -> None:
    slow, quick = (
        lab.trial({**CHANGES, "seed": 1}),
        lab.trial({**CHANGES, "train.max_steps": 2}),
    )
    lab.run([slow, quick], streaming(lab, StreamSettings(8)))
    assert [result(t).environment["adapters_at_once"] for t in (slow, quick)] == [2, 2]
    assert quick.result_file.stat().st_mtime_ns < events(slow, "metric")[-1]["time"] * 1e9
    assert len(weights(slow)) > 0


def test_trials_that_arrive_while_peft_trains_another_are_trained(lab: Lab) -> None:
    first, second, third = (
        lab.trial(
            {**CHANGES, "lora.variant": variant, "lora.targets": "attention_qv", "seed": seed}
        )
        for seed, variant in enumerate(("dora", "dora", "lora"))
    )
    pack = Pack(lab.folder / "pack")
    tasks = [Task(trial, lab.base_trial(trial), ()) for trial in (first, second, third)]
    context = streaming(lab)

    waiting = iter(tasks[1:])
    said = context.stopped

    def stopped() -> bool:
        for task in waiting:
            pack.add(task)
            pack.close()
        return said()

    context = replace(context, stopped=stopped)
    run_stream(context, Bases(context), TrialStream(context, pack.arrivals(), tasks[:1]), False)
    assert [result(t).state for t in (first, second, third)] == [State.DONE] * 3
    engines = [result(t).environment["engine"].split()[0] for t in (first, second, third)]
    assert engines == ["peft", "peft", "packed"]


def test_a_trial_that_fails_at_a_rung_ends_alone(lab: Lab) -> None:
    good, bad = arrivals(lab, 2)

    class Breaks(Wrapped):
        def example_losses(self, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
            if not torch.is_grad_enabled() and any(i.adapter is self.added[1] for i in items):
                if len(events(bad, "metric")) < 8:
                    raise RuntimeError("broken on purpose")
            return super().example_losses(items)

    lab.run([good, bad], streaming(lab), wrap=Breaks)
    assert result(good).state is State.DONE and len(events(good, "rung")) == 2
    assert result(bad).state is State.FAILED


def test_a_rung_that_cannot_be_written_fails_its_own_trial_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial before it in the list was reported already when the write fails."""
    trials = arrivals(lab)
    append = EventLog.append

    def refuse(self: EventLog, kind: str, **values: Any) -> Any:
        if kind == "rung" and self._path == trials[1].events_file:
            raise PermissionError("not ours any more")
        return append(self, kind, **values)

    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "append", refuse)
        lab.run(trials, streaming(lab))
    assert [result(trial).state for trial in trials] == [State.DONE, State.FAILED, State.DONE]
    for trial in (trials[0], trials[2]):
        assert [event["step"] for event in events(trial, "rung")] == [2, 4]


def test_a_nan_loss_at_a_rung_is_reported(lab: Lab) -> None:
    class Broken(Wrapped):
        def example_losses(self, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
            found = super().example_losses(items)
            return found if torch.is_grad_enabled() else found * torch.nan

    (trial,) = arrivals(lab, 1)
    lab.run([trial], streaming(lab), wrap=Broken)
    assert str(events(trial, "rung")[0]["values"]["rung/eval_loss"]) == "nan"
    assert result(trial).state is State.DIVERGED


def test_the_worker_waits_for_a_pruning_decision_but_not_forever(tmp_path: Path) -> None:
    trials = [TrialFolder(tmp_path / name) for name in "ab"]
    for trial in trials:
        trial.folder.mkdir()
    late = threading.Timer(0.3, trials[1].prune, ["worse"])
    late.start()
    await_pruning(trials, step_s=60.0)
    assert trials[1].prune_reason() == "worse"
    late.join()
    await_pruning(trials[:1], step_s=0.0)
    await_pruning([], step_s=60.0)
    assert trials[0].prune_reason() is None
