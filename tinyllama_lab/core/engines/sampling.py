"""Chooses tokens from logits: greedily, or with a random stream for each prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tinyllama_lab.core.dataset.dataset import Example

_SCALE = 2**40  # weights become integers up to it; sums over a vocabulary stay below 2^63


@dataclass(frozen=True)
class TokenSampling:
    """Temperature and seed with which tokens are drawn."""

    temperature: float
    seed: int


class Chooser:
    """Chooses the next token of every row: greedy, or drawn with a `TokenSampling`.

    Draws depend only on the seed, the prompt and the position, so a completion does not depend
    on the rest of the batch or on the engine.
    """

    def __init__(
        self, sampling: TokenSampling | None, examples: Sequence[Example], tokens: int
    ) -> None:
        self._temperature = sampling.temperature if sampling else 0.0
        self._chances = torch.empty(0)
        if sampling:
            # Python's generator takes a string as seed and gives the same numbers on every machine
            streams = [random.Random(f"{sampling.seed} {e.prompt_ids}") for e in examples]
            chances = [[stream.random() for _ in range(tokens)] for stream in streams]
            self._chances = torch.tensor(chances, dtype=torch.float64)  # [rows, tokens]

    def __call__(self, logits: torch.Tensor, rows: Sequence[int], position: int) -> torch.Tensor:
        """Return token number `position`, `[rows]`, from `logits [rows, vocabulary]`."""
        if not self._temperature:
            return logits.argmax(dim=-1)
        chances = self._chances[list(rows), position].to(logits.device)
        return _draw(logits, self._temperature, chances)


def _draw(logits: torch.Tensor, temperature: float, chances: torch.Tensor) -> torch.Tensor:
    """Return the token whose interval of the cumulative distribution contains the chance.

    `chances [rows]` are in [0, 1).
    """
    logits = logits.double()
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp()
    # integers: their sums are the same in any order, and so on any device
    cumulative = (weights * _SCALE).long().cumsum(dim=-1)
    total = cumulative[:, -1]
    thresholds = (chances * total).long().clamp(max=total - 1)
    return torch.searchsorted(cumulative, thresholds[:, None], right=True)[:, 0]
