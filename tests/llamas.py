"""Tiny Llamas of every shape, random examples, and adapters that already say something."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import Adapter, WorkItem
from tinyllama_lab.core.models import lora
from tinyllama_lab.core.models.loading import Base, count_parameters

CPU = torch.device("cpu")
WORDS = 97
SIZES: dict[str, Any] = dict(
    vocab_size=WORDS,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.2,  # attention that differs from place to place
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "as many keys as queries": {"num_key_value_heads": 4},
    "one key for all": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 12},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": LINEAR},
}


@dataclass
class Words:
    """What engines ask of a tokenizer."""

    eos_token_id: int = 1
    pad_token_id: int = 0


def llama(**changes: Any) -> PreTrainedModel:
    """Frozen, in float32, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES | changes))
        for name, parameter in model.named_parameters():
            if "norm" in name:  # those of a fresh model are all one
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False).eval()


def base_of(model: PreTrainedModel, tokenizer: Any = None) -> Base:
    """The model as what adapters are attached to."""
    words: Any = tokenizer or Words()
    return Base(model, words, CPU, torch.float32, count_parameters(model))


def example(length: int, seed: int = 0, prompt: int = 1, words: int = WORDS) -> Example:
    """Random tokens, about half of them supervised; the prompt is their beginning."""
    draw = torch.Generator().manual_seed(1000 * length + seed)
    ids = tuple(torch.randint(2, words, (length,), generator=draw).tolist())
    loss_mask = (torch.rand(length, generator=draw) < 0.5).tolist()
    return Example(ids, (*loss_mask[:-1], True), ids[:prompt], "", "", "")


def examples(lengths: Iterable[int]) -> list[Example]:
    """One of every length, no two alike."""
    return [example(length, number) for number, length in enumerate(lengths)]


def settings(**changes: Any) -> LoraConfig:
    """`lora.*` with plain values."""
    plain: dict[str, Any] = dict(
        r=4,
        alpha=None,
        dropout=0.0,
        targets="all_linear",
        layers="all",
        rank_pattern=None,
        init="default",
        variant="lora",
        bias="none",
        modules_to_save=[],
    )
    return LoraConfig(**plain | changes)


@torch.no_grad()
def make_b_random(adapter: Adapter, seed: int = 0, scale: float = 0.1) -> None:
    """Fill B, which is zero in a new adapter, with random values; equal names get equal values."""
    named = dict(sorted(adapter.named(adapter.parameters).items()))
    draw = torch.Generator().manual_seed(seed)
    for name, matrix in named.items():
        if ".lora_B." in name:
            named[name] = torch.randn(matrix.shape, generator=draw) * scale
    for parameter, value in zip(adapter.parameters, adapter.values(named), strict=True):
        parameter.copy_(value)
    adapter.updated()


def gradients(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Of every matrix, by name."""
    found = [parameter.grad for parameter in adapter.parameters]
    named = adapter.named([grad for grad in found if grad is not None])
    return {name: matrix.clone() for name, matrix in named.items()}


def items_of(adapter: Any, chosen: Sequence[Example], *dropout_key: int) -> list[WorkItem[Any]]:
    """Work under one adapter; dropout works where a key is given."""
    return [
        WorkItem(adapter, e, (*dropout_key, n) if dropout_key else ())
        for n, e in enumerate(chosen)
    ]


@contextmanager
def worn(base: Base, config: LoraConfig, adapter: Adapter) -> Iterator[peft.PeftModel]:
    """The base with an adapter's values in PEFT's own modules."""
    adapted = lora.attach(base.model, config, 0)
    try:
        peft.set_peft_model_state_dict(adapted, adapter.named(adapter.parameters))
        yield adapted
    finally:
        lora.detach(adapted)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number that was expected."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())
