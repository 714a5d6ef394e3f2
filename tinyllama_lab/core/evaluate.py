"""Scores of the base or of an adapter on the held-out examples: one path for both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from tinyllama_lab.core.data import Example
from tinyllama_lab.core.loss import collate, label_losses, micro_batches
from tinyllama_lab.core.model import Base
from tinyllama_lab.errors import DivergedError, StoppedError
from tinyllama_lab.trial import Trial, write_atomic


@dataclass(frozen=True)
class ExampleLoss:
    """Summed cross entropy (nats) of one held-out example's labels, and their number."""

    example: int
    loss: float
    tokens: int


@torch.no_grad()
def example_losses(
    base: Base, examples: Sequence[Example], max_tokens: int, stopped: Callable[[], bool]
) -> list[ExampleLoss]:
    """Score every example with whatever adapter is attached; in the order of `examples`."""
    base.model.eval()
    scored: dict[int, float] = {}
    for piece in micro_batches(examples, max_tokens):
        if stopped():
            raise StoppedError("asked to stop")
        batch = collate(piece, int(base.tokenizer.pad_token_id), base.device)
        losses = label_losses(base.model, batch).double()
        sums = torch.zeros(len(piece), dtype=torch.float64, device=base.device)
        sums.index_add_(0, batch.rows, losses)
        scored |= zip(map(id, piece), sums.tolist(), strict=True)
    return [ExampleLoss(n, scored[id(e)], e.labels) for n, e in enumerate(examples)]


def loss_metrics(losses: Sequence[ExampleLoss]) -> dict[str, float]:
    """Mean loss per label token, and perplexity, its exponential.

    Raises:
        DivergedError: the loss is not a finite number; no comparison could use it.
    """
    mean = sum(e.loss for e in losses) / sum(e.tokens for e in losses)
    if not math.isfinite(mean):
        raise DivergedError(
            f"the held-out loss must be finite, got {mean}; lower train.lr, or set "
            "train.precision=fp32 where the base itself overflows"
        )
    return {"eval/loss": mean, "eval/perplexity": math.exp(min(mean, 700.0))}


def write_per_example(trial: Trial, losses: Sequence[ExampleLoss]) -> None:
    """`eval/per_example.jsonl`: what intervals and paired tests are computed from."""
    lines = [json.dumps(asdict(loss)) for loss in losses]
    write_atomic(trial.per_example_file, "\n".join(lines) + "\n")
