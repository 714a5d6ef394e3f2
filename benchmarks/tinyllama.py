"""A model of TinyLlama-1.1B's shape with random weights, to measure speed and memory only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from benchmarks.job import RANDOM_TINYLLAMA
from tinyllama_lab.core.models import tiny
from tinyllama_lab.data.cache import made_once


def folder() -> Path:
    """Return the model folder, which is made once for each user."""
    return made_once(RANDOM_TINYLLAMA, _make)


def architecture() -> LlamaConfig:
    """Return the configuration of TinyLlama-1.1B."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def _make(target: Path) -> None:
    # with random weights any tokenizer will do, and this one needs no download
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder(), local_files_only=True)
    config = architecture()
    config.bos_token_id = None
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    _fill(model)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Fill all weights with repetitions of one random block.

    Random values for every weight would take three times the time and the memory.
    """
    draw = torch.Generator().manual_seed(0)
    block = torch.empty(2**24 + 15).normal_(0, 0.02, generator=draw).bfloat16()
    position = 0  # in the block; it goes on, so that no two matrices are equal
    for parameter in model.parameters():
        if parameter.dim() == 1:  # a norm
            parameter.fill_(1.0)
            continue
        weights = parameter.view(-1)
        while len(weights):
            piece = block[position : position + len(weights)]
            weights[: len(piece)].copy_(piece)
            weights, position = weights[len(piece) :], (position + len(piece)) % len(block)
