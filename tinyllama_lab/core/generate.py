"""Greedy answers to held-out prompts, and how fast they are written."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tinyllama_lab.core.data import Example
from tinyllama_lab.core.model import Base
from tinyllama_lab.trial import Trial, write_atomic

_REPEATS = 3


@dataclass(frozen=True)
class Generation:
    """One prompt, what the data says, and what the model wrote."""

    prompt: str
    reference: str
    output: str
    intent: str


@torch.no_grad()
def generate(
    base: Base, examples: Sequence[Example], max_new_tokens: int, batch_size: int = 32
) -> list[Generation]:
    """Answer the prompts of `examples` greedily, with whatever adapter is attached."""
    base.model.eval()
    answers: list[str] = []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        ids, mask = _pad_left(part, base)
        write: Any = base.model.generate
        written = write(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            **_greedy(base),
        )
        answers += base.tokenizer.batch_decode(
            written[:, ids.shape[1] :], skip_special_tokens=True
        )
    return [
        Generation(e.prompt, e.reference, answer.strip(), e.intent)
        for e, answer in zip(examples, answers, strict=True)
    ]


@torch.no_grad()
def measure_latency(base: Base, example: Example, tokens: int) -> dict[str, float]:
    """Time to the first token, and tokens per second after it, for one prompt at batch 1.

    Medians of three repeats after one that is not counted. Always writes all `tokens`.
    """
    first, rate = [], []
    for repeat in range(_REPEATS + 1):
        to_first = _timed(base, example, 1)
        to_last = _timed(base, example, tokens + 1)
        if repeat:
            first.append(to_first)
            rate.append(tokens / max(to_last - to_first, 1e-9))
    return {
        "perf/first_token_ms": 1000 * statistics.median(first),
        "perf/decode_tokens_per_s": statistics.median(rate),
    }


def write_generations(trial: Trial, generations: Sequence[Generation]) -> None:
    """`eval/generations.jsonl`, one object a prompt."""
    lines = [json.dumps(asdict(g), ensure_ascii=False) for g in generations]
    write_atomic(trial.generations_file, "".join(line + "\n" for line in lines))


def _timed(base: Base, example: Example, tokens: int) -> float:
    ids, mask = _pad_left([example], base)
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
    begin = time.perf_counter()
    write: Any = base.model.generate
    write(
        input_ids=ids,
        attention_mask=mask,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        **_greedy(base),
    )
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
    return time.perf_counter() - begin


def _greedy(base: Base) -> dict[str, object]:
    return {
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": base.tokenizer.pad_token_id,
        "eos_token_id": base.tokenizer.eos_token_id,
    }


def _pad_left(examples: Sequence[Example], base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(e.prompt_ids) for e in examples)
    ids = torch.full((len(examples), longest), int(base.tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, longest - len(example.prompt_ids) :] = torch.tensor(example.prompt_ids)
        mask[row, longest - len(example.prompt_ids) :] = 1
    return ids.to(base.device), mask.to(base.device)
