"""Parts of a decoder: embedding, blocks, states, and a head that can be computed at labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

# from the forward passes of transformers; any other architecture pays for more logits
PLAIN_HEADS = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "smollm3",
    "olmo2",
    "stablelm",
    "gpt_neox",
    "gpt2",
    "gemma3_text",
}


def has_plain_head(model: PreTrainedModel) -> bool:
    """Return whether logits are the last hidden state times a matrix, and nothing else.

    Others are scaled, capped, or have a bias.
    """
    head: Any = model.get_output_embeddings()
    is_capped = getattr(model.config, "final_logit_softcapping", None) is not None
    return model.config.model_type in PLAIN_HEADS and head.bias is None and not is_capped


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a decoder, whose activations backward can compute again.

    Transformers marks them in most architectures. In others, such as GPT-1 and CTRL, they are
    the longest list of modules of one class.
    """
    marked: list[nn.Module] = [
        each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)
    ]
    if marked:
        return marked
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    alike = [list(each) for each in lists if len({type(block) for block in each}) == 1]
    return max(alike, key=len, default=[])


def states_beside_attention(model: PreTrainedModel) -> str:
    """Return what carries something from token to token beside attention; empty if nothing."""
    config: Any = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ())}
    kinds -= {"full_attention", "sliding_attention"}
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        kinds = kinds or {"convolutions"}
    return ", ".join(sorted(kinds))


@contextmanager
def changed_embedding(
    embedding: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Let a model read other embeddings `[batch, seq, size]` meanwhile, as NEFTune does.

    Where gradients are wanted, autograd follows them, so that it runs the backward of frozen
    layers too.
    """

    def changed(module: nn.Module, inputs: Any, found: torch.Tensor) -> torch.Tensor:
        found = change(found)
        return found.requires_grad_() if torch.is_grad_enabled() else found

    hook = embedding.register_forward_hook(changed)
    try:
        yield
    finally:
        hook.remove()
