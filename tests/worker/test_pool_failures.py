"""A failing step or evaluation ends the trial that caused it, and no other."""

from __future__ import annotations

from collections.abc import Sequence
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
    run_quickly,
    same_bits,
    states,
)
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.trial import Result, State, TrialFolder

pytestmark = pytest.mark.usefixtures("dora_alone")

SHARED = {**QUIET, "data.max_length": 120, "train.deterministic": True, "train.max_steps": 4}
RANKS = (2, 3, 4, 8)
GUILTY = 3
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


def make(lab: Lab, place: str = "trials", **more: Any) -> list[TrialFolder]:
    shared = {**SHARED, **{key.replace("__", "."): value for key, value in more.items()}}
    return [lab.trial({**shared, "lora.r": r, "lora.dropout": 0.1}, place) for r in RANKS]


def innocent(trials: Sequence[TrialFolder]) -> list[TrialFolder]:
    return [trial for trial, rank in zip(trials, RANKS, strict=True) if rank != GUILTY]


def guilty(trials: Sequence[TrialFolder]) -> Result:
    return result(trials[RANKS.index(GUILTY)])


def is_guilty(items: Sequence[WorkItem[Any]]) -> bool:
    return any(item.adapter is not None and item.adapter.rank == GUILTY for item in items)


@pytest.fixture(scope="module")
def undisturbed(another_lab: Lab) -> list[TrialFolder]:
    """Return four trials that were trained together without a failure."""
    return run_quickly(another_lab, make(another_lab))


def others_are_untouched(trials: list[TrialFolder], expected: list[TrialFolder]) -> None:
    for ours, theirs in zip(innocent(trials), innocent(expected), strict=True):
        assert result(ours).state == State.DONE
        same_bits(ours, theirs)
        assert states(ours) == ["running", "done"]


