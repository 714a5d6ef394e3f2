"""The loss on labels equals that of transformers, for any padding and micro-batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.llamas import apart, items_of
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.peft import collate, label_losses, micro_batches
from tinyllama_lab.core.models import parts

CPU = torch.device("cpu")
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.5,  # large logits, so that scales and caps matter
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
FAMILIES = ["llama", "qwen3", "gemma2", "granite"]


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    models = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    }
    return models[family]().eval()


def example(length: int, seed: int = 0) -> Example:
    """Return random tokens with a random mask that has at least one label."""
    draw = torch.Generator().manual_seed(1000 * length + seed)
    ids = torch.randint(2, 97, (length,), generator=draw).tolist()
    loss_mask = (torch.rand(length, generator=draw) < 0.5).tolist()
    return Example(tuple(ids), (*loss_mask[:-1], True), (), "", "", "")


def reference_loss(model: PreTrainedModel, one: Example) -> float:
    """Return the summed loss of one example, by transformers, alone and with all logits."""
    ids = torch.tensor([one.ids])
    labels = torch.where(torch.tensor([one.loss_mask]), ids, -100)
    return float(model(input_ids=ids, labels=labels).loss) * one.labels


EXAMPLES = [example(length) for length in (5, 17, 2, 9, 17, 12)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padded_batches_equal_transformers_one_by_one(family: str) -> None:
    model = make(family)
    batch = collate(EXAMPLES, 0, CPU)
    losses = label_losses(model, batch)
    sums = torch.zeros(len(EXAMPLES)).index_add_(0, batch.rows, losses).tolist()
    assert sums == pytest.approx([reference_loss(model, one) for one in EXAMPLES], rel=1e-6)
    assert losses.dtype == torch.float32 and len(losses) == sum(e.labels for e in EXAMPLES)
    assert batch.tokens == sum(len(e.ids) for e in EXAMPLES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_short_path_is_taken_only_by_plain_heads(family: str) -> None:
    model, batch, seen = make(family), collate(EXAMPLES, 0, CPU), []
    model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, output: seen.append(output.shape[:-1].numel())
    )
    label_losses(model, batch)
    plain = family in ("llama", "qwen3")
    assert seen == [len(batch.targets) if plain else batch.ids.numel()]


def test_head_at_labels_equals_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model = make("llama")
        losses = label_losses(model, collate(EXAMPLES, 0, CPU))
        losses.sum().backward()
        return losses, model.model.layers[0].self_attn.q_proj.weight.grad

    short = loss_and_gradient()
    monkeypatch.setattr(parts, "PLAIN_HEADS", set())
    for found, expected in zip(short, loss_and_gradient(), strict=True):
        assert apart(found, expected) < 1e-5  # of the largest: small ones are sums that cancel


@pytest.mark.parametrize("pad_id", [0, 1, 50])
@torch.no_grad()
def test_tokens_in_the_padding_do_not_count(pad_id: int) -> None:
    model = make("llama")
    wide = collate([EXAMPLES[0], example(40)], pad_id, CPU)
    alone = label_losses(model, collate([EXAMPLES[0]], 0, CPU))
    torch.testing.assert_close(label_losses(model, wide)[wide.rows == 0], alone)


def test_a_supervised_first_token_has_no_prediction() -> None:
    one = dataclasses.replace(EXAMPLES[0], loss_mask=(True,) * 5)
    batch = collate([one], 0, CPU)
    assert batch.positions.tolist() == [0, 1, 2, 3] and one.labels == 4
    assert batch.targets.tolist() == list(one.ids[1:])


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(LENGTHS, st.integers(1, 200))
def test_micro_batches_are_a_bounded_partition(lengths: list[int], limit: int) -> None:
    items = items_of(None, [example(length, seed) for seed, length in enumerate(lengths)])
    pieces = micro_batches(items, limit)
    assert sorted(id(item) for piece in pieces for item in piece) == sorted(map(id, items))
    for piece in pieces:
        padded = len(piece) * max(len(item.example.ids) for item in piece)
        assert piece and (padded <= limit or len(piece) == 1)


@given(LENGTHS)
def test_enough_room_gives_one_micro_batch(lengths: list[int]) -> None:
    items = items_of(None, [example(length) for length in lengths])
    assert len(micro_batches(items, 40 * len(lengths))) == 1
