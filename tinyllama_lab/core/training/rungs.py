"""Rungs: intermediate held-out losses by which the driver prunes trials that fall behind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import Engine
from tinyllama_lab.core.evaluation import losses as evaluate
from tinyllama_lab.core.evaluation.losses import ExampleLoss
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.study.events import EventLog, read_events
from tinyllama_lab.study.pack import StreamSettings
from tinyllama_lab.study.trial import TrialFolder

PATIENCE_S = 3.0  # the driver looks several times a second, and judges at the second look
LOOK_EVERY_S = 0.05  # files of the driver give no signal


@dataclass
class Rungs:
    """The rungs of one trial. Each is reported once, even if the worker restarts in between."""

    trial: TrialFolder
    steps: list[int]  # the optimizer step that each rung comes after
    reported: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, trial: TrialFolder, stream: StreamSettings | None, steps: int) -> Rungs:
        """Return the rungs of a trial with `steps` steps; those reported earlier stay reported."""
        rung_steps = [max(1, round(share * steps)) for share in stream.rungs] if stream else []
        events = read_events(trial.events_file) if stream else []
        return cls(trial, rung_steps, {e["rung"] for e in events if e["kind"] == "rung"})

    def due(self, trainer: AdapterTrainer) -> int | None:
        """Return the highest rung passed if it is not reported yet; None after the last step."""
        # one step of a short trial may pass several rungs: only the highest is scored
        passed = [n for n, at in enumerate(self.steps) if at <= trainer.progress.step]
        if trainer.is_done or not passed or passed[-1] in self.reported:
            return None
        return passed[-1]

    def report(self, trainer: AdapterTrainer, losses: Sequence[ExampleLoss]) -> None:
        """Report the held-out loss of this rung to the driver.

        A NaN or infinite loss is reported too; the driver then prunes the trial.
        """
        rung = self.due(trainer)
        assert rung is not None
        EventLog(self.trial.events_file).append(
            "rung",
            rung=rung,
            step=trainer.progress.step,
            values={"rung/eval_loss": evaluate.mean_loss(losses)},
            examples=[round(each.loss / each.tokens, 6) for each in losses],
        )
        self.reported.add(rung)  # only now: a rung that could not be written is still due


def score_due(
    context: WorkerContext,
    engine: Engine[Any],
    entries: Sequence[tuple[Rungs, AdapterTrainer, Sequence[Example]]],
) -> None:
    """Score the adapters that are at a rung, in shared batches.

    Only the first `stream.rung_rows` held-out rows of each are scored.

    Raises:
        StoppedError: the worker was asked to stop.
    """
    assert context.stream is not None
    rung_rows = context.stream.rung_rows
    work = [(trainer.adapter, rows[:rung_rows]) for _, trainer, rows in entries]
    all_losses = evaluate.heldout_losses(context, engine, work, entries[0][0].trial)
    for (rungs, trainer, _), losses in zip(entries, all_losses, strict=True):
        rungs.report(trainer, losses)


def await_pruning(trials: Sequence[TrialFolder], step_s: float) -> None:
    """Wait for the driver to prune trials at a rung, for at most `step_s` or `PATIENCE_S`.

    Steps that a trial trains after it has lost are wasted, so a short wait is cheaper than
    another step. The driver prunes all losers of a rung at once.
    """
    deadline = time.monotonic() + (min(PATIENCE_S, step_s) if trials else 0.0)
    while time.monotonic() < deadline:
        if any(trial.prune_file.exists() for trial in trials):
            time.sleep(LOOK_EVERY_S)  # the prune files of one rung appear one after another
            return
        time.sleep(LOOK_EVERY_S)
