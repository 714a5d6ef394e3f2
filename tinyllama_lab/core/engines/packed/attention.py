"""Causal attention of concatenated sequences; tokens attend only within their sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from tinyllama_lab.core.engines.packed import fused_cpu
from tinyllama_lab.core.engines.packed.batch import PackedBatch
from tinyllama_lab.core.engines.packed.elementwise import rotated

# Up to this length attention scores are computed with plain matmuls, on CPUs. Those of longer
# sequences take too much memory; scaled_dot_product_attention does not keep them.
LONGEST_PLAIN = 256  # without a fused softmax
LONGEST_FUSED = 1024  # with one
# Up to this length the probabilities are kept for backward; those of longer ones are recomputed,
# because they would take more memory than all other activations.
LONGEST_KEPT = 256

Keep = Callable[[int, torch.Tensor, torch.Tensor], None]
Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Heads:
    """How the columns of the joint query, key and value output are divided into heads."""

    queries: int
    keys: int  # and as many values
    size: int
    scaling: float | None = None  # None for 1 / sqrt(size)

    @property
    def scale(self) -> float:
        """Return what scores are multiplied with."""
        return 1 / math.sqrt(self.size) if self.scaling is None else self.scaling

    @property
    def all(self) -> int:
        return self.queries + 2 * self.keys


@dataclass(frozen=True)
class Padded:
    """The sequences of one bucket as rows of one length."""

    sequences: tuple[int, ...]  # their numbers in the batch
    longest: int
    spans: tuple[torch.Tensor, torch.Tensor]  # first token and length of every sequence
    tokens: torch.Tensor  # [sequences * longest] that of a position; padding repeats the last one
    real: torch.Tensor | None  # the positions of real tokens; None if all are
    is_plain: bool  # scores are computed with plain matmuls
    ahead: torch.Tensor | None  # [group * longest, longest] -inf for later keys, where needed

    def take(self, source: torch.Tensor, size: int, rotary: Rotary, turn: int) -> torch.Tensor:
        """Return the heads of `source [tokens, heads * size]`.

        Args:
            source: columns of a larger tensor, or all of one.
            size: width of a head.
            rotary: cosines and sines, `[positions, size]`.
            turn: 1 to apply rotary positions, 0 to leave them out.

        Returns:
            `[sequences, heads, longest, size]`, of which the padding is finite.
        """
        heads, sequences = source.shape[1] // size, len(self.spans[0])
        if fused_cpu.can_run(*rotary) and source.dtype == rotary[0].dtype:
            result = source.new_empty(sequences, heads, self.longest, size)
            fused_cpu.move(result, source, self.spans, rotary, turn)
            return result
        rows = source.index_select(0, self.tokens).view(sequences, self.longest, heads, size)
        return self._turned(rows, rotary, turn).transpose(1, 2).contiguous()

    def put(
        self, heads: torch.Tensor, target: torch.Tensor, rotary: Rotary, turn: int = 0
    ) -> None:
        """Copy the heads of real tokens to `target [tokens, heads * size]`.

        `turn` is -1 to take rotary positions back, in the gradient of queries and keys.
        """
        if fused_cpu.can_run(heads, *rotary):
            fused_cpu.move(heads, target, self.spans, rotary, turn, back=True)
            return
        rows = self._turned(heads.transpose(1, 2), rotary, turn).reshape(-1, target.shape[1])
        tokens = self.tokens
        if self.real is not None:
            rows, tokens = rows.index_select(0, self.real), tokens.index_select(0, self.real)
        target.index_copy_(0, tokens, rows)

    def without_padding(self, heads: torch.Tensor) -> torch.Tensor:
        """Set the padding of `heads [sequences, heads, longest, size]` to zero, in place."""
        if self.real is not None:
            ends = self.spans[1].to(heads.device, non_blocking=True)
            step = torch.arange(self.longest, device=heads.device)
            heads.masked_fill_((step >= ends[:, None])[:, None, :, None], 0)
        return heads

    def _turned(self, rows: torch.Tensor, rotary: Rotary, turn: int) -> torch.Tensor:
        cos, sin = (table[: self.longest, None] for table in rotary)
        return rotated(rows, cos, sin * turn) if turn else rows


@dataclass
class AttentionPlan:
    """The part of attention that is the same in all layers of a pass."""

    heads: Heads
    rotary: Rotary  # cosines and sines, `[positions, size]`
    buckets: list[Padded]
    recomputes: bool = False  # activations are computed again in backward, so nothing is kept


def plan_attention(
    batch: PackedBatch,
    heads: Heads,
    cos: torch.Tensor,
    sin: torch.Tensor,
    recomputes: bool = False,
) -> AttentionPlan:
    """Return the plan of a batch. `cos` and `sin` are `[positions, size]`."""
    starts, lengths = torch.tensor(batch.starts), torch.tensor(batch.lengths)
    buckets = []
    for bucket in batch.buckets():
        sequences = torch.tensor(bucket.sequences)
        first, sizes = starts[sequences], lengths[sequences]
        step = torch.arange(bucket.longest)
        tokens = first[:, None] + torch.minimum(step, sizes[:, None] - 1)
        real = (step < sizes[:, None]).flatten().nonzero()[:, 0]
        has_softmax = fused_cpu.can_run(cos)
        limit = LONGEST_FUSED if has_softmax else LONGEST_PLAIN
        is_plain = not cos.is_cuda and bucket.longest <= limit
        buckets.append(
            Padded(
                bucket.sequences,
                bucket.longest,
                (first, sizes),
                tokens.flatten().to(cos.device, non_blocking=True),
                real.to(cos.device, non_blocking=True) if len(real) < tokens.numel() else None,
                is_plain,
                _ahead(bucket.longest, heads, cos) if is_plain and not has_softmax else None,
            )
        )
    return AttentionPlan(heads, (cos, sin), buckets, recomputes)


def _ahead(longest: int, heads: Heads, like: torch.Tensor) -> torch.Tensor:
    """Return the causal mask of stacked queries, `[group * longest, longest]`."""
    ahead = torch.full((longest, longest), -math.inf, dtype=like.dtype).triu_(1)
    return ahead.repeat(heads.queries // heads.keys, 1)


def attend(joint: torch.Tensor, plan: AttentionPlan, keep: Keep | None = None) -> torch.Tensor:
    """Return the attention output, `[tokens, queries * size]`.

    Args:
        joint: queries, keys and values, `[tokens, (queries + 2 keys) * size]`.
        plan: the buckets of the batch.
        keep: called with the number, keys and values of every bucket, to fill a cache.
    """
    output: torch.Tensor = _Attend.apply(joint, plan, keep)
    return output


class _Attend(torch.autograd.Function):
    """Attention of all buckets, with a hand-written backward."""

    @staticmethod
    def forward(
        ctx: Any, joint: torch.Tensor, plan: AttentionPlan, keep: Keep | None
    ) -> torch.Tensor:
        heads, saved = plan.heads, []
        output = joint.new_empty(len(joint), heads.queries * heads.size)
        ctx.plan, ctx.columns, ctx.graphs = plan, joint.shape[1], []
        # a graph is no saved tensor, so recomputation would not free what it holds
        keeps_graphs = ctx.needs_input_grad[0] and not plan.recomputes
        for number, bucket in enumerate(plan.buckets):
            queries, keys, values = _taken(joint, plan, bucket)
            if keep is not None:
                keep(number, keys, values)
            probabilities = graph = None
            if not bucket.is_plain:
                graph = _Graph((queries, keys, values), heads.scale, keeps_graphs)
                result = graph.result.detach()
            else:
                probabilities = _probabilities(queries, keys, heads.scale, bucket)
                result = (probabilities @ values.flatten(0, 1)).view_as(queries)
            bucket.put(result, output, plan.rotary)
            is_kept = probabilities is not None and bucket.longest <= LONGEST_KEPT
            saved += [queries, keys, values, probabilities if is_kept else None]
            ctx.graphs.append(graph if keeps_graphs else None)
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan: AttentionPlan = ctx.plan
        result = grad.new_empty(len(grad), ctx.columns)
        heads = plan.heads
        parts, size = _parts(result, heads), heads.size
        saved, grad = ctx.saved_tensors, grad.contiguous()
        for number, bucket in enumerate(plan.buckets):
            *inputs, probabilities = saved[4 * number : 4 * number + 4]
            outer = bucket.without_padding(bucket.take(grad, size, plan.rotary, 0))
            if not bucket.is_plain:
                graph = ctx.graphs[number] or _Graph(inputs, heads.scale, is_training=True)
                gradients = graph.backward(outer)
            else:
                gradients = _backward(outer, inputs, probabilities, heads.scale, bucket)
            for gradient, part, turn in zip(gradients, parts, (-1, -1, 0), strict=True):
                bucket.put(gradient, part, plan.rotary, turn)
        return result, None, None


class _Graph:
    """Attention with PyTorch's fused kernel, and its own autograd graph."""

    def __init__(self, inputs: Sequence[torch.Tensor], scale: float, is_training: bool) -> None:
        """`inputs` are queries, keys and values."""
        with torch.set_grad_enabled(is_training):
            self._inputs = [x.detach().requires_grad_(is_training) for x in inputs]
            q, k, v = self._inputs
            if q.is_cuda:
                # with fewer keys than queries, the kernels of older cards keep all scores
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            self.result = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=not q.is_cuda
            )

    def backward(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients of queries, keys and values."""
        gradients = torch.autograd.grad(self.result, self._inputs, grad)
        return [gradient.contiguous() for gradient in gradients]


def _taken(joint: torch.Tensor, plan: AttentionPlan, bucket: Padded) -> list[torch.Tensor]:
    """Return queries and keys with rotary positions, and values, of a bucket."""
    turns = zip(_parts(joint, plan.heads), (1, 1, 0), strict=True)
    return [bucket.take(part, plan.heads.size, plan.rotary, turn) for part, turn in turns]


def _parts(joint: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, ...]:
    """Return the columns of the queries, the keys and the values."""
    return joint.split([n * heads.size for n in (heads.queries, heads.keys, heads.keys)], dim=1)


def _probabilities(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, bucket: Padded
) -> torch.Tensor:
    """Return causal attention probabilities, `[sequences * keys, group * longest, longest]`.

    The queries of a group are stacked, which saves repeating its keys and values.
    """
    k = keys.flatten(0, 1)
    q = queries.view(len(k), -1, k.shape[-1])
    if bucket.ahead is None:
        return fused_cpu.causal_softmax_(q @ k.transpose(1, 2), scale)
    scores = torch.baddbmm(bucket.ahead, q, k.transpose(1, 2), alpha=scale)
    # summed in float32, as in transformers, also where the scores are in half precision
    return functional.softmax(scores, dim=-1)


def _backward(
    grad: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    probabilities: torch.Tensor | None,
    scale: float,
    bucket: Padded,
) -> list[torch.Tensor]:
    """Return the gradients of queries, keys and values, `[sequences, heads, longest, size]`."""
    queries, keys, values = inputs
    if probabilities is None:
        probabilities = _probabilities(queries, keys, scale, bucket)
    k, v = keys.flatten(0, 1), values.flatten(0, 1)
    q, outer = (x.view(len(k), -1, k.shape[-1]) for x in (queries, grad))
    inner = outer @ v.transpose(1, 2)
    if bucket.ahead is None:
        scores = fused_cpu.causal_softmax_backward_(inner, probabilities, scale)
    else:
        scores = torch._softmax_backward_data(inner, probabilities, -1, inner.dtype).mul_(scale)
    return [
        (scores @ k).view_as(queries),
        (scores.transpose(1, 2) @ q).view_as(keys),
        (probabilities.transpose(1, 2) @ outer).view_as(values),
    ]
