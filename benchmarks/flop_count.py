"""The FLOPs of a training step, counted in the same way for all arms."""

from __future__ import annotations

from collections.abc import Sequence

# FLOPs per parameter and token: 2 forward, 2 for the gradient of the input. A frozen weight gets
# no gradient, which would be 2 more.
PER_PARAMETER = 4


def training_flops(linears: Sequence[Sequence[int]], head: int, tokens: int, labels: int) -> float:
    """Return the training FLOPs of the frozen base, without adapters and embeddings.

    Args:
        linears: output features, input features and number of the blocks' linear layers.
        head: parameters of the language-model head.
        tokens: real tokens, without padding.
        labels: supervised tokens; the head is counted for these alone.
    """
    blocks = sum(out * into * count for out, into, count in linears)
    return float(PER_PARAMETER * (blocks * tokens + head * labels))
