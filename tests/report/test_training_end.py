"""Whether training was long enough, on curves whose slope is known."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.studies import first_evaluation, simulated_study
from tinyllama_lab.config.axes import flatten
from tinyllama_lab.report.analysis.comparison import make_comparison
from tinyllama_lab.report.analysis.example_losses import read_losses
from tinyllama_lab.report.analysis.ranking import rank_cells
from tinyllama_lab.report.analysis.training_end import training_end
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.caveats import caveats
from tinyllama_lab.study.events import EventLog
from tinyllama_lab.study.study import StudyFolder
from tinyllama_lab.study.trial import TrialFolder

STEPS = 200
Shape = Callable[[np.ndarray], np.ndarray]


def study_of(
    root: Path, shape: Shape, noise: float = 0.02, seeds: Sequence[int] = (0,), **keys: Any
) -> StudyFolder:
    """Return a study of two ranks whose training loss is `shape` of the step, plus noise."""
    settings = {"train.epochs": [1.0], **{f"train.{k}": [v] for k, v in keys.items()}}
    study = simulated_study(root, {"lora.r": [2, 8], **settings}, seeds=seeds, steps=0)
    generator = np.random.default_rng(5)
    at = np.arange(1, STEPS + 1)
    for trial in study.trials():
        losses = shape(at) + generator.normal(0, noise, STEPS)
        log = EventLog(trial.events_file)
        for step, loss in zip(at.tolist(), losses.tolist(), strict=True):
            log.append("metric", step=step, values={"train/loss": loss}, steps=STEPS)
    return study


def said(study: StudyFolder) -> list[str]:
    return list(training_end(rank_cells(make_comparison(read_study(study).trials))))


def test_a_loss_that_still_falls_is_reported_with_its_slope(tmp_path: Path) -> None:
    (text,) = said(study_of(tmp_path, lambda at: 3 - 0.004 * at))
    slope = float(text.split("falling by ")[1].split()[0])
    assert slope == pytest.approx(0.4, abs=0.08)  # per 100 steps; its error is about 0.03
    assert "longer training may help" in text


@pytest.mark.parametrize(
    "shape",
    [
        lambda at: 2 + np.exp(-at / 10),  # flat at the end
        lambda at: 2 + 0.002 * at,  # rises
        lambda at: 2 - 0.0002 * at,  # falls by less than matters
    ],
)
def test_a_loss_that_does_not_fall_is_not_reported(tmp_path: Path, shape: Shape) -> None:
    assert said(study_of(tmp_path, shape)) == []


def test_noise_is_seldom_taken_for_a_slope(tmp_path: Path) -> None:
    assert said(study_of(tmp_path, lambda at: np.full(STEPS, 2.0), noise=0.5)) == []


@pytest.mark.parametrize("keys", [{"epochs": 3.0}, {"max_steps": 200, "batch_size": 8}])
def test_a_loss_of_rows_seen_twice_is_not_reported(tmp_path: Path, keys: dict[str, float]) -> None:
    study = study_of(tmp_path, lambda at: 3 - 0.004 * at, **keys)
    config = flatten(study.trials()[0].read_config())
    assert all(config[f"train.{name}"] == value for name, value in keys.items())
    assert said(study) == []  # of 500 rows 1600 were seen, or each three times


def with_rung(trial: TrialFolder, change: float, kind: str = "rung") -> None:
    """Add losses on 32 rows after step 60 that are `change` below those at the end."""
    losses = read_losses(first_evaluation(trial).per_example_file)
    assert losses is not None
    noise = np.random.default_rng(1).normal(0, 0.05, 32)
    examples = (losses.nats / losses.tokens)[:32] - change + noise
    EventLog(trial.events_file).append(
        kind, rung=0, step=60, values={"rung/eval_loss": 1.0}, examples=examples.tolist()
    )


@pytest.mark.parametrize(
    ("seeds", "kind"), [((0,), "rung"), ((0, 1, 2), "rung"), ((0,), "heldout")]
)
@pytest.mark.parametrize(("change", "is_told"), [(0.2, True), (0.0, False), (-0.2, False)])
def test_a_step_that_was_better_than_the_end_is_reported(
    tmp_path: Path, change: float, is_told: bool, seeds: tuple[int, ...], kind: str
) -> None:
    study = study_of(tmp_path, lambda at: np.full(STEPS, 2.0), seeds=seeds)
    for trial in study.trials():
        with_rung(trial, change, kind)
    texts = said(study)
    assert len(texts) == is_told
    if is_told:
        assert "after step 60 the held-out loss was lower by 0.2" in texts[0] or "0.1" in texts[0]
        assert "on 32 rows: shorter training, or train.keep=best, may do better" in texts[0]


def test_the_last_step_and_a_step_that_was_kept_are_not_compared_with_themselves(
    tmp_path: Path,
) -> None:
    """Their losses are rounded, which by chance makes all of them a little lower."""
    for keep, step in (("last", STEPS), ("best", 60)):
        study = study_of(tmp_path / keep, lambda at: np.full(STEPS, 2.0), keep=keep)
        for trial in study.trials():
            losses = read_losses(first_evaluation(trial).per_example_file)
            assert losses is not None
            examples = (losses.nats / losses.tokens)[:32] - 1e-6
            EventLog(trial.events_file).append("heldout", step=step, examples=examples.tolist())
        assert said(study) == []


def with_metrics(study: StudyFolder, **metrics: float) -> None:
    for number, trial in enumerate(study.trials()):
        result, _ = trial.read_result()
        assert result is not None
        found = {f"heldout/{name}": value + 10 * number for name, value in metrics.items()}
        trial.commit(replace(result, metrics={**result.metrics, **found}))


def test_the_steps_that_were_kept_are_told_for_each_seed(tmp_path: Path) -> None:
    study = study_of(tmp_path, lambda at: np.full(STEPS, 2.0), seeds=(0, 1), keep="best")
    assert said(study) == []  # of trials in which no loss was a number
    with_metrics(study, best_step=40)
    (text,) = said(study)
    steps = {trial.read_config()["seed"]: 40 + 10 * n for n, trial in enumerate(study.trials())}
    said_of = ", ".join(f"{steps[seed]} of 200 (seed {seed})" for seed in (0, 1))
    assert re.fullmatch(
        rf"train.keep=best kept the adapter.* after step {re.escape(said_of)}", text
    )


def test_the_losses_of_chosen_steps_are_called_too_low(tmp_path: Path) -> None:
    study = study_of(tmp_path, lambda at: np.full(STEPS, 2.0))
    comparison = make_comparison(read_study(study).trials)
    cells = rank_cells(comparison)
    assert not [text for text in caveats(comparison, [], cells) if "train.keep" in text]
    # 10 more for the second trial
    for first, amount in ((-3.75, "about 1.2500"), (-5.0, "less than 0.0001")):
        with_metrics(study, optimism=first)
        comparison = make_comparison(read_study(study).trials)
        (text,) = [text for text in caveats(comparison, [], cells) if "train.keep" in text]
        assert f"look better by {amount} nats a token" in text and "; 2 trials)" in text
