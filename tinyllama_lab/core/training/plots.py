"""The loss curve of a trial as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tinyllama_lab.study.trial import TrialFolder


def plot_loss_curve(trial: TrialFolder, losses: Sequence[float], heldout_loss: float) -> None:
    """Plot the training loss of every step, and the final held-out loss as a line."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, marker="o" if len(losses) < 40 else None, markersize=3, label="train")
    axes.axhline(heldout_loss, color="C1", linestyle="--", label=f"held out: {heldout_loss:.3f}")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per label token)", title=trial.name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(trial.loss_curve_file, dpi=120)