class Failing(Wrapped):
    """Makes every step with the guilty adapter fail, from a given forward pass on."""

    first = 1
    passes = 0
    error: Exception = ZeroDivisionError("odd")

    def example_losses(self, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
        if torch.is_grad_enabled() and is_guilty(items):
            self.passes += 1
            if self.passes >= self.first:
                raise self.error
        return super().example_losses(items)


@pytest.mark.parametrize("first", [1, 3])
def test_a_failing_step_ends_only_the_trial_that_caused_it(
    first: int, lab: Lab, undisturbed: list[TrialFolder]
) -> None:
    def wrap(inside: Any) -> Any:
        engine = Failing(inside)
        engine.first = first
        return engine

    trials = make(lab)
    lab.run(trials, wrap=wrap)
    found = guilty(trials)
    assert found.state == State.FAILED and found.error is not None
    assert (found.error["class"], found.error["message"]) == ("error", "odd")
    assert "ZeroDivisionError" in found.error["log_tail"]
    others_are_untouched(trials, undisturbed)


def test_a_trial_that_never_fits_ends_out_of_memory_alone(lab: Lab) -> None:
    def wrap(inside: Any) -> Any:
        engine = Failing(inside)
        engine.first, engine.error = 3, OUT_OF_MEMORY[1]
        return engine

    trials = make(lab)
    lab.run(trials, wrap=wrap)
    found = guilty(trials)
    assert found.state == State.OOM and found.error is not None and found.error["class"] == "oom"
    assert [result(trial).state for trial in innocent(trials)] == [State.DONE] * 3


class Poisoned(Wrapped):
    """The losses of the guilty adapter are NaN from its third forward pass on."""

    passes = 0

    def example_losses(self, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
        found = super().example_losses(items)
        if torch.is_grad_enabled() and is_guilty(items):
            self.passes += 1
            return found * torch.nan if self.passes > 2 else found
        return found


def test_a_diverging_trial_changes_no_bit_of_the_others(
    lab: Lab, undisturbed: list[TrialFolder]
) -> None:
    trials = make(lab)
    lab.run(trials, wrap=Poisoned)
    found = guilty(trials)
    assert found.state == State.DIVERGED and found.error is not None
    assert "got loss nan" in found.error["message"] and "at step 3" in found.error["message"]
    others_are_untouched(trials, undisturbed)


class Small(Wrapped):
    """Has memory for a number of tokens per forward pass, or of adapters in training."""

    tokens = 10**9
    most = 10**9
    error: Exception = OUT_OF_MEMORY[0]

    def example_losses(self, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
        if sum(len(item.example.ids) for item in items) > self.tokens:
            raise self.error
        if torch.is_grad_enabled() and len(self.adapters) > self.most:
            raise self.error
        return super().example_losses(items)


def small(**limits: Any) -> Any:
    def wrap(inside: Any) -> Any:
        engine = Small(inside)
        vars(engine).update(limits)
        return engine

    return wrap


def test_out_of_memory_is_tried_again_in_smaller_pieces(
    lab: Lab, undisturbed: list[TrialFolder]
) -> None:
    trials = make(lab)
    found = lab.run(
        trials, lab.context(micro_batch_tokens=1200), small(tokens=400, error=OUT_OF_MEMORY[-1])
    )
    for ours, theirs, each in zip(trials, undisturbed, found, strict=True):
        assert each.state == State.DONE
        assert each.environment["micro_batch_tokens"] == 300
        assert each.environment["adapters_at_once"] == 4
        assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
        metrics = result(theirs).metrics
        for name in ("train/loss", "eval/loss", "base/loss"):
            assert each.metrics[name] == pytest.approx(metrics[name], rel=1e-5)
    notes = [event["text"] for event in events(trials[0], "note")]
    assert "out of memory; micro-batches of 600 tokens now" in notes


@pytest.mark.parametrize("most", [1, 3])
def test_out_of_memory_of_many_adapters_splits_the_pack(
    most: int, lab: Lab, undisturbed: list[TrialFolder]
) -> None:
    trials = make(lab)
    found = lab.run(trials, wrap=small(most=most))
    for ours, theirs, each in zip(trials, undisturbed, found, strict=True):
        assert each.state == State.DONE, each.error
        assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
        assert each.attempts == 1
    notes = [event["text"] for event in events(trials[-1], "note")]
    assert "a step of 4 adapters failed; trying 2 together" in notes


class Narrow(Wrapped):
    """The guilty adapter does not fit into memory beside others."""

    most = 0

    def add(self, config: Any, seed: int, rows: Any = ()) -> Any:
        if config.r == GUILTY and self.adapters:
            raise OUT_OF_MEMORY[0]
        added = super().add(config, seed, rows)
        self.most = max(self.most, len(self.adapters))
        return added


def test_an_adapter_that_does_not_fit_beside_others_waits_for_them(
    lab: Lab, undisturbed: list[TrialFolder]
) -> None:
    engines: list[Narrow] = []

    def wrap(inside: Any) -> Any:
        engines.append(Narrow(inside))
        return engines[-1]

    trials = make(lab)
    found = lab.run(trials, wrap=wrap)
    assert [each.state for each in found] == [State.DONE] * 4
    assert engines[0].most == 3  # who came after it did not wait
    for ours, theirs in zip(trials, undisturbed, strict=True):
        same_bits(ours, theirs)
    assert "out of memory with 1 other adapter; it waits" in str(
        events(trials[RANKS.index(GUILTY)], "note")
    )


def test_out_of_memory_with_one_row_ends_the_trial(lab: Lab) -> None:
    trials = make(lab)
    found = lab.run(trials, wrap=small(tokens=20))
    assert [each.state for each in found] == [State.OOM] * 4
    assert all(each.error and "out of memory" in each.error["message"] for each in found)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_failure_before_the_first_step_leaves_the_base_clean(variant: str, lab: Lab) -> None:
    """The memory of a token is measured with the first adapter, which may fail as well."""
    bad = lab.trial({**QUIET, "lora.variant": variant})
    (found,) = lab.run([bad], wrap=small(tokens=20))
    assert found.state == State.OOM
    assert not hasattr(lab.base.model, "peft_config")
    (good,) = lab.run([lab.trial({**QUIET, "lora.variant": variant, "seed": 2})])
    assert good.state == State.DONE


class Refusing:
    """An event file that refuses every metric after the first."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def append(self, kind: str, **fields: Any) -> None:
        if kind == "metric" and fields["step"] > 1:
            raise PermissionError("events.jsonl is not ours any more")
        self._log.append(kind, **fields)


def test_a_trial_that_cannot_write_its_events_changes_no_other(
    lab: Lab, undisturbed: list[TrialFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = AdapterTrainer.__init__

    def begun(self: Any, trial: Any, science: Any, *rest: Any) -> None:
        begin(self, trial, science, *rest)
        if science.lora.r == GUILTY:
            self.log = Refusing(self.log)

    trials = make(lab)
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "__init__", begun)
        lab.run(trials)
    found = guilty(trials)
    assert found.state == State.FAILED and found.error is not None
    assert "not ours any more" in found.error["message"]
    others_are_untouched(trials, undisturbed)


class Unscored(Wrapped):
    """The guilty adapter can be trained, but not scored."""

    def example_losses(self, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
        if not torch.is_grad_enabled() and is_guilty(items):
            raise ZeroDivisionError("no score")
        return super().example_losses(items)


def test_a_failing_evaluation_ends_only_its_own_trial(
    lab: Lab, undisturbed: list[TrialFolder]
) -> None:
    trials = make(lab)
    lab.run(trials, wrap=Unscored)
    found = guilty(trials)
    assert found.state == State.FAILED and found.error is not None
    assert found.error["message"] == "no score"
    others_are_untouched(trials, undisturbed)


def test_a_folder_that_cannot_be_written_fails_its_own_trial(
    lab: Lab, undisturbed: list[TrialFolder]
) -> None:
    trials = make(lab)
    broken = trials[RANKS.index(GUILTY)]
    broken.adapter_dir.write_text("a file where the adapter's folder should be")
    (broken.folder / ".adapter.tmp").write_text("another")
    lab.run(trials)
    assert guilty(trials).state == State.FAILED
    others_are_untouched(trials, undisturbed)
