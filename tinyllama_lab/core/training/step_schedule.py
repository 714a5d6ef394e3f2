"""The rows and the learning rate of every optimizer step.

These are pure functions of the settings, the number of rows and the seed, so they are
separate from the training state. A checkpoint holds neither rows nor rates, only the number of
its step: a resumed trial computes the same ones again, whatever else is in its pack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, islice

import torch

from tinyllama_lab.config.schema import TrainConfig


def steps_of(rows: int, train: TrainConfig) -> int:
    """Return the optimizer steps of a trial with `rows` training rows."""
    return math.ceil(rows_seen(rows, train) / train.batch_size)


def batches(rows: int, train: TrainConfig, seed: int) -> Iterator[list[int]]:
    """Yield the row numbers of every step; each epoch is a new shuffle that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    rows_left = rows_seen(rows, train)
    batch: list[int] = []
    while rows_left:
        # a batch may span two epochs, so that only the last step of all can be smaller
        for row in torch.randperm(rows, generator=generator).tolist()[:rows_left]:
            batch.append(row)
            rows_left -= 1
            if len(batch) == train.batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def first_epoch(rows: int, train: TrainConfig, seed: int) -> list[int]:
    """Return the row numbers of the first epoch in the order of the steps, if they get so far."""
    return list(islice(chain.from_iterable(batches(rows, train, seed)), rows))


def rows_seen(rows: int, train: TrainConfig) -> int:
    """Return the rows of all steps; a row counts as often as it is seen."""
    if train.max_steps is not None:
        return train.max_steps * train.batch_size
    return max(1, round(rows * train.epochs))


def lr_factor(step: int, steps: int, train: TrainConfig) -> float:
    """Return the factor of `train.lr` at a step, counted from 0.

    A linear warm-up is followed by a constant rate, or by cosine or linear decay to 0. Warm-up
    begins above zero, so that no step of a short trial is wasted.
    """
    warmup = round(steps * train.warmup_ratio)
    if step < warmup:
        # the first step after warm-up is the first at the full rate
        return (step + 1) / (warmup + 1)
    if train.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
