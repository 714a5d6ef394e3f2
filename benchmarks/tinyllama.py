"""A model of TinyLlama-1.1B's shape with random weights, to measure speed and memory only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
