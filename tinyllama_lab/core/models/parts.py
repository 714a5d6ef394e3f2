"""Parts of a decoder: its blocks, and whether its head lets a loss be computed at labels alone."""

from __future__ import annotations

from typing import Any

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
