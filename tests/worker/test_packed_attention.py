"""Attention of ragged sequences equals the plain formula for each sequence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.llamas import example, items_of
from tinyllama_lab.core.engines.packed import attention
from tinyllama_lab.core.engines.packed.attention import Heads, attend, plan_attention
from tinyllama_lab.core.engines.packed.batch import WASTE, PackedBatch, lay_out, spans_of

pytestmark = pytest.mark.usefixtures("kind_of_cpu")

CPU = torch.device("cpu")
HEADS = [Heads(4, 2, 4), Heads(2, 2, 2), Heads(3, 1, 6)]
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def batch_of(lengths: list[int]) -> PackedBatch:
    return lay_out(items_of(None, [example(length) for length in lengths]), CPU)


def tables(longest: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines of rotary positions, in float64."""
    speeds = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(longest, dtype=torch.float64)[:, None] * speeds
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def plain(joint: torch.Tensor, lengths: list[int], heads: Heads) -> torch.Tensor:
    """Compute causal attention sequence by sequence and head by head."""
    cos, sin = tables(max(lengths), heads.size)
    rows, found = joint.view(len(joint), heads.all, heads.size), []
    for sequence in rows.split(lengths):
        count, answers = len(sequence), []
        ahead = torch.arange(count) > torch.arange(count)[:, None]
        for head in range(heads.queries):
            group = heads.queries + head * heads.keys // heads.queries
            queries = turned(sequence[:, head], cos[:count], sin[:count])
            keys = turned(sequence[:, group], cos[:count], sin[:count])
            scores = (queries @ keys.T / math.sqrt(heads.size)).masked_fill(ahead, -math.inf)
            answers.append(scores.softmax(dim=-1) @ sequence[:, group + heads.keys])
        found.append(torch.stack(answers, dim=1))
    return torch.cat(found).view(len(joint), -1)


def joint_of(lengths: list[int], heads: Heads) -> torch.Tensor:
    draw = torch.Generator().manual_seed(len(lengths))
    shape = (sum(lengths), heads.all * heads.size)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def compare(lengths: list[int], heads: Heads) -> None:
    """Compare the values and gradients of both."""
    joint, same = (joint_of(lengths, heads).requires_grad_() for _ in range(2))
    plan = plan_attention(batch_of(lengths), heads, *tables(max(lengths) + 3, heads.size))
    found, expected = attend(joint, plan), plain(same, lengths, heads)
    # softmax is in float32 whatever comes in
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(joint.grad, same.grad, rtol=1e-5, atol=1e-5)


@given(LENGTHS, st.sampled_from(HEADS))
@settings(max_examples=25, deadline=None)
def test_ragged_sequences_attend_as_each_would_alone(lengths: list[int], heads: Heads) -> None:
    compare(lengths, heads)


@pytest.mark.parametrize("heads", HEADS)
def test_the_branch_of_long_sequences_gives_the_same(
    heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LONGEST_PLAIN", 6)
    compare([13, 2, 7, 12, 6, 1], heads)


@given(LENGTHS)
@settings(deadline=None)
def test_every_token_goes_to_one_place_and_back(lengths: list[int]) -> None:
    rotary = tables(max(lengths), 2)
    plan = plan_attention(batch_of(lengths), Heads(2, 1, 2), *rotary)
    source = torch.randn(sum(lengths), 6, dtype=torch.float64)
    found = torch.full_like(source, math.nan)
    for bucket in plan.buckets:
        heads = bucket.take(source, 2, rotary, 1)
        assert heads.shape == (len(bucket.spans[0]), 3, bucket.longest, 2)
        assert heads.isfinite().all()
        bucket.put(heads, found, rotary, -1)
    torch.testing.assert_close(found, source)


@given(LENGTHS)
def test_buckets_are_a_partition_that_wastes_little(lengths: list[int]) -> None:
    buckets = batch_of(lengths).buckets()
    numbers = [number for bucket in buckets for number in bucket.sequences]
    assert sorted(numbers) == list(range(len(lengths)))
    for bucket in buckets:
        own = [lengths[number] for number in bucket.sequences]
        assert bucket.longest == max(own) <= WASTE * min(own)


def test_very_different_lengths_make_several_buckets_and_similar_ones_one() -> None:
    assert len(batch_of([8, 64, 512]).buckets()) == 3
    assert len(batch_of([100, 90, 81]).buckets()) == 1


@given(LENGTHS)
def test_a_layout_keeps_every_token_and_label(lengths: list[int]) -> None:
    chosen = [example(length, number) for number, length in enumerate(lengths)]
    batch = lay_out(items_of(None, chosen), CPU)
    assert batch.ids.tolist() == [token for one in chosen for token in one.ids]
    assert (batch.spans, batch.dropout_keys) == ([], None)
    expected = [
        (number, start + at - 1, one.ids[at])
        for number, (start, one) in enumerate(zip(batch.starts, chosen, strict=True))
        for at in range(1, len(one.ids))
        if one.loss_mask[at]
    ]
    triples = zip(
        batch.owners.tolist(), batch.label_at.tolist(), batch.targets.tolist(), strict=True
    )
    assert list(triples) == expected


def test_sequences_of_one_adapter_are_one_span_and_the_base_has_none() -> None:
    a, b = (object(), object())
    order: list[object | None] = [None, a, a, b, None, b]
    spans = spans_of(order, [2, 3, 4, 1, 5, 6])  # type: ignore[arg-type]
    assert [(span.adapter, span.begin, span.end) for span in spans] == [
        (a, 2, 9),
        (b, 9, 10),
        (b, 15, 21),
    ]
