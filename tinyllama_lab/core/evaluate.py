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
from tinyllama_lab.errors import StoppedError
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
    place = {id(example): number for number, example in enumerate(examples)}
    found: dict[int, ExampleLoss] = {}
    for piece in micro_batches(examples, max_tokens):
        if stopped():
            raise StoppedError("asked to stop")
        batch = collate(piece, int(base.tokenizer.pad_token_id), base.device)
        losses = label_losses(base.model, batch).double()
        sums = torch.zeros(len(piece), dtype=torch.float64, device=base.device)
        sums.index_add_(0, batch.rows, losses)
        for example, loss in zip(piece, sums.tolist(), strict=True):
            number = place[id(example)]
            found[number] = ExampleLoss(number, loss, example.labels)
    return [found[number] for number in range(len(examples))]


def loss_metrics(losses: Sequence[ExampleLoss]) -> dict[str, float]:
    """Mean loss per label token, and perplexity, its exponential."""
    mean = sum(e.loss for e in losses) / sum(e.tokens for e in losses)
    return {"eval/loss": mean, "eval/perplexity": math.exp(min(mean, 700.0))}


def write_per_example(trial: Trial, losses: Sequence[ExampleLoss]) -> None:
    """`eval/per_example.jsonl`: what intervals and paired tests are computed from."""
    lines = [json.dumps(asdict(loss)) for loss in losses]
    write_atomic(trial.per_example_file, "\n".join(lines) + "\n")
