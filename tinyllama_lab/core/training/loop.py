"""The one training loop: in every round, each adapter of the pack takes one optimizer step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tinyllama_lab.core.engines.base import Engine
from tinyllama_lab.core.training.adapter_trainer import AdapterTrainer
from tinyllama_lab.errors import StoppedError


@dataclass
class Round:
    """What happened in one round."""

    failed: dict[int, Exception]  # by the trainer's id: it diverged, or its update raised
    tokens: int  # of all trainers' batches
    micro_batches: list[int]  # tokens of each
    seconds: float  # until every trainer had its update


class StepError(Exception):
    """The shared part of a round failed; no trainer has taken the step."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def train_round(
    engine: Engine[Any],
    trainers: Sequence[AdapterTrainer],
    max_tokens: int,
    before_batch: Callable[[int], object],
) -> Round:
    """Take one optimizer step with every trainer; the engine decides how to mix their batches.

    The gradient of a step is that of the mean loss over all labels of the trainer's own batch,
    however many micro-batches that takes. Trainers share no parameters, so their gradients do
    not mix. The time of the round is divided among the trainers in proportion to their tokens.
    `before_batch` is called with the tokens of every micro-batch.

    Raises:
        StoppedError: raised by `before_batch`; no trainer has taken the step.
        StepError: forward or backward failed; no trainer has taken the step.
    """
    begin = time.perf_counter()
    # read while the device is idle; a lower scale after the updates tells of a skipped step
    scales = [trainer.scaler.get_scale() for trainer in trainers]
    tokens = sum(len(example.ids) for trainer in trainers for example in trainer.batch)
    try:
        losses, micro_batches = _accumulate(engine, trainers, scales, max_tokens, before_batch)
    except Exception as error:
        # earlier micro-batches have added to the gradients already
        for trainer in trainers:
            trainer.adapter.zero_grad()
        if isinstance(error, StoppedError):
            raise
        raise StepError(error) from error
    failed: dict[int, Exception] = {}
    norms = [_update(trainer, failed) for trainer in trainers]
    # one read for all losses and norms, because every read makes the host wait
    values = torch.stack([losses, torch.stack(norms)]).tolist()
    seconds = time.perf_counter() - begin
    _count(trainers, (values[0], values[1], scales), seconds, failed)
    return Round(failed, tokens, micro_batches, seconds)


def _update(trainer: AdapterTrainer, failed: dict[int, Exception]) -> torch.Tensor:
    """Update a trainer and return its gradient norm; an error from here on fails it alone."""
    try:
        return trainer.update().double()
    except Exception as error:
        failed[id(trainer)] = error
        return torch.zeros((), dtype=torch.float64, device=trainer.adapter.parameters[0].device)


def _accumulate(
    engine: Engine[Any],
    trainers: Sequence[AdapterTrainer],
    scales: Sequence[float],
    max_tokens: int,
    before_batch: Callable[[int], object],
) -> tuple[torch.Tensor, list[int]]:
    """Accumulate every trainer's gradient, times its fp16 scale.

    Returns:
        The mean losses `[trainers]` in float64, and the tokens of every micro-batch.
    """
    index_of = {id(trainer.adapter): n for n, trainer in enumerate(trainers)}
    # a mean over all labels of a trainer's batch, not over the labels of one micro-batch
    shares = [1 / sum(example.labels for example in trainer.batch) for trainer in trainers]
    items = [item for trainer in trainers for item in trainer.items()]
    device = trainers[0].adapter.parameters[0].device
    # in float64, so that sums over many micro-batches add no visible rounding
    means = torch.zeros(len(trainers), dtype=torch.float64, device=device)
    sizes = []
    for micro_batch in engine.micro_batches(items, max_tokens):
        sizes.append(sum(len(item.example.ids) for item in micro_batch))
        before_batch(sizes[-1])
        owners = [index_of[id(item.adapter)] for item in micro_batch]
        # one tensor for both, because every copy to the device has a fixed cost
        weights = torch.tensor(
            [[shares[owner] for owner in owners], [scales[owner] for owner in owners]],
            dtype=torch.float64,
        ).to(device, non_blocking=True)
        losses = engine.example_losses(micro_batch) * weights[0]
        # every trainer has its own fp16 scale, which the reported means leave out
        # One backward for all trainers: no two share a parameter, so each gets its own gradient.
        (losses * weights[1]).sum().backward()
        means.index_add_(0, torch.tensor(owners).to(device, non_blocking=True), losses.detach())
    return means, sizes


def _count(
    trainers: Sequence[AdapterTrainer],
    values: tuple[list[float], list[float], list[float]],
    seconds: float,
    failed: dict[int, Exception],
) -> None:
    """Record the step of every trainer; `values` are losses, norms and earlier fp16 scales."""
    # tokens divide the time, because the part of one adapter in a shared pass cannot be measured
    tokens = [sum(len(example.ids) for example in trainer.batch) for trainer in trainers]
    for trainer, share, loss, norm, scale in zip(trainers, tokens, *values, strict=True):
        if id(trainer) in failed:
            continue
        # GradScaler lowers its scale only when it skips a step
        skipped = trainer.scaler.get_scale() < scale
        try:
            trainer.count(loss, norm, seconds * share / sum(tokens), skipped)
        except Exception as error:
            failed[id(trainer)] = error
