"""Losses on the held-out examples, of the base and of adapters: one path for both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.dataset.example import clusters
from tinyllama_lab.core.engines.base import Adapter, Engine, WorkItem
from tinyllama_lab.core.out_of_memory import fit
from tinyllama_lab.errors import DivergedError, StoppedError
from tinyllama_lab.study.files import write_atomic
from tinyllama_lab.study.trial import Trial


@dataclass(frozen=True)
class ExampleLoss:
    """Summed cross entropy (nats) of one held-out example's labels, and their number."""

    example: int
    loss: float
    tokens: int
    cluster: int  # the first example of those that belong together
    row: int  # of the data, from 1
    bytes: int = 0  # UTF-8, of the text that the labels stand for


@torch.no_grad()
def example_losses(
    engine: Engine[Any],
    items: Sequence[WorkItem[Any]],
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
    context: WorkerContext,
    engine: Engine[Any],
    work: Sequence[tuple[Adapter | None, Sequence[Example]]],
    trial: Trial,
) -> list[list[ExampleLoss]]:
    """Losses of the rows of every adapter, all in the same batches; `trial` hears of trouble.

    Raises:
        StoppedError: the worker was told to stop.
    """
    items = [WorkItem(adapter, example) for adapter, rows in work for example in rows]
    longest = max(len(item.example.ids) for item in items)
    losses, _ = fit(
        lambda tokens: example_losses(engine, items, tokens, context.stopped),
        2 * context.micro_batch_tokens,
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
            ExampleLoss(number, loss, example.labels, cluster, example.number, example.text_bytes)
            for number, (loss, example, cluster) in enumerate(
                zip(islice(left, len(rows)), rows, together[id(rows)], strict=True)
            )
        ]
        for _, rows in work
    ]


def mean_loss(losses: Sequence[ExampleLoss]) -> float:
    """Nats per label token."""
    return sum(e.loss for e in losses) / sum(e.tokens for e in losses)


def bits_per_byte(losses: Sequence[ExampleLoss]) -> dict[str, float]:
    """Bits that the model needs for a byte of the text, by the end of the metric's name.

    Summed nats of all labels / ln 2 / UTF-8 bytes of the text they stand for (Gao et al. 2020,
    "The Pile", arXiv 2101.00027, section 3.1). Unlike the loss it says the same of models with
    other tokens. Empty where the labels have no text.
    """
    size = sum(e.bytes for e in losses)
    nats = sum(e.loss for e in losses)
    return {"bits_per_byte": nats / math.log(2) / size} if size else {}


def loss_metrics(losses: Sequence[ExampleLoss], is_base: bool = False) -> dict[str, float]:
    """Mean loss per label token, perplexity (its exponential), and bits per byte.

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
    perplexity = math.exp(min(mean, 700.0))
    bits = {f"eval/{name}": value for name, value in bits_per_byte(losses).items()}
    return {"eval/loss": mean, "eval/perplexity": perplexity, **bits}


def general_metrics(losses: Sequence[ExampleLoss]) -> dict[str, float]:
    """The same two measures on text that has nothing to do with the training rows."""
    bits = {f"eval/general_{name}": value for name, value in bits_per_byte(losses).items()}
    return {"eval/general_loss": mean_loss(losses), **bits}


def write_losses(path: Path, losses: Sequence[ExampleLoss]) -> None:
    """One object a line: what intervals and paired tests are computed from."""
    lines = [json.dumps(asdict(loss)) for loss in losses]
    write_atomic(path, "\n".join(lines) + "\n")
