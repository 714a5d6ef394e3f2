"""What scoring has in memory at a time: a micro-batch, and the keys and values of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_lab.config.schema import EvalConfig
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import Engine, WorkItem
from tinyllama_lab.core.engines.generate import cache_bytes
from tinyllama_lab.core.evaluation.latency import prompts
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.metrics import MIB


@dataclass(frozen=True)
class Scored:
    """An adapter that is scored, or the bare base where that is None."""

    adapter: Any
    heldout: Sequence[Example]
    general: Sequence[Example]  # unrelated text, if it is scored as well
    settings: EvalConfig


@dataclass(frozen=True)
class ScoringLoad:
    """The examples of every micro-batch, and MiB of the largest cache of keys and values."""

    batches: Sequence[Sequence[Example]]
    cache_mib: float


def losses_load(
    engine: Engine[Any], work: Sequence[tuple[Any, Sequence[Example]]], max_tokens: int
) -> ScoringLoad:
    """Return what the losses of adapters and their rows have in memory."""
    items = [WorkItem(adapter, row) for adapter, rows in work for row in rows]
    batches = engine.micro_batches(items, max_tokens)
    return ScoringLoad([[item.example for item in batch] for batch in batches], 0.0)


def scoring_load(
    base: Base, engine: Engine[Any], scored: Sequence[Scored], max_tokens: int, least: bool = False
) -> ScoringLoad:
    """Return what scoring has in memory.

    Args:
        base: the base.
        engine: the engine that scores.
        scored: adapters that are scored together, and the base first.
        max_tokens: of a micro-batch.
        least: as after errors of memory on a GPU, one example and one prompt at a time.
    """
    items = [
        WorkItem(each.adapter, example)
        for each in scored
        for example in (*each.heldout, *each.general)
    ]
    if least:
        batches = [[max(items, key=lambda item: len(item.example.ids))]]
    else:
        batches = engine.micro_batches(items, max_tokens)
    tokens = max(_timed(scored, least), _generated(engine, scored, least))
    cache_mib = cache_bytes(base, tokens) / MIB
    return ScoringLoad([[item.example for item in batch] for batch in batches], cache_mib)


def _timed(scored: Sequence[Scored], least: bool) -> int:
    """Return tokens of the batch whose decoding is timed, for one adapter at a time.

    It is skipped, and not made smaller, where it does not fit.
    """
    tokens = [0]
    for each in scored:
        settings = each.settings
        if settings.latency_tokens:
            rows = prompts(each.heldout, 1 if least else settings.latency_batch)
            tokens.append(len(rows) * (_longest_prompt(rows) + settings.latency_tokens + 1))
    return max(tokens)


def _generated(engine: Engine[Any], scored: Sequence[Scored], least: bool) -> int:
    """Return tokens of the largest batch of completions; adapters of a group are together."""
    items = [
        WorkItem(each.adapter, example)
        for each in scored
        for example in each.heldout[: each.settings.generations]
    ]
    new_tokens, tokens = max((s.settings.max_new_tokens for s in scored), default=0), [0]
    for group in engine.groups(items) if items else ():
        rows = 1 if least else min(len(group), engine.max_prompts(group, new_tokens))
        tokens.append(rows * (_longest_prompt([item.example for item in group]) + new_tokens))
    return max(tokens)


def _longest_prompt(examples: Sequence[Example]) -> int:
    return max((len(example.prompt_ids) for example in examples), default=0)
