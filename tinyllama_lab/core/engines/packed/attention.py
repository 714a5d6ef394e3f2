"""Causal attention of concatenated sequences; tokens attend only within their sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from tinyllama_lab.core.engines.packed.batch import Bucket, PackedBatch
from tinyllama_lab.core.engines.packed.elementwise import rotated

# Up to this length attention scores are computed with plain matmuls and kept for backward. Those
# of longer sequences take too much memory; scaled_dot_product_attention does not keep them.
LONGEST_PLAIN = 256

Keep = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Heads:
    """How the columns of the joint query, key and value output are divided into heads."""

    queries: int
    keys: int  # and as many values
    size: int

    @property
    def all(self) -> int:
        return self.queries + 2 * self.keys


@dataclass
class AttentionPlan:
    """The part of attention that is the same in all layers of a pass.

    A row is one head of one token. `gather` lists the rows of the joint output that make up the
    buckets: for each bucket its queries, keys and values, as `[count, heads, longest]`.
    """

    heads: Heads
    cos: torch.Tensor  # [longest, size]
    sin: torch.Tensor
    buckets: list[Bucket]
    gather: torch.Tensor
    scatter: torch.Tensor  # [tokens * heads.all] where each row went
    output_rows: torch.Tensor  # [tokens * heads.queries] the same among the queries alone
    causal_masks: list[torch.Tensor | None]  # of every bucket; None if the kernel has its own


def plan_attention(
    batch: PackedBatch, heads: Heads, cos: torch.Tensor, sin: torch.Tensor
) -> AttentionPlan:
    """Return the plan of a batch. `cos` and `sin` are `[positions, size]`."""
    starts, lengths = torch.tensor(batch.starts), torch.tensor(batch.lengths)
    tokens = sum(batch.lengths)
    scatter = torch.empty(tokens, heads.all, dtype=torch.long)
    output_rows = torch.empty(tokens, heads.queries, dtype=torch.long)
    gather, buckets = [], batch.buckets()
    gathered = queried = 0
    for bucket in buckets:
        sequences = torch.tensor(bucket.sequences)
        step = torch.arange(bucket.longest)
        is_real = step < lengths[sequences, None]  # [sequences, longest]
        # padding repeats the last token: it is finite, no real token attends to it, and its
        # gradient is zero
        token = starts[sequences, None] + torch.minimum(step, lengths[sequences, None] - 1)
        for first, last in _head_ranges(heads):
            head = torch.arange(first, last)
            rows = token[:, None, :] * heads.all + head[:, None]
            positions = torch.arange(rows.numel()).view(rows.shape).transpose(1, 2)[is_real]
            scatter[token[is_real], first:last] = gathered + positions
            if first == 0:
                output_rows[token[is_real]] = queried + positions
                queried += rows.numel()
            gathered += rows.numel()
            gather.append(rows.reshape(-1))
    longest = max(batch.lengths)
    return AttentionPlan(
        heads=heads,
        cos=cos[:longest],
        sin=sin[:longest],
        buckets=buckets,
        gather=torch.cat(gather).to(cos.device, non_blocking=True),
        scatter=scatter.reshape(-1).to(cos.device, non_blocking=True),
        output_rows=output_rows.reshape(-1).to(cos.device, non_blocking=True),
        causal_masks=[_causal_mask(bucket.longest, heads, cos) for bucket in buckets],
    )


def attend(joint: torch.Tensor, plan: AttentionPlan, keep: Keep | None = None) -> torch.Tensor:
    """Return the attention output, `[tokens, queries * size]`.

    Args:
        joint: queries, keys and values, `[tokens, (queries + 2 keys) * size]`.
        plan: the buckets of the batch.
        keep: called with the number, keys and values of every bucket, to fill a cache.
    """
    heads, tokens = plan.heads, len(joint)
    rows = _SelectRows.apply(joint.reshape(-1, heads.size), plan.gather, plan.scatter)
    shapes = [
        (len(bucket.sequences), last - first, bucket.longest, heads.size)
        for bucket in plan.buckets
        for first, last in _head_ranges(heads)
    ]
    parts = [
        part.view(shape)
        for part, shape in zip(
            rows.split([a * b * c for a, b, c, _ in shapes]), shapes, strict=True
        )
    ]
    outputs = []
    for number, bucket in enumerate(plan.buckets):
        cos, sin = plan.cos[: bucket.longest], plan.sin[: bucket.longest]
        queries, keys, values = parts[3 * number : 3 * number + 3]
        queries, keys = rotated(queries, cos, sin), rotated(keys, cos, sin)
        if keep is not None:
            keep(number, keys, values)
        result = _attend_bucket(queries, keys, values, plan.causal_masks[number])
        outputs.append(result.reshape(-1, heads.size))
    rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    output: torch.Tensor = _SelectOnce.apply(rows, plan.output_rows)
    return output.view(tokens, heads.queries * heads.size)


def _attend_bucket(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the output of a bucket; all are `[sequences, heads, longest, size]`."""
    count, kinds, longest, size = keys.shape
    if mask is None:
        return functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=True
        )
    # grouped queries: stacking those of a group saves repeating its keys and values
    q = queries.reshape(count * kinds, -1, size)
    k, v = keys.reshape(-1, longest, size), values.reshape(-1, longest, size)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(size))
    # in float32, as in transformers, also where the scores are in half precision
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).view_as(queries)


def _causal_mask(longest: int, heads: Heads, like: torch.Tensor) -> torch.Tensor | None:
    """Return the causal mask, minus infinity for later tokens, `[group * longest, longest]`.

    None if scaled_dot_product_attention is used, which has its own mask.
    """
    if longest > LONGEST_PLAIN or like.is_cuda:
        return None
    ahead = torch.full((longest, longest), -math.inf, dtype=like.dtype).triu_(1)
    return ahead.repeat(heads.queries // heads.keys, 1)


def _head_ranges(heads: Heads) -> list[tuple[int, int]]:
    """Return the ranges of heads of the queries, the keys and the values."""
    values = heads.queries + heads.keys
    return [(0, heads.queries), (heads.queries, values), (values, heads.all)]


class _SelectRows(torch.autograd.Function):
    """Selects rows, some of them several times; backward ignores repeated (padding) rows."""

    @staticmethod
    def forward(
        ctx: Any, source: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(scatter)
        return source.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scatter,) = ctx.saved_tensors
        return grad.index_select(0, scatter), None, None


class _SelectOnce(torch.autograd.Function):
    """Selects rows, each once; the other rows (padding) get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.rows = len(source)
        return source.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        result = grad.new_zeros(ctx.rows, grad.shape[1])
        return result.index_copy_(0, rows, grad), None
