"""The packed forward pass equals that of transformers in every block and loss."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tests.decoders import RELATIVES, decoder
from tests.llamas import (
    LINEAR,
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
)
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed import attention, head
from tinyllama_lab.core.engines.packed.batch import lay_out
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.packed.llama import why_not_llama

pytestmark = pytest.mark.usefixtures("kind_of_cpu")

CPU = torch.device("cpu")
RAGGED = (5, 17, 1, 9, 60, 18, 2, 1)
PACKS = {
    "ragged": RAGGED,
    "one": (23,),
    "one token": (1,),
    "alike": (12, 12, 11),
    "beyond 256": (300, 7, 290, 257, 256),
}


@torch.no_grad()
def blocks_of(model: PreTrainedModel, one: Example) -> list[torch.Tensor]:
    """Return the output of every block in transformers, each `[tokens, size]`."""
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda *given: seen.append(given[2][0]))
        for block in model.model.layers
    ]
    model(input_ids=torch.tensor([one.ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [hidden.reshape(len(one.ids), -1) for hidden in seen]


@torch.no_grad()
def packed_blocks(engine: PackedEngine, chosen: list[Example]) -> list[list[torch.Tensor]]:
    """Return the output of every block for every sequence in the packed pass."""
    batch = lay_out(items_of(None, chosen), CPU)
    whole, found = engine.model.layers, []
    for count in range(1, len(whole) + 1):
        engine.model.layers = whole[:count]
        found.append(list(engine.model.hidden(batch).split(batch.lengths)))
    engine.model.layers = whole
    return found


@torch.no_grad()
def loss_of(model: PreTrainedModel, one: Example) -> float:
    """Return the loss summed over the labels, from all logits, in float64."""
    logits = model(input_ids=torch.tensor([one.ids])).logits[0].double()
    logs = logits.log_softmax(dim=-1)
    where = [n for n in range(1, len(one.ids)) if one.loss_mask[n]]
    return -sum(float(logs[n - 1, one.ids[n]]) for n in where)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pack", PACKS)
def test_every_block_gives_what_transformers_gives(pack: str, shape: str) -> None:
    model, chosen = llama(**SHAPES[shape]), examples(PACKS[pack])
    expected = [blocks_of(model, one) for one in chosen]
    found = packed_blocks(PackedEngine(base_of(model)), chosen)
    for block, sequences in enumerate(found):
        for number, hidden in enumerate(sequences):
            assert apart(hidden, expected[number][block]) < 1e-5


@pytest.mark.parametrize("name", [*RELATIVES, "llama with biases"])
def test_every_block_of_a_relative_gives_what_transformers_gives(name: str) -> None:
    biased = {"attention_bias": True, "mlp_bias": True} if name == "llama with biases" else {}
    model, chosen = decoder(name, **biased), examples(PACKS["ragged"])
    expected = [blocks_of(model, one) for one in chosen]
    found = packed_blocks(PackedEngine(base_of(model)), chosen)
    for block, sequences in enumerate(found):
        for number, hidden in enumerate(sequences):
            assert apart(hidden, expected[number][block]) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_losses_are_those_of_one_sequence_at_a_time(shape: str) -> None:
    model, chosen = llama(**SHAPES[shape]), examples((*RAGGED, 270))
    expected = [loss_of(model, one) for one in chosen]
    engine = PackedEngine(base_of(model))
    found = engine.example_losses(items_of(None, chosen))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert found[2] == 0.0  # one token predicts nothing
    assert [loss_of(model, one) for one in chosen] == expected  # the weights are still its own


@torch.no_grad()
def test_neighbours_do_not_see_each_other() -> None:
    engine = PackedEngine(base_of(llama()))
    first, other, third = example(20), example(33), example(20, seed=3)
    alone = engine.example_losses(items_of(None, [first]))[0]
    for pack in ([first, other], [other, first], [third, first, third]):
        found = engine.example_losses(items_of(None, pack))[pack.index(first)]
        assert float(found) == pytest.approx(float(alone), rel=1e-6)


@torch.no_grad()
def test_the_base_in_a_pack_has_no_adapter() -> None:
    engine, chosen = PackedEngine(base_of(llama())), examples(RAGGED)
    bare = engine.example_losses(items_of(None, chosen))
    adapter = engine.add(settings(), 0)
    fresh = engine.example_losses(items_of(adapter, chosen))
    torch.testing.assert_close(fresh, bare, rtol=1e-6, atol=0.0)  # B is zero
    make_b_random(adapter)
    mixed: list[WorkItem[Any]] = [*items_of(None, chosen), *items_of(adapter, chosen)]
    found = engine.example_losses(mixed)
    torch.testing.assert_close(found[: len(chosen)], bare, rtol=1e-6, atol=0.0)
    changed = (found[len(chosen) :] - bare).abs() > 1e-3
    assert changed.tolist() == [one.labels > 0 for one in chosen]


def test_the_head_in_many_chunks_gives_the_same_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = 2**17  # two rows of logits are one MiB then

    def pass_of() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        weight = torch.randn(words, 4, generator=torch.Generator().manual_seed(1))
        losses = head.HeadLoss.apply(hidden, weight, torch.arange(7) * 1000, None)
        (losses * torch.linspace(0.1, 2, 7)).sum().backward()
        assert hidden.grad is not None
        return losses.detach(), hidden.grad

    whole = pass_of()
    monkeypatch.setattr(head, "CHUNK_MIB", 1)
    for found, expected in zip(pass_of(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ({"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "rotary positions are dynamic"),
    ],
)
def test_what_the_packed_pass_does_not_support_is_named(
    changes: dict[str, Any], reason: str
) -> None:
    assert reason in str(why_not_llama(llama(**changes)))


def test_only_llamas_and_their_relatives_have_this_pass() -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2))
    assert why_not_llama(other) == "its architecture is gpt2"
    assert why_not_llama(decoder("mistral")) == "its attention has a sliding window"
    for name in RELATIVES:
        assert why_not_llama(decoder(name)) is None
    assert all(why_not_llama(llama(**shape)) is None for shape in SHAPES.values())


def kept_and_gradients(recomputed: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Return how many queries of rows of 30 tokens the forward pass keeps, and the gradients."""
    engine = PackedEngine(base_of(llama()))
    engine.checkpoint_activations(recomputed)
    adapter = engine.add(settings(), 0)
    make_b_random(adapter)
    loss = engine.example_losses(items_of(adapter, examples((30, 12)))).sum()
    gc.collect()
    # Python knows nothing of saved tensors, so these are what something else holds
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    kept = sum(x.shape[1:] == (4, 30, 8) for x in tensors)
    loss.backward()
    return kept, gradients(adapter)


def test_recomputed_layers_keep_nothing_of_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONGEST_PLAIN", 8)
    monkeypatch.setattr(attention, "LONGEST_FUSED", 8)
    kept, found = kept_and_gradients(recomputed=True)
    assert not kept
    kept, expected = kept_and_gradients(recomputed=False)
    assert kept
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
