"""Losses on the held-out examples, of the base and of adapters: one path for both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from tinyllama_lab.core.bench import Bench, fit
from tinyllama_lab.core.clusters import clusters
from tinyllama_lab.core.data import Example
from tinyllama_lab.core.engine import Adapter, Engine, Item
from tinyllama_lab.errors import DivergedError, StoppedError
from tinyllama_lab.trial import Trial, write_atomic


@dataclass(frozen=True)
class ExampleLoss:
    """Summed cross entropy (nats) of one held-out example's labels, and their number."""

    example: int
    loss: float
    tokens: int
    cluster: int  # the first example of those that belong together
    row: int  # of the data, from 1


@torch.no_grad()
def example_losses(
    engine: Engine[Any],
    items: Sequence[Item[Any]],
    max_tokens: int,
    stopped: Callable[[], bool],
) -> list[float]:
    """Summed loss of every item, in the order of `items`, which come sorted by adapter."""
    found: dict[int, float] = {}
    for piece in engine.micro_batches(items, max_tokens):
        if stopped():
            raise StoppedError("asked to stop")
        found |= zip(map(id, piece), engine.example_losses(piece).tolist(), strict=True)
    return [found[id(item)] for item in items]


def heldout_losses(
    bench: Bench,
    engine: Engine[Any],
    work: Sequence[tuple[Adapter | None, Sequence[Example]]],
    trial: Trial,
) -> list[list[ExampleLoss]]:
    """Losses of the rows of every adapter, all in the same batches; `trial` hears of trouble.

    Raises:
        StoppedError: the worker was told to stop.
    """
    items = [Item(adapter, example) for adapter, rows in work for example in rows]
    longest = max(len(item.example.ids) for item in items)
    losses, _ = fit(
        lambda tokens: example_losses(engine, items, tokens, bench.stopped),
        2 * bench.tokens_at_once,
        longest,
        trial,
    )
    left = iter(losses)
    together: dict[int, list[int]] = {}  # trials of a pack share their held-out rows
    for _, rows in work:
        if id(rows) not in together:
            together[id(rows)] = clusters(rows)
    return [
        [
            ExampleLoss(number, loss, example.labels, cluster, example.number)
            for number, (loss, example, cluster) in enumerate(
                zip(islice(left, len(rows)), rows, together[id(rows)], strict=True)
            )
        ]
        for _, rows in work
    ]


def mean_loss(losses: Sequence[ExampleLoss]) -> float:
    """Nats per label token."""
    return sum(e.loss for e in losses) / sum(e.tokens for e in losses)


def loss_metrics(losses: Sequence[ExampleLoss], is_base: bool = False) -> dict[str, float]:
    """Mean loss per label token, and perplexity, its exponential.

    Args:
        losses: of every held-out row.
        is_base: whether no adapter was trained.

    Raises:
        DivergedError: the loss is not a finite number; no comparison could use it.
    """
    mean = mean_loss(losses)
    if not math.isfinite(mean):
        way_out = "take another model" if is_base else "lower train.lr"
        raise DivergedError(
            f"the held-out loss{' of the base' * is_base} must be finite, got {mean}; {way_out}, "
            "or set train.precision=fp32 where the base itself overflows"
        )
    return {"eval/loss": mean, "eval/perplexity": math.exp(min(mean, 700.0))}


def write_per_example(trial: Trial, losses: Sequence[ExampleLoss]) -> None:
    """`eval/per_example.jsonl`: what intervals and paired tests are computed from."""
    lines = [json.dumps(asdict(loss)) for loss in losses]
    write_atomic(trial.per_example_file, "\n".join(lines) + "\n")
