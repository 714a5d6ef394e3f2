"""Which held-out examples belong together, by their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.data.splits import clusters as rows


def clusters(examples: Sequence[Example]) -> list[int]:
    """For each example the number of the first one of its cluster."""
    scored = [
        [token for token, supervised in zip(each.ids, each.loss_mask, strict=True) if supervised]
        for each in examples
    ]
    return rows.clusters(scored, [each.group for each in examples])
