"""Attention for transformers' own forward passes: sequences that lie end to end, kept apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from tinyllama_lab.core.engines.packed.attention import (
    AttentionPlan,
    Heads,
    attend,
    plan_attention,
)
from tinyllama_lab.core.engines.packed.batch import PackedBatch


class UnknownAttentionError(Exception):
    """A model asks for attention that is not known here; the message says which."""


@dataclass(frozen=True)
class Sequences:
    """Where the tokens of a batch stand in padded rows; the same in all layers.

    Attributes:
        batch: the tokens, end to end.
        buckets: tokens of the rows of every bucket, `[rows, longest]`; padding repeats the last
            token of a row.
        back: where every token stands in the rows of all buckets one after another, `[tokens]`.
    """

    batch: PackedBatch
    buckets: list[torch.Tensor]
    back: torch.Tensor
    _plans: dict[Heads, AttentionPlan] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: PackedBatch) -> Sequences:
        """Return the rows of a batch."""
        starts, lengths = torch.tensor(batch.starts), torch.tensor(batch.lengths)
        buckets, count, device = [], 0, batch.ids.device
        back = torch.empty(int(lengths.sum()), dtype=torch.long)
        for bucket in batch.buckets():
            numbers, step = torch.tensor(bucket.sequences), torch.arange(bucket.longest)
            first, sizes = starts[numbers, None], lengths[numbers, None]
            tokens = first + torch.minimum(step, sizes - 1)
            real = step < sizes
            back[tokens[real]] = count + real.flatten().nonzero()[:, 0]
            count += tokens.numel()
            buckets.append(tokens.to(device, non_blocking=True))
        return cls(batch, buckets, back.to(device, non_blocking=True))

    def plan(self, heads: Heads, dtype: torch.dtype) -> AttentionPlan | None:
        """Return the plan of `attend` for queries and keys that have their positions already.

        None where it would take PyTorch's kernel, with a graph of its own: on GPUs, and for long
        rows. Heads of an odd size cannot be rotated.
        """
        device = self.batch.ids.device
        if device.type != "cpu" or heads.size % 2:
            return None
        if heads not in self._plans:
            # cosines and sines of position 0
            cos = torch.ones(max(self.batch.lengths), heads.size, dtype=dtype)
            self._plans[heads] = plan_attention(self.batch, heads, cos, torch.zeros_like(cos))
        plan = self._plans[heads]
        return plan if all(bucket.is_plain for bucket in plan.buckets) else None


def attend_apart(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    **options: Any,
) -> torch.Tensor:
    """Return causal attention within every sequence, `[1, tokens, heads, size]`.

    Args:
        query: `[1, heads, tokens, size]`.
        key: `[1, key heads, tokens, size]`.
        value: like `key`.
        sequences: of the batch.
        options: what transformers passes to every attention function.

    Raises:
        UnknownAttentionError: an option asks for more than is known here.
    """
    scaling, window, softcap = _options(**options)
    heads = [x[0].transpose(0, 1) for x in (query, key, value)]
    sees_all = window is None or max(sequences.batch.lengths) <= window
    if sees_all and softcap is None and key.shape == value.shape:
        numbers = Heads(query.shape[1], key.shape[1], query.shape[3], scaling)
        if plan := sequences.plan(numbers, query.dtype):
            output = attend(torch.cat([x.flatten(1) for x in heads], dim=1), plan)
            return output.view(1, len(output), numbers.queries, numbers.size)
    results = []
    for tokens in sequences.buckets:
        q, k, v = (x[tokens].transpose(1, 2) for x in heads)
        result = _attend_rows(q, k, v, scaling, window, softcap)
        results.append(result.transpose(1, 2).flatten(0, 1))
    return torch.cat(results).index_select(0, sequences.back)[None]


def _attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Return causal attention of padded rows, `[rows, heads, longest, size]`."""
    longest = q.shape[2]
    is_plain = softcap is None and (window is None or longest <= window)
    hidden = None if is_plain else _hidden(longest, window, q.device)
    if softcap is not None and hidden is not None:
        return _capped(q, k, v, scaling, softcap, hidden)
    if q.is_cuda:
        # with fewer keys than queries, the kernels of older cards keep all scores
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if hidden is None else ~hidden,
        is_causal=is_plain,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _options(
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    **others: Any,
) -> tuple[float | None, int | None, float | None]:
    unknown = [name for name, value in others.items() if isinstance(value, torch.Tensor)]
    unknown += ["dropout"] * (dropout > 0) + ["is_causal=False"] * (is_causal is False)
    if unknown:
        raise UnknownAttentionError(f"its attention takes {', '.join(unknown)}")
    return scaling, sliding_window, softcap


def _hidden(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which keys a query does not see, `[length, length]`."""
    step = torch.arange(length, device=device)
    distance = step[:, None] - step
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    softcap: float,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Return attention whose scores stay within `softcap` (arXiv 2408.00118)."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap
    scores = scores.masked_fill(hidden, -torch.inf)
    return functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
