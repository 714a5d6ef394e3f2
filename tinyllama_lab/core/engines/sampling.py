"""Tokens chosen from scores: the best ones, or ones drawn from a stream that each prompt owns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tinyllama_lab.core.dataset.dataset import Example

_SCALE = 2**40  # weights become whole numbers up to it; sums over a vocabulary stay below 2^63


@dataclass(frozen=True)
class TokenSampling:
    """How answers are drawn."""

    temperature: float
    seed: int


class Chooser:
    """The next token of every row: greedy, or drawn where there is a `TokenSampling`.

    Draws depend on the seed, the prompt and the place in the answer, so an answer is the same
    whatever is written beside it, in any engine.
    """

    def __init__(
        self, sampling: TokenSampling | None, examples: Sequence[Example], tokens: int
    ) -> None:
        self._temperature = sampling.temperature if sampling else 0.0
        self._chances = torch.empty(0)
        if sampling:
            streams = [random.Random(f"{sampling.seed} {e.prompt_ids}") for e in examples]
            chances = [[stream.random() for _ in range(tokens)] for stream in streams]
            self._chances = torch.tensor(chances, dtype=torch.float64)  # [rows, tokens]

    def __call__(self, scores: torch.Tensor, rows: Sequence[int], place: int) -> torch.Tensor:
        """Token `place` of some answers, `[rows]`, from `scores [rows, vocabulary]`."""
        if not self._temperature:
            return scores.argmax(dim=-1)
        chances = self._chances[list(rows), place].to(scores.device)
        return _draw(scores, self._temperature, chances)


def _draw(scores: torch.Tensor, temperature: float, chances: torch.Tensor) -> torch.Tensor:
    """The token in whose share of the distribution a chance in [0, 1) falls."""
    scores = scores.double()
    weights = ((scores - scores.amax(dim=-1, keepdim=True)) / temperature).exp()
    # whole numbers, as their sums come out the same in any order and so on any device
    upto = (weights * _SCALE).long().cumsum(dim=-1)
    total = upto[:, -1]
    at = (chances * total).long().clamp(max=total - 1)
    return torch.searchsorted(upto, at[:, None], right=True)[:, 0]
