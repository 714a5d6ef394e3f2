"""Gradients of many adapters in one pass equal those of PEFT for each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional

from tests.llamas import (
    SHAPES,
    apart,
    base_of,
    example,
    examples,
    gradients,
    items_of,
    llama,
    make_b_random,
    settings,
    worn,
)
from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import Adapter, WorkItem
from tinyllama_lab.core.engines.packed.adapter import PackedAdapter
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.models import lora
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.errors import ModelError

pytestmark = pytest.mark.usefixtures("kind_of_cpu")

MIXED = [
    settings(r=2, targets="attention_qv"),
    settings(r=8, targets="all_linear", variant="rslora"),
    settings(r=3, targets="mlp", alpha=9.0),
    settings(r=4, targets=["o_proj", "k_proj"], alpha=0.5),
]
LENGTHS = (5, 17, 1, 9, 40)
Named = dict[str, torch.Tensor]


def peft_gradients(
    base: Base, config: LoraConfig, adapter: Adapter, chosen: Sequence[Example]
) -> tuple[list[float], Named]:
    """Return the summed loss of every example, and the gradient of their sum, through PEFT."""
    losses = []
    with worn(base, config, adapter) as adapted:
        for one in chosen:
            logits = adapted(input_ids=torch.tensor([one.ids])).logits[0]
            where = [n for n in range(1, len(one.ids)) if one.loss_mask[n]]
            targets = torch.tensor([one.ids[n] for n in where], dtype=torch.long)
            predicted = logits[[n - 1 for n in where]]
            losses.append(functional.cross_entropy(predicted, targets, reduction="sum"))
        torch.stack(losses).sum().backward()
        found = {
            name.replace(".default", ""): parameter.grad.clone()
            for name, parameter in lora.trainable(adapted).items()
            if parameter.grad is not None
        }
    return torch.stack(losses).tolist(), found


def nonzero_adapters(engine: PackedEngine, configs: Sequence[LoraConfig]) -> list[PackedAdapter]:
    """Return adapters of which no matrix is zero."""
    adapters = [engine.add(config, seed) for seed, config in enumerate(configs)]
    for seed, adapter in enumerate(adapters):
        make_b_random(adapter, seed)
    return adapters


def same(found: Named, expected: Named, share: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    worst = {name: apart(found[name], expected[name]) for name in expected}
    assert max(worst.values()) < share, max(worst, key=lambda name: worst[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_of_a_mixed_pack_equal_those_of_peft(shape: str) -> None:
    base = base_of(llama(**SHAPES[shape]))
    engine = PackedEngine(base)
    adapters = nonzero_adapters(engine, MIXED)
    data = [examples([length + n for length in LENGTHS]) for n in range(len(MIXED))]
    items: list[WorkItem[Any]] = [
        item for a, own in zip(adapters, data, strict=True) for item in items_of(a, own)
    ]
    losses = engine.example_losses(items)
    losses.sum().backward()
    for number, (config, adapter) in enumerate(zip(MIXED, adapters, strict=True)):
        expected, wanted = peft_gradients(base, config, adapter, data[number])
        own = losses[number * len(LENGTHS) : (number + 1) * len(LENGTHS)]
        assert own.tolist() == pytest.approx(expected, rel=1e-5)
        same(gradients(adapter), wanted)


def test_a_long_sequence_has_the_same_gradient() -> None:
    base = base_of(llama())
    engine = PackedEngine(base)
    (adapter,) = nonzero_adapters(engine, MIXED[1:2])
    chosen = [example(290), example(6)]
    engine.example_losses(items_of(adapter, chosen)).sum().backward()
    same(gradients(adapter), peft_gradients(base, MIXED[1], adapter, chosen)[1])


def gradient_in(engine: PackedEngine, items: list[WorkItem[Any]], tokens: int) -> list[Named]:
    """Return the gradient of the sum of all losses, in micro-batches of `tokens` tokens."""
    adapters = list(dict.fromkeys(item.adapter for item in items))
    for adapter in adapters:
        adapter.zero_grad()
    for piece in engine.micro_batches(items, tokens):
        engine.example_losses(piece).sum().backward()
    return [gradients(adapter) for adapter in adapters]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mixed", [True, False])
def test_the_gradient_does_not_depend_on_the_micro_batch(mixed: bool, dropout: float) -> None:
    configs = [settings(dropout=dropout), settings(r=2, targets="mlp", dropout=dropout / 2)]
    engine = PackedEngine(base_of(llama()), mixed=mixed)
    items: list[WorkItem[Any]] = [
        item
        for seed, adapter in enumerate(nonzero_adapters(engine, configs))
        for item in items_of(adapter, examples((30, 2, 9, 17, 9, 4)), seed, 1)
    ]
    whole = gradient_in(engine, items, 10**6)
    for tokens in (1, 20, 50):
        for found, expected in zip(gradient_in(engine, items, tokens), whole, strict=True):
            same(found, expected)


def test_recomputed_activations_give_the_same_gradient() -> None:
    configs = [settings(dropout=0.2), *MIXED]
    engine = PackedEngine(base_of(llama()))
    items: list[WorkItem[Any]] = [
        item
        for seed, adapter in enumerate(nonzero_adapters(engine, configs))
        for item in items_of(adapter, examples((30, 2, 9)), seed, 1)
    ]
    kept = gradient_in(engine, items, 10**6)
    engine.checkpoint_activations(True)
    for found, expected in zip(gradient_in(engine, items, 10**6), kept, strict=True):
        same(found, expected, 1e-6)


def test_an_adapter_of_nan_does_not_change_the_others() -> None:
    engine = PackedEngine(base_of(llama()))
    good, bad, last = nonzero_adapters(engine, MIXED[:3])
    chosen = examples(LENGTHS)
    quiet: list[WorkItem[Any]] = [*items_of(good, chosen), *items_of(last, chosen)]
    expected = gradient_in(engine, quiet, 10**6)
    with torch.no_grad():
        bad.flat.fill_(torch.nan)
    bad.updated()
    loud = [*items_of(good, chosen), *items_of(bad, chosen), *items_of(last, chosen)]
    found = gradient_in(engine, loud, 10**6)
    same(found[0], expected[0])
    same(found[2], expected[1])
    assert not torch.isfinite(next(iter(found[1].values()))).any()


def test_a_module_that_does_not_exist_does_not_affect_the_others() -> None:
    engine = PackedEngine(base_of(llama()))
    with pytest.raises(ModelError, match="got q_porj"):
        engine.add(settings(targets=["q_porj"]), 0)
    assert engine.add(settings(r=8), 0).rank == 8


def test_the_base_and_adapters_go_through_the_same_pass() -> None:
    engine = PackedEngine(base_of(llama()))
    chosen, adapters = examples(LENGTHS), nonzero_adapters(engine, MIXED)
    with torch.no_grad():
        alone = [engine.example_losses(items_of(a, chosen)).tolist() for a in (None, *adapters)]
    mixed: list[WorkItem[Any]] = [item for a in (None, *adapters) for item in items_of(a, chosen)]
    with torch.no_grad():
        found = engine.example_losses(mixed).tolist()
    assert found == pytest.approx([loss for own in alone for loss in own], rel=1e-5)


def test_the_base_gets_no_gradient_and_keeps_every_bit() -> None:
    base = base_of(llama())
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    engine = PackedEngine(base)
    adapters = nonzero_adapters(engine, MIXED)
    for adapter in adapters:
        engine.example_losses(items_of(adapter, examples(LENGTHS))).sum().backward()
        engine.remove(adapter)
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in base.model.parameters())


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(1, 120),
    st.booleans(),
)
@hypothesis_settings(deadline=None)
def test_micro_batches_are_a_bounded_partition(
    lengths: list[list[int]], limit: int, mixed: bool
) -> None:
    owners: list[Any] = [object() for _ in lengths]
    items: list[WorkItem[Any]] = [
        item
        for owner, own in zip(owners, lengths, strict=True)
        for item in items_of(owner, examples(own))
    ]
    pieces = ENGINES[mixed].micro_batches(items, limit)
    assert [item for piece in pieces for item in piece] == items  # in order, each once
    for piece in pieces:
        tokens = sum(len(item.example.ids) for item in piece)
        assert piece and (tokens <= limit or len(piece) == 1)
        assert mixed or len({id(item.adapter) for item in piece}) == 1


ENGINES = {mixed: PackedEngine(base_of(llama()), mixed=mixed) for mixed in (True, False)}
