"""The learning rate of every step."""

from __future__ import annotations

import math

from tinyllama_lab.config.schema import TrainConfig


def lr_factor(step: int, steps: int, train: TrainConfig) -> float:
    """Share of `train.lr` at step 0, 1, …: linear warm-up, then cosine or linear decay to 0.

    Warm-up begins above zero, so that no step of a short trial is wasted.
    """
    warmup = round(steps * train.warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if train.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if train.schedule == "cosine" else 1 - done
