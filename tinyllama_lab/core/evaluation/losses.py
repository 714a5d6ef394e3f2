"""Held-out losses of the base and of adapters, computed in the same way."""

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
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.dataset.example import Example, clusters, with_text
from tinyllama_lab.core.dataset.prompts import TextTokenizer
from tinyllama_lab.core.engines.base import Adapter, Engine, WorkItem
from tinyllama_lab.core.out_of_memory import fit
from tinyllama_lab.errors import DivergedError
from tinyllama_lab.metrics import HELDOUT_LOSS, PERPLEXITY
from tinyllama_lab.study.files import write_atomic
from tinyllama_lab.study.trial import TrialFolder

PASSAGES = Path(__file__).with_name("general.jsonl")  # unrelated text, to measure forgetting


@dataclass(frozen=True)
class ExampleLoss:
    """Summed cross entropy (nats) of one held-out example's labels, and their number."""

    example: int
    loss: float
    tokens: int
    cluster: int  # number of the first example in its cluster
    row: int  # of the data, from 1
    bytes: int = 0  # UTF-8, of the text that the labels stand for


@torch.no_grad()
def example_losses(
    engine: Engine[Any],
    items: Sequence[WorkItem[Any]],
    max_tokens: int,
    before_batch: Callable[[int], object],
) -> list[float]:
    """Return the summed loss (nats) of every item, in the order of `items`, sorted by adapter.

    `before_batch` is called with the tokens of every micro-batch.
    """
    # an engine may reorder the items, for example by length, so losses are kept by item
    loss_by_item: dict[int, float] = {}
    for micro_batch in engine.micro_batches(items, max_tokens):
        before_batch(sum(len(item.example.ids) for item in micro_batch))
        losses = engine.example_losses(micro_batch).tolist()
        loss_by_item |= zip(map(id, micro_batch), losses, strict=True)
    return [loss_by_item[id(item)] for item in items]


def heldout_losses(
    context: WorkerContext,
    engine: Engine[Any],
    work: Sequence[tuple[Adapter | None, Sequence[Example]]],
    trial: TrialFolder,
) -> list[list[ExampleLoss]]:
    """Return the losses of every adapter's rows, computed in shared batches.

    Args:
        work: adapters and their rows, sorted by adapter.
        trial: its event log gets a note if memory runs out.

    Raises:
        StoppedError: the worker was asked to stop.
    """
    items = [WorkItem(adapter, example) for adapter, rows in work for example in rows]
    longest = max(len(item.example.ids) for item in items)
    losses, _ = fit(
        lambda tokens: example_losses(engine, items, tokens, context.before_batch),
        # nothing is kept for backward, so more tokens fit than in training
        2 * context.micro_batch_tokens,
        longest,
        trial,
    )
    remaining = iter(losses)
    clusters_of: dict[int, list[int]] = {}  # trials of a pack often share held-out rows
    for _, rows in work:
        if id(rows) not in clusters_of:
            clusters_of[id(rows)] = clusters(rows)
    return [
        [
            ExampleLoss(number, loss, example.labels, cluster, example.number, example.text_bytes)
            for number, (loss, example, cluster) in enumerate(
                zip(islice(remaining, len(rows)), rows, clusters_of[id(rows)], strict=True)
            )
        ]
        for _, rows in work
    ]


def general_examples(cache: DataCache) -> list[Example]:
    """Return the passages of unrelated text as examples, cut at the model's longest sequence.

    They were written for this project, and no trial trains on them: encyclopedic and everyday
    English prose, instructions, dialogue and some code. They are scored as plain text, without a
    prompt and without an end token.
    """
    lines = PASSAGES.read_text(encoding="utf-8").splitlines()
    texts = [str(json.loads(line)["text"]) for line in lines]
    tokenizer = TextTokenizer(cache.tokenizer)
    examples = []
    for number, text in enumerate(texts, start=1):
        ids = tuple(tokenizer.whole(text, len(text)).ids[:-1])[: cache.positions]
        examples.append(Example(ids, (True,) * len(ids), (), "", text, "", number=number))
    return with_text(examples, cache.tokenizer)


def mean_loss(losses: Sequence[ExampleLoss]) -> float:
    """Return the mean loss in nats per label token."""
    return sum(e.loss for e in losses) / sum(e.tokens for e in losses)


def bits_per_byte(losses: Sequence[ExampleLoss]) -> dict[str, float]:
    """Return bits per UTF-8 byte of the supervised text, by the last part of the metric's name.

    This is the summed nats of all labels / ln 2 / bytes of their text (Gao et al. 2020, "The
    Pile", arXiv 2101.00027, section 3.1). Unlike the loss, it can be compared between models
    with different tokenizers. Empty if the labels have no text.
    """
    size = sum(e.bytes for e in losses)
    nats = sum(e.loss for e in losses)
    return {"bits_per_byte": nats / math.log(2) / size} if size else {}


def loss_metrics(losses: Sequence[ExampleLoss], is_base: bool = False) -> dict[str, float]:
    """Return mean loss per label token, perplexity (its exponential), and bits per byte.

    Args:
        losses: the losses of all held-out rows.
        is_base: whether they are those of the bare base; decides the advice in the error.

    Raises:
        DivergedError: the mean loss is NaN or infinite.
    """
    mean = mean_loss(losses)
    if not math.isfinite(mean):
        # the weights of a base were finite when it was loaded
        whose, way_out = "", "lower train.lr"
        if is_base:
            whose, way_out = " of the base", "set train.precision=fp32, or take another model"
        raise DivergedError(f"the held-out loss{whose} must be finite, got {mean}; {way_out}")
    # exp overflows a double above 709
    perplexity = math.exp(min(mean, 700.0))
    bits = {f"eval/{name}": value for name, value in bits_per_byte(losses).items()}
    return {HELDOUT_LOSS: mean, PERPLEXITY: perplexity, **bits}


def general_metrics(losses: Sequence[ExampleLoss]) -> dict[str, float]:
    """Return loss and bits per byte on text that is unrelated to the training rows."""
    bits = {f"eval/general_{name}": value for name, value in bits_per_byte(losses).items()}
    return {"eval/general_loss": mean_loss(losses), **bits}


def write_losses(path: Path, losses: Sequence[ExampleLoss]) -> None:
    """Write one JSON object per line; intervals and paired tests are computed from this file."""
    lines = [json.dumps(asdict(loss)) for loss in losses]
    write_atomic(path, "\n".join(lines) + "\n")
