"""A pack from start to results: trials train together, leave, wait, stop and continue."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.packs import (
    QUIET,
    Lab,
    Wrapped,
    after,
    events,
    losses,
    quickly,
    result,
    run_quickly,
    same_bits,
    states,
)
from tinyllama_lab.core.training import checkpoint, finish, pool
from tinyllama_lab.errors import StoppedError
from tinyllama_lab.study.trial import State, TrialFolder

SHARED = {**QUIET, "data.max_length": 120, "train.deterministic": True}
DIFFERENT: list[dict[str, Any]] = [
    {"lora.r": 2, "train.max_steps": 3, "lora.dropout": 0.2},
    {"lora.r": 4, "train.max_steps": 5, "lora.targets": "mlp"},
    {"lora.r": 8, "train.max_steps": 1, "seed": 4},
    {"lora.r": 1, "train.max_steps": 4, "data.n": 6},
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


def make(lab: Lab, place: str = "trials", *more: dict[str, Any]) -> list[TrialFolder]:
    return [lab.trial({**SHARED, **each}, place) for each in (*DIFFERENT, *more)]


@pytest.fixture(scope="module")
def undisturbed(another_lab: Lab) -> list[TrialFolder]:
    """Return four trials that were trained together without a failure."""
    return run_quickly(another_lab, make(another_lab))


@pytest.fixture(scope="module")
def row_by_row(another_lab: Lab) -> list[TrialFolder]:
    """Return the same trials, trained in the smallest micro-batches."""
    return run_quickly(another_lab, make(another_lab, "row by row"), micro_batch_tokens=1)


def same(found: Sequence[TrialFolder], expected: Sequence[TrialFolder]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert result(ours).state == State.DONE
        same_bits(ours, theirs)


# ---- together ------------------------------------------------------------------------------


def test_the_base_is_scored_once_for_all(lab: Lab) -> None:
    trials = make(lab)
    found = lab.run(trials)
    assert [each.state for each in found] == [State.DONE] * 4
    assert [each.environment["engine"] for each in found] == ["packed"] * 4
    bases = {lab.base_trial(trial).folder for trial in trials}
    assert len(bases) == 1
    base = lab.base_trial(trials[0])
    assert states(base) == ["running", "done"]
    assert {each.metrics["base/loss"] for each in found} == {result(base).metrics["eval/loss"]}
    assert len({each.metrics["eval/loss"] for each in found}) == 4
    written = [t.result_file.stat().st_mtime_ns for t in (*trials, base)]
    lab.run([*trials, lab.trial({**SHARED, "seed": 9})])  # widened: only the new one is run
    assert [t.result_file.stat().st_mtime_ns for t in (*trials, base)] == written


def test_seconds_are_shared_by_tokens_and_memory_is_the_packs(lab: Lab) -> None:
    sizes = ({"train.batch_size": 1}, {"train.batch_size": 8})
    trials = [lab.trial({**QUIET, "train.max_steps": 3, **size}) for size in sizes]
    few, many = (each.metrics for each in lab.run(trials))
    assert few["perf/train_seconds"] < many["perf/train_seconds"]
    assert few["perf/train_tokens_per_s"] == pytest.approx(many["perf/train_tokens_per_s"])
    for metrics in (few, many):
        assert metrics["perf/trial_seconds"] > metrics["perf/train_seconds"] > 0
        tokens = [event["tokens"] for event in events(trials[metrics is many], "metric")]
        speed = tokens[-1] / metrics["perf/train_seconds"]
        assert speed == pytest.approx(metrics["perf/train_tokens_per_s"], rel=0.9)
    for name in ("train_peak_mib", "predicted_mib", "predicted_infer_mib"):
        shared = few[f"memory/{name}"]
        assert shared == pytest.approx(many[f"memory/{name}"], rel=0.01) and shared > 100


def test_facts_say_how_training_was_fitted(lab: Lab) -> None:
    (found, *_) = lab.run(make(lab), lab.context(micro_batch_tokens=300))
    facts = {"micro_batch_tokens": 300, "adapters_at_once": 4, "gradient_checkpointing": False}
    assert facts.items() <= found.environment.items()


def test_every_adapter_is_removed_at_the_end(lab: Lab) -> None:
    made: list[Wrapped] = []

    def watched(inside: Any) -> Any:
        made.append(Wrapped(inside))
        return made[-1]

    lab.run(make(lab), wrap=watched, max_concurrent=2)
    assert len(made[0].added) == 4 and made[0].adapters == []


@pytest.mark.parametrize(
    ("max_concurrent", "groups"), [(None, [5]), (2, [3, 2]), (1, [2, 1, 1, 1])]
)
def test_trained_adapters_are_scored_together(
    max_concurrent: int | None, groups: list[int], lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    score = finish.score

    def watched(context: Any, engine: Any, subjects: Any) -> None:
        sizes.append(len(subjects))
        score(context, engine, subjects)

    monkeypatch.setattr(finish, "score", watched)
    steps = (2, 2, 3, 3)
    trials = [
        lab.trial({**SHARED, "lora.r": n + 1, "train.max_steps": s}) for n, s in enumerate(steps)
    ]
    lab.run(trials, max_concurrent=max_concurrent)
    assert sizes == groups  # the base is one of the first


# ---- leaving -------------------------------------------------------------------------------

BAD: dict[str, dict[str, Any]] = {
    "data": {"data.source": "file", "data.path": "/nowhere.jsonl"},
    "targets": {"lora.targets": ["q_porj"]},
    "max_loss": {"train.max_loss": 0.5},
}


@pytest.mark.parametrize(
    ("kind", "place"), [("data", 0), ("targets", 0), ("targets", 3), ("max_loss", 3)]
)
def test_a_trial_that_fails_changes_no_bit_of_the_others(
    kind: str, place: int, lab: Lab, undisturbed: list[TrialFolder]
) -> None:
    trials = make(lab)
    guilty = lab.trial({**SHARED, **BAD[kind]})
    lab.run([*trials[:place], guilty, *trials[place:]])
    same(trials, undisturbed)
    found = result(guilty)
    diverged = kind == "max_loss"
    assert found.state == (State.DIVERGED if diverged else State.FAILED)
    assert found.error is not None
    assert found.error["class"] == {"max_loss": "diverged", "data": "data"}.get(kind, "invalid")
    assert states(guilty) == ["running", str(found.state)]
    assert not guilty.adapter_dir.exists()


# ---- stopping ------------------------------------------------------------------------------


def step_of(trial: TrialFolder) -> int:
    saved, damaged = checkpoint.load(trial.checkpoint_dir)
    assert damaged == []
    return saved.step if saved else 0


# one row a micro-batch and five rounds: calls come between trials, in steps, and in scoring
@pytest.mark.parametrize(
    ("calls", "max_concurrent"), [(1, None), (17, None), (24, None), (31, 2), (47, 2)]
)
def test_a_stopped_pack_continues_with_every_bit(
    calls: int, max_concurrent: int | None, lab: Lab, row_by_row: list[TrialFolder]
) -> None:
    trials = make(lab)
    lab.stop(trials, calls, max_concurrent, micro_batch_tokens=1)
    for trial in trials:
        if trial.read_result()[0] is None:
            assert step_of(trial) == len(losses(trial))  # no step is lost
            assert states(trial) in ([], ["running", "stopped"])
    lab.run(trials, lab.context(micro_batch_tokens=1), max_concurrent=max_concurrent)
    same(trials, row_by_row)


def test_a_pack_that_is_stopped_repeatedly_reaches_the_same_result(
    lab: Lab, row_by_row: list[TrialFolder]
) -> None:
    trials, stops = make(lab), 0
    while any(trial.read_result()[0] is None for trial in trials):
        try:
            lab.run(trials, lab.context(after(40), micro_batch_tokens=1))
        except StoppedError:
            stops += 1
        assert stops < 20
    assert stops > 1
    same(trials, row_by_row)
    assert max(result(trial).attempts for trial in trials) == stops + 1


class Killed(BaseException):
    """Simulates the kill of a process."""


@pytest.mark.parametrize(("every", "rounds"), [(1e-9, 4), (1e9, 2)])
def test_a_killed_pack_continues_from_its_last_checkpoints(
    every: float,
    rounds: int,
    lab: Lab,
    undisturbed: list[TrialFolder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trials, taken = make(lab), []
    train_round = pool.train_round

    def killed(*args: Any) -> Any:
        taken.append(1)
        if len(taken) > rounds:
            raise Killed
        return train_round(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pool, "train_round", killed)
        patch.setattr(pool, "SAVING_SHARE", math.inf)
        lab.run(trials, lab.context(checkpoint_every_s=every))
    going = [t for t, each in zip(trials, DIFFERENT, strict=True) if each["train.max_steps"] > 4]
    assert [step_of(trial) for trial in going] == [rounds if every < 1 else 0]
    lab.run(trials)
    for ours, theirs in zip(trials, undisturbed, strict=True):
        known = dict(enumerate(losses(theirs), 1))
        for event in events(ours, "metric"):  # steps since the checkpoint are told twice
            assert event["values"]["train/loss"] == known[event["step"]]
        files = [t.adapter_dir / "adapter_model.safetensors" for t in (ours, theirs)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("seconds", "steps"), [(100, "1 6"), (1000, "1 2 3 4 5 6")])
def test_slow_checkpoints_are_rare_and_do_not_count_as_training(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, seconds: int, steps: str
) -> None:
    saved: dict[str, list[tuple[int, int]]] = {}
    away = 0
    save, monotonic, perf_counter = checkpoint.save, time.monotonic, time.perf_counter

    def slow(folder: Path, state: checkpoint.Checkpoint) -> None:
        nonlocal away
        away += seconds
        saved.setdefault(folder.parent.name, []).append((state.step, len(state.tensors)))
        save(folder, state)

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + away)
    monkeypatch.setattr(time, "perf_counter", lambda: perf_counter() + away)
    trials = [lab.trial({**SHARED, "train.max_steps": 6, "lora.r": r}) for r in (2, 4)]
    found = lab.run(trials, lab.context(checkpoint_every_s=1e-9))
    # at the first step, since nobody knew; then seldom, but not later than after ten minutes
    first = saved[trials[0].folder.name]
    assert " ".join(str(step) for step, _ in first) == steps
    assert first[-1][1] < first[0][1] / 2  # without moments
    assert all(each.metrics["perf/train_seconds"] < seconds for each in found)


def test_a_pack_whose_training_was_done_is_only_scored(lab: Lab) -> None:
    changes = [{**SHARED, "train.max_steps": 2, "lora.r": r} for r in (2, 4)]
    expected, trials = ([lab.trial(each, place) for each in changes] for place in ("a", "b"))
    lab.run(expected)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(finish, "score", _kill)
        lab.run(trials)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "train_round", _kill)
        found = lab.run(trials)
    same(trials, expected)
    assert all(each.metrics["perf/train_seconds"] > 0 for each in found)


def _kill(*_: Any) -> None:
    raise Killed
