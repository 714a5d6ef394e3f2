"""Which examples make up which optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from tinyllama_lab.config.schema import TrainConfig


def steps_of(rows: int, train: TrainConfig) -> int:
    """Optimizer steps of a trial with `rows` training rows."""
    return math.ceil(rows_seen(rows, train) / train.batch_size)


def batches(rows: int, train: TrainConfig, seed: int) -> Iterator[list[int]]:
    """Row numbers of every step: each epoch is a fresh shuffle, decided by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    left = rows_seen(rows, train)
    batch: list[int] = []
    while left:
        for row in torch.randperm(rows, generator=generator).tolist()[:left]:
            batch.append(row)
            left -= 1
            if len(batch) == train.batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def rows_seen(rows: int, train: TrainConfig) -> int:
    """Rows of all steps together; a row counts as often as it is seen."""
    if train.max_steps is not None:
        return train.max_steps * train.batch_size
    return max(1, round(rows * train.epochs))
