"""The best step of a trial: the one that a shorter trial would have ended with, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
from tests.worker.test_step_schedule import settings
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.evaluation.losses import ExampleLoss
from tinyllama_lab.core.training.best_step import BestStep, mib_with_best
from tinyllama_lab.study.trial import State, TrialFolder

pytestmark = pytest.mark.usefixtures("dora_alone")

# a single row, learned by heart: the held-out loss falls and rises again
LEARNED = {
    **QUIET,
    **{"train.deterministic": True, "train.schedule": "constant", "train.warmup_ratio": 0.0},
    **{"data.n": 1, "data.eval_n": 12, "train.batch_size": 1, "train.lr": 0.1},
    **{
        "lora.targets": "all_linear",
        "train.max_steps": 12,
        "train.eval_every": 2,
        "lora.dropout": 0.1,
    },
}
BEST = {**LEARNED, "train.keep": "best"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


def curve(trial: TrialFolder) -> dict[int, float]:
    """The held-out loss by step; of a step that was repeated, the last."""
    return {e["step"]: e["values"]["heldout/loss"] for e in events(trial, "heldout")}


def best_of(trial: TrialFolder) -> int:
    found = curve(trial)
    return min(found, key=lambda step: found[step])


@pytest.mark.parametrize(("variant", "lr"), [("lora", 0.1), ("dora", 0.03)])
def test_the_kept_adapter_is_that_of_a_trial_which_ends_at_the_best_step(
    lab: Lab, variant: str, lr: float
) -> None:
    steps = []
    for seed in range(3):
        shared = {"lora.variant": variant, "train.lr": lr, "seed": seed}
        kept, whole = (lab.trial({**c, **shared}) for c in (BEST, LEARNED))
        lab.run([kept])
        lab.run([whole])
        steps.append(step := best_of(kept))
        assert list(curve(kept)) == [2, 4, 6, 8, 10, 12]
        short = lab.trial({**LEARNED, **shared, "train.max_steps": step, "train.eval_every": None})
        lab.run([short])
        assert weights(kept) == weights(short)
        ours, of_short, of_whole = (result(each).metrics for each in (kept, short, whole))
        assert ours["eval/loss"] == of_short["eval/loss"]
        assert ours["eval/loss"] == pytest.approx(curve(kept)[step], rel=1e-6)
        assert ours["heldout/best_step"] == of_whole["heldout/best_step"] == step
        # settings that only watch change nothing
        assert losses(kept) == losses(whole) and curve(kept) == curve(whole)
        assert of_whole["eval/loss"] == pytest.approx(curve(kept)[12], rel=1e-6)
        assert "heldout/optimism" not in of_whole
    assert min(steps) < 12


def test_trials_that_keep_other_steps_change_nothing_of_each_other(
    lab: Lab, tmp_path: Path
) -> None:
    changes = [
        {**BEST, "lora.r": 8},
        {**BEST, "seed": 1, "train.eval_every": 3},
        {**LEARNED, "train.eval_every": None},
        {**LEARNED, "train.eval_every": None, "train.patience": 1, "seed": 2},
    ]
    together = [lab.trial(each) for each in changes]
    lab.run(together)
    for each, trial in zip(changes, together, strict=True):
        alone = replace(lab, folder=tmp_path / "alone").trial(each)
        lab.run([alone])
        same_bits(trial, alone)
        assert curve(trial) == curve(alone)


def ended(losses: dict[int, float], patience: int) -> tuple[int, int]:
    """The step with the lowest loss, and the one after which patience is over."""
    lowest, best, last, since = math.inf, 0, 0, 0
    for last, loss in losses.items():
        since = 0 if loss < lowest else since + 1
        lowest, best = (loss, last) if since == 0 else (lowest, best)
        if since == patience:
            break
    return best, last


@pytest.mark.parametrize("keep", ["last", "best"])
def test_patience_ends_a_training(lab: Lab, keep: str) -> None:
    ends = []
    for seed in range(3):
        # so many steps that one of them ends early on any machine
        shared = {**LEARNED, "seed": seed, "train.max_steps": 24}
        ending = lab.trial({**shared, "train.patience": 2, "train.keep": keep})
        whole = lab.trial(shared)
        lab.run([ending, whole])
        best, last = ended(curve(whole), 2)
        ends.append(last)
        assert len(losses(ending)) == last
        assert curve(ending) == {s: loss for s, loss in curve(whole).items() if s <= last}
        short = lab.trial({**shared, "train.max_steps": best if keep == "best" else last})
        lab.run([short])
        assert weights(ending) == weights(short)
        assert result(ending).state is State.DONE
        assert result(ending).data["train_rows_seen"] == 1
        text = (
            f"training ended after step {last} of 24 (train.patience): the held-out loss was "
            f"lower after step {best}"
        )
        notes = [event["text"] for event in events(ending, "note")]
        assert (text in notes) == (last < 24)
    assert min(ends) < 24


def test_without_a_number_of_steps_there_are_up_to_ten_losses(lab: Lab) -> None:
    changes = {**BEST, "train.eval_every": None, "train.max_steps": 25}
    trial = lab.trial(changes)
    lab.run([trial])
    assert list(curve(trial)) == [3, 6, 9, 12, 15, 18, 21, 24, 25]


@pytest.mark.parametrize("patience", [None, 1])
def test_a_stop_at_any_moment_changes_no_bit(
    lab: Lab, tmp_path: Path, patience: int | None
) -> None:
    changes = {**BEST, "train.max_steps": 4, "train.patience": patience, "data.eval_n": 4}
    expected = lab.trial(changes)
    lab.run([expected])
    place, calls, stops = replace(lab, folder=tmp_path / "stopped"), 1, 0
    while True:
        trial = place.trial({**changes, "eval.sample_seed": calls})  # a folder for each
        try:
            place.stop([trial], calls)
        except pytest.fail.Exception:  # it had ended before
            break
        stops += 1
        place.run([trial])
        assert weights(trial) == weights(expected)
        ours, theirs = result(trial).metrics, result(expected).metrics
        for name in ("eval/loss", "heldout/best_step", "heldout/optimism", "train/loss"):
            assert ours[name] == theirs[name]
        assert curve(trial) == curve(expected)
        calls += 1
    assert stops > 5


def test_steps_are_never_chosen_on_rows_for_confirmation(lab: Lab) -> None:
    plain = lab.trial(BEST)
    confirming = lab.trial({**BEST, "eval.rows": "confirmation"})
    lab.run([plain])
    lab.run([confirming])
    assert curve(plain) == curve(confirming) and weights(plain) == weights(confirming)
    assert result(plain).metrics["eval/loss"] != result(confirming).metrics["eval/loss"]
    assert "heldout/optimism" in result(plain).metrics
    assert "heldout/optimism" not in result(confirming).metrics


class Broken(Wrapped):
    """Fails on the held-out rows of one adapter."""

    def example_losses(self, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
        if not torch.is_grad_enabled() and self.added[0] in [item.adapter for item in items]:
            raise ValueError("broken")
        return super().example_losses(items)


def test_a_held_out_loss_that_fails_ends_its_trial_alone(lab: Lab) -> None:
    trials = [lab.trial({**BEST, "seed": seed}) for seed in range(3)]
    lab.run(trials, wrap=Broken)
    assert [result(trial).state for trial in trials] == [State.FAILED, State.DONE, State.DONE]
    assert states(trials[0])[-1] == "failed" and curve(trials[0]) == {}


def test_the_peak_of_held_out_losses_is_predicted(lab: Lab) -> None:
    """Many rows are scored together, where a step has a single short one."""
    few, many = ({**LEARNED, "data.eval_n": n, "train.max_steps": 2} for n in (2, 60))
    found = []
    for changes in (few, many):
        trial = lab.trial({**changes, "train.eval_every": 1})
        lab.run([trial])
        found.append(result(trial).metrics["memory/predicted_mib"])
    assert found[1] > found[0] + 1


# ---- the losses alone ------------------------------------------------------------------------


class Value:
    """An adapter of one number."""

    def __init__(self) -> None:
        self.parameters = [torch.zeros(1)]

    def updated(self) -> None:
        """Nothing is derived from it."""


def noted(folder: Path, rows: Sequence[Sequence[float]], **changes: Any) -> tuple[BestStep, float]:
    """After checks with these losses of rows; the value that is kept."""
    adapter: Any = Value()
    best = BestStep(TrialFolder(folder), settings(**{"keep": "best", **changes}), len(rows))
    for step, of_step in enumerate(rows, start=1):
        adapter.parameters[0].fill_(step)
        found = [ExampleLoss(n, loss, 2, n // 2, n) for n, loss in enumerate(of_step)]
        best.note(step, found, adapter)
    best.restore_best(adapter)
    return best, float(adapter.parameters[0])


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    nan = math.nan
    for values, kept in [
        ([nan, 3, 2, nan], 3),
        ([nan, nan], 2),
        ([2, nan, 2], 1),
        ([math.inf, 4], 2),
    ]:
        best, value = noted(tmp_path, [[v] * 4 for v in values])
        assert value == kept
        found = best.metrics(is_scored=False)
        assert found == ({} if set(map(str, values)) == {"nan"} else {"heldout/best_step": kept})


def test_equal_losses_leave_the_earlier_step_and_count_against_patience(tmp_path: Path) -> None:
    best, value = noted(tmp_path, [[3.0], [2.0], [2.0], [2.5], [9.0]], patience=2)
    assert value == 2.0 and best.metrics(False) == {"heldout/best_step": 2.0}


def test_the_gain_by_choosing_is_what_cross_validation_finds(tmp_path: Path) -> None:
    """Computed once more in plain Python, with a fold for each of the five pairs of rows."""
    generator = np.random.default_rng(0)
    rows = generator.normal(3.0, 1.0, (6, 10)).tolist()
    best, kept = noted(tmp_path, rows)
    unseen = 0.0
    for pair in range(5):
        out = (2 * pair, 2 * pair + 1)
        chosen = min(rows, key=lambda row: sum(v for n, v in enumerate(row) if n not in out))
        unseen += sum(chosen[n] for n in out)
    expected = (unseen - min(map(sum, rows))) / 20  # two label tokens a row
    assert best.metrics(True)["heldout/optimism"] == pytest.approx(expected)
    assert kept == 1 + min(range(6), key=lambda n: sum(rows[n]))


def test_the_gain_is_that_of_a_simulation(tmp_path: Path) -> None:
    """All steps are equally good, so fresh rows would show what the chosen one seems to gain."""
    generator, found, true = np.random.default_rng(1), [], []
    for _ in range(200):
        rows = generator.normal(3.0, 1.0, (5, 40))
        best, _ = noted(tmp_path, rows.tolist())
        found.append(best.metrics(True)["heldout/optimism"])
        true.append((3.0 * 40 - rows.sum(axis=1).min()) / 80)
    assert np.mean(found) == pytest.approx(np.mean(true), rel=0.15)


def test_the_copy_is_counted_where_it_lies() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("meta")
    assert mib_with_best(16.0, settings(keep="best"), cpu) == 20.0
    assert mib_with_best(16.0, settings(keep="best"), gpu) == 16.0
    assert mib_with_best(16.0, settings(), cpu) == 16.0
