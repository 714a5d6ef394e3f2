"""Losses by step, for as many trials as a chart can show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from tinyllama_lab.metrics import HELDOUT_LOSS
from tinyllama_lab.report.analysis.comparison import label_of
from tinyllama_lab.report.analysis.trial_rows import TrialRow
from tinyllama_lab.study.events import read_events
from tinyllama_lab.study.trial import TrialFolder

MOST_TRIALS = 40  # lines that a chart can show
MOST_POINTS = 200  # of a line; more only make the page larger
SIDES = 16  # a smoothed point averages 1/16 of all steps to each side


@dataclass(frozen=True)
class LearningCurve:
    """The smoothed training loss of one trial: the loss of one step depends mostly on its rows."""

    row: TrialRow
    label: str
    steps: list[int]
    losses: list[float | None]  # smoothed; None where the loss was NaN or infinite
    heldout: dict[int, float]  # losses on held-out rows while it trained, by step


@dataclass(frozen=True)
class Curves:
    """The trials that are drawn, and the labels of those that are not."""

    drawn: list[LearningCurve]
    left_out: list[str]

    @property
    def has_heldout(self) -> bool:
        """Whether a trial took held-out losses while it trained."""
        return any(curve.heldout for curve in self.drawn)

    @property
    def axis(self) -> str:
        """The title of the axis of losses."""
        return f"{'' if self.has_heldout else 'training '}loss (nats per token)"


def read_curves(rows: Sequence[TrialRow]) -> Curves:
    """Read the curves of the trials with the lowest held-out loss; trials without it are last."""
    trials = sorted((row for row in rows if not row.is_base), key=held_out_loss)
    drawn: list[LearningCurve] = []
    left_out: list[str] = []
    for row in trials:
        curve = _read(row) if len(drawn) < MOST_TRIALS else None
        if curve is None:
            left_out.append(label_of(row))
        else:
            drawn.append(curve)
    return Curves(drawn, left_out)


def held_out_loss(row: TrialRow) -> float:
    """Return the loss by which trials are ordered; infinite where there is none."""
    loss = row.metric(HELDOUT_LOSS)
    return math.inf if loss is None else loss


def step_losses(trial: TrialFolder) -> dict[int, float]:
    """Return the training loss of every step that has a finite one, by step."""
    return _finite(_points(trial, "metric", "train/loss"))


def _finite(points: Mapping[int, float | None]) -> dict[int, float]:
    return {step: loss for step, loss in points.items() if loss is not None}


def _points(trial: TrialFolder, kind: str, name: str) -> dict[int, float | None]:
    """Read a loss by step; a step repeated after a crash counts once. Empty without events."""
    points: dict[int, float | None] = {}
    try:
        events = read_events(trial.events_file)
    except OSError:
        return points
    for event in events:
        values = event.get("values")
        if event.get("kind") != kind or not isinstance(values, dict):
            continue
        loss, step = values.get(name), event.get("step")
        if isinstance(loss, int | float) and isinstance(step, int):
            points[step] = float(loss) if math.isfinite(loss) else None
    return points


def _read(row: TrialRow) -> LearningCurve | None:
    points = _points(row.trial, "metric", "train/loss")
    if not points:
        return None
    heldout = _finite(_points(row.trial, "heldout", "heldout/loss"))
    steps = sorted(points)
    losses = [points[step] for step in steps]
    # evenly spaced, with the first and the last step among them
    at = np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int))
    smoothed = [_running_mean(losses, n) for n in at]
    return LearningCurve(row, label_of(row), [steps[n] for n in at], smoothed, heldout)


def _running_mean(losses: Sequence[float | None], number: int) -> float | None:
    """Average up to an eighth of all steps around this one; at the ends only one side exists."""
    if losses[number] is None:
        return None
    reach = len(losses) // SIDES
    near = losses[max(0, number - reach) : number + reach + 1]
    return fmean(loss for loss in near if loss is not None)
