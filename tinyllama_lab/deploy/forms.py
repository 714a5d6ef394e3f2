"""What is asked of the process that measures a form of a model, and what it answers.

Nothing here imports torch: a process that measures a GGUF file has llama.cpp's memory alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_lab.study.exports import BASE, MERGED, ORIGINAL, TRAINED

IN_TORCH = (BASE, TRAINED, MERGED, ORIGINAL)  # the forms that are no GGUF files


@dataclass(frozen=True)
class Task:
    """What a process measures.

    `examples` have `ids`, `loss_mask`, `prompt_ids` and `prompt_text`. `answers` are token ids of
    the adapter as trained; None where this is the form that generates them.
    """

    form: str  # `base`, `adapter`, `merged`, `original` or the type of a GGUF file
    trial: str  # folder of the trial
    paths: list[str]  # of the merged model; of a GGUF file, and of an adapter that is added to it
    device: str
    tokens: int  # the most of an answer
    prompts: int  # how many examples are answered
    examples: list[dict[str, Any]]
    answers: list[list[int]] | None


@dataclass(frozen=True)
class Measured:
    """What was measured of one form."""

    losses: list[float]  # nats, summed over the supervised tokens of every example
    answers: list[list[int]]  # greedy, without end tokens
    texts: list[str]  # of the answers
    same_tokens: float | None  # share of the tokens of `Task.answers` that it would choose too
    decode_tokens_per_s: float
    first_token_ms: float
    resident_mib: float  # the highest while it gives one answer
    device: str  # `cpu` or `cuda`
    dtype: str  # in which it computes; of a GGUF file, that of its weights


def share_of_same(chosen: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """Return the share of tokens of the answers that are chosen too, each after the true ones."""
    pairs = [p for a, b in zip(chosen, answers, strict=True) for p in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / max(len(pairs), 1)
