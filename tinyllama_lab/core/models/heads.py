"""Which models compute logits in a way that lets a loss be computed at labels alone."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

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
