"""How many FLOPs a training step takes, counted one way for all arms."""

from __future__ import annotations

from collections.abc import Sequence

PER_PARAMETER = 4  # of each token: 2 forward, 2 for the input's gradient; a frozen W gets none


def training_flops(linears: Sequence[Sequence[int]], head: int, tokens: int, labels: int) -> float:
    """FLOPs of the frozen base; the head counts where there is a label, embeddings never."""
    blocks = sum(out * into * count for out, into, count in linears)
    return float(PER_PARAMETER * (blocks * tokens + head * labels))
