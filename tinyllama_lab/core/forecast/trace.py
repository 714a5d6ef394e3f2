"""Measures what a token keeps for backward, on a few layers of the real widths.

The engines' kernels for CPUs, and bitsandbytes' int8 layers, do not run on the meta device. So one
and two layers run on the CPU, with memory that nobody has filled: every layer keeps the same, and
the difference is what a layer keeps.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from tinyllama_lab.config.lora import LoraConfig
from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.core.engines.base import Engine, WorkItem
from tinyllama_lab.core.engines.packed.attention import LONGEST_KEPT
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.meter import kept_mib
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.models.outline import Outline
from tinyllama_lab.core.models.parts import has_plain_head

_VOCABULARY = 64  # of the traced layers where nothing of the vocabulary's size is kept


def kept_mib_per_token(
    outline: Outline, lora: LoraConfig, example: Example, packed: bool, is_gpu: bool
) -> float:
    """Return the MiB that a token of `example` keeps for backward, in all layers.

    Args:
        outline: the base.
        lora: the adapter.
        example: the row that the worker's planner would measure.
        packed: the engine is the packed one, else PEFT.
        is_gpu: the kernels for GPUs keep no attention probabilities, however short a row is.
    """
    tokens = len(example.ids)
    if is_gpu:
        # on a CPU, probabilities of rows of this length and more are not kept either
        tokens = max(tokens, LONGEST_KEPT + 1)
    labels = [n > tokens * (1 - example.labels / len(example.ids)) for n in range(tokens)]
    row = replace(example, ids=(0,) * tokens, loss_mask=tuple(labels), prompt_ids=())
    one, two = (_kept(outline, count, lora, row, packed) for count in (1, 2))
    layers = int(outline.model.config.num_hidden_layers)
    return (one + (layers - 1) * (two - one)) / tokens


def _kept(outline: Outline, layers: int, lora: LoraConfig, row: Example, packed: bool) -> float:
    # else probabilities of the whole vocabulary are kept
    in_chunks = packed and has_plain_head(outline.model)
    model = outline.some_layers(layers, _VOCABULARY if in_chunks else None)
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    base = Base(model, tokenizer, torch.device("cpu"), outline.dtype, 0)
    engine: Engine[Any] = PackedEngine(base) if packed else PeftEngine(base)
    adapter = engine.add(lora, 0)
    parameters = [*model.parameters(), *adapter.parameters]
    return kept_mib(lambda: engine.example_losses([WorkItem(adapter, row)]), parameters)
