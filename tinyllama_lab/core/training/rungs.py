"""Rungs: held-out loss while trials train, so that the driver can end those that fall behind."""

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
from tinyllama_lab.study.trial import Trial

PATIENCE_S = 3.0  # the driver looks several times a second, and judges at the second look
LOOK_EVERY_S = 0.05


@dataclass
class Rungs:
    """Those of one trial; a rung is reported once, whatever happens to the worker."""

    trial: Trial
    steps: list[int]  # the optimizer step that each rung comes after
    reported: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, trial: Trial, stream: StreamSettings | None, steps: int) -> Rungs:
        """The rungs of a trial of so many steps, without those that earlier attempts reported."""
        at = [max(1, round(share * steps)) for share in stream.rungs] if stream else []
        events = read_events(trial.events_file) if stream else []
        return cls(trial, at, {e["rung"] for e in events if e["kind"] == "rung"})

    def due(self, trainer: AdapterTrainer) -> int | None:
        """The highest rung that was passed and not reported; None after the last step."""
        passed = [n for n, at in enumerate(self.steps) if at <= trainer.progress.step]
        if trainer.is_done or not passed or passed[-1] in self.reported:
            return None
        return passed[-1]

    def report(self, trainer: AdapterTrainer, losses: Sequence[ExampleLoss]) -> None:
        """Tell the driver; a loss that is no number is told as well, and leaves by it."""
        rung = self.due(trainer)
        assert rung is not None
        self.reported.add(rung)
        EventLog(self.trial.events_file).append(
            "rung",
            rung=rung,
            step=trainer.progress.step,
            values={"rung/eval_loss": evaluate.mean_loss(losses)},
            examples=[round(each.loss / each.tokens, 6) for each in losses],
        )


def score_due(
    context: WorkerContext,
    engine: Engine[Any],
    running: Sequence[tuple[Rungs, AdapterTrainer, Sequence[Example]]],
) -> None:
    """Score all who are at a rung on the first of their held-out rows, in the same batches.

    Raises:
        StoppedError: the worker was told to stop.
    """
    assert context.stream is not None
    count = context.stream.rung_rows
    work = [(trainer.adapter, rows[:count]) for _, trainer, rows in running]
    found = evaluate.heldout_losses(context, engine, work, running[0][0].trial)
    for (rungs, trainer, _), losses in zip(running, found, strict=True):
        rungs.report(trainer, losses)


def await_verdicts(trials: Sequence[Trial], step_s: float) -> None:
    """Give the driver a moment to judge who is at a rung: what losers train meanwhile is lost.

    No longer than a step of theirs would take; the driver ends all losers of a rung at once.
    """
    deadline = time.monotonic() + (min(PATIENCE_S, step_s) if trials else 0.0)
    while time.monotonic() < deadline:
        if any(trial.prune_file.exists() for trial in trials):
            time.sleep(LOOK_EVERY_S)  # for the others of the same verdict
            return
        time.sleep(LOOK_EVERY_S)
