"""Successive halving and Hyperband for trials that come to a rung together.

Optuna judges one trial at a time, against those that came before it: of a pack whose adapters
reach a rung in the same step, the first would always go on. Here all of them are reported before
any is judged. After Li et al., "A System for Massively Parallel Hyperparameter Tuning" (2020),
without its late promotions: who was ended stays so.
"""

from __future__ import annotations

import math


class Halving:
    """Lets one in `factor` of the trials go on at every rung.

    With several brackets (Hyperband) a trial belongs to one by its number, is compared with
    those of its bracket only, and is not judged at the first rungs, none in bracket 0.
    """

    def __init__(self, factor: int, brackets: int = 1) -> None:
        self._factor = factor
        self._brackets = brackets
        self._losses: dict[tuple[int, int], dict[int, float]] = {}  # by bracket and rung
        self._last: dict[int, int] = {}  # the rung that a trial reported last

    def report(self, number: int, rung: int, loss: float) -> None:
        """The held-out loss of trial `number` at a rung; one that is no number is the worst."""
        peers = self._losses.setdefault((number % self._brackets, rung), {})
        peers[number] = loss if math.isfinite(loss) else math.inf
        self._last[number] = rung

    def gives_up(self, number: int) -> bool:
        """Whether a trial is not among the best of those that reported its rung so far."""
        bracket, rung = number % self._brackets, self._last[number]
        if rung < bracket:
            return False
        peers = self._losses[bracket, rung]
        kept = max(1, len(peers) // self._factor)
        return peers[number] > sorted(peers.values())[kept - 1] or peers[number] == math.inf
