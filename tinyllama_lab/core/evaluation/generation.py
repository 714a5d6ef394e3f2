"""Generates completions of held-out prompts, greedy or sampled, and writes them to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import Engine, WorkItem
from tinyllama_lab.core.engines.sampling import TokenSampling
from tinyllama_lab.study.files import write_atomic


@dataclass(frozen=True)
class Generation:
    """One prompt with its reference, its greedy completion and its sampled completion."""

    prompt: str
    reference: str
    output: str
    intent: str
    sampled: str | None = None
    scores: dict[str, float] | None = None  # of the output, by name


def generate(
    engine: Engine[Any],
    items: Sequence[WorkItem[Any]],
    tokens: int,
    max_concurrent: int,
    context: WorkerContext,
    sampling: TokenSampling | None = None,
) -> list[str]:
    """Return the completion of every item's prompt: at most `tokens`, no special tokens."""
    tokenizer, ends = context.base.tokenizer, context.base.end_ids
    completions: list[str] = []
    for group in engine.groups(items):
        size = min(max_concurrent, engine.max_prompts(group, tokens))
        for start in range(0, len(group), size):
            context.check_stop()
            batch = group[start : start + size]
            for ids in engine.generate(batch, tokens, stop=True, sampling=sampling):
                # up to the end token, after which PEFT's engine pads to the longest of the batch
                ids = list(takewhile(lambda token: token not in ends, ids))
                completions.append(str(tokenizer.decode(ids, skip_special_tokens=True)).strip())
    return completions


def generations(
    examples: Sequence[Example], greedy: Sequence[str], sampled: Sequence[str] | None = None
) -> list[Generation]:
    """Return every completion together with its prompt and reference."""
    second = [None] * len(examples) if sampled is None else sampled
    return [
        Generation(example.prompt, example.reference, output, example.intent, sampled_output)
        for example, output, sampled_output in zip(examples, greedy, second, strict=True)
    ]


def write_generations(path: Path, generations: Sequence[Generation]) -> None:
    """Write `generations.jsonl`, one object per prompt; missing values are left out."""
    rows = [{k: v for k, v in asdict(g).items() if v is not None} for g in generations]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_atomic(path, "".join(line + "\n" for line in lines))
