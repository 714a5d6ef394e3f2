"""A tiny random model of every architecture that the README names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.llamas import SIZES, base_of
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.packed.llama import FrozenLlama

# whose attention sees few tokens back, and stays within a cap
GEMMA: dict[str, Any] = {"head_dim": 8, "sliding_window": 40, "query_pre_attn_scalar": 8}
CALM = {"initializer_range": 0.1}  # where 0.2 makes float32 lose another digit in PEFT alone
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "mistral without a window": {"sliding_window": None},
    "qwen2": CALM,
    "qwen3": {"head_dim": 12},
    "gemma2": GEMMA | CALM,
    "gemma3_text": GEMMA,
    "smollm3": {},
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "stablelm": {"use_qkv_bias": True},
    "gpt_neox": {},
    "gpt2": {},
}
OTHERS = [name for name in DECODERS if name != "llama"]
# of which the packed engine has a forward pass of its own
RELATIVES = ("mistral without a window", "qwen2", "qwen3", "smollm3")
WAYS = [*((name, False) for name in OTHERS), *((name, True) for name in RELATIVES)]
_OF_GPT2 = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}


def decoder(name: str, **changes: Any) -> PreTrainedModel:
    """Frozen, in float32, the same each time, with norms and biases that do something."""
    settings = {**SIZES, **DECODERS.get(name, {}), **changes}
    if name in ("gpt2", "gpt_neox"):
        settings.pop("num_key_value_heads")
    if name == "gpt2":
        settings = {_OF_GPT2.get(key, key): value for key, value in settings.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name.partition(" ")[0], **settings)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, 0, 0.1)
            elif "norm" in key or "ln_" in key:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False).eval()


def packed_engine(model: PreTrainedModel, ours: bool, mixed: bool = True) -> PackedEngine:
    """With our own forward pass, or with that of transformers."""
    with pytest.MonkeyPatch.context() as patch:
        if not ours:
            place = "tinyllama_lab.core.engines.packed.engine.why_not_llama"
            patch.setattr(place, lambda model: "a test wants it")
        engine = PackedEngine(base_of(model), mixed=mixed)
    assert isinstance(engine.model, FrozenLlama) == ours
    return engine
