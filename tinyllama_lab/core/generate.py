"""Greedy answers to held-out prompts, and how fast they are written."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tinyllama_lab.core.bench import Bench
from tinyllama_lab.core.data import Example
from tinyllama_lab.core.engine import Engine, Item
from tinyllama_lab.trial import Trial, write_atomic

_REPEATS = 3


@dataclass(frozen=True)
class Generation:
    """One prompt, what the data says, and what the model wrote."""

    prompt: str
    reference: str
    output: str
    intent: str


def generate(
    engine: Engine[Any], items: Sequence[Item[Any]], tokens: int, at_once: int, bench: Bench
) -> list[str]:
    """The answer to the prompt of every item, at most `tokens` long, without special tokens."""
    tokenizer = bench.base.tokenizer
    answers: list[str] = []
    for group in engine.groups(items):
        size = min(at_once, engine.answers_at_once(group, tokens))
        for start in range(0, len(group), size):
            bench.check_stop()
            for ids in engine.generate(group[start : start + size], tokens, stop=True):
                if tokenizer.eos_token_id in ids:
                    ids = ids[: ids.index(tokenizer.eos_token_id)]
                answers.append(str(tokenizer.decode(ids, skip_special_tokens=True)).strip())
    return answers


def generations(examples: Sequence[Example], answers: Sequence[str]) -> list[Generation]:
    """What is written beside what was asked and expected."""
    return [
        Generation(e.prompt, e.reference, answer, e.intent)
        for e, answer in zip(examples, answers, strict=True)
    ]


def measure_latency(
    engine: Engine[Any], item: Item[Any], tokens: int, device: torch.device
) -> dict[str, float]:
    """Time to the first token, and tokens per second after it, for one prompt at batch 1.

    Medians of three repeats after one that is not counted. Always writes all `tokens`.
    """
    first, rate = [], []
    for repeat in range(_REPEATS + 1):
        to_first = _timed(engine, item, 1, device)
        to_last = _timed(engine, item, tokens + 1, device)
        if repeat:
            first.append(to_first)
            rate.append(tokens / max(to_last - to_first, 1e-9))
    return {
        "perf/first_token_ms": 1000 * statistics.median(first),
        "perf/decode_tokens_per_s": statistics.median(rate),
    }


def write_generations(trial: Trial, written: Sequence[Generation]) -> None:
    """`eval/generations.jsonl`, one object a prompt."""
    lines = [json.dumps(asdict(g), ensure_ascii=False) for g in written]
    write_atomic(trial.generations_file, "".join(line + "\n" for line in lines))


def _timed(engine: Engine[Any], item: Item[Any], tokens: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    engine.generate([item], tokens, stop=False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
