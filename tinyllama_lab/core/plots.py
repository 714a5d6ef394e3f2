"""The loss curve of a trial as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

from tinyllama_lab.trial import Trial

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - the backend is chosen before


def plot_loss_curve(trial: Trial, losses: Sequence[float], heldout_loss: float) -> None:
    """Training loss of every step, with the held-out loss at the end as a line."""
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, marker="o" if len(losses) < 40 else None, markersize=3, label="train")
    axes.axhline(heldout_loss, color="C1", linestyle="--", label=f"held out: {heldout_loss:.3f}")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per label token)", title=trial.name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(trial.loss_curve_file, dpi=120)
    pyplot.close(figure)
