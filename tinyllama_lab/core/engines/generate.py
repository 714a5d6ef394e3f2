"""Generation by transformers, with its cache, for engines that run its forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.sampling import Chooser, TokenSampling
from tinyllama_lab.core.models.loading import Base

ROWS = 32  # decoded together; they keep a small device busy


def cache_bytes(base: Base, positions: int) -> int:
    """Return the bytes of the keys and values of so many positions, in all layers."""
    config: Any = base.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    values = 2 * config.num_hidden_layers * heads * head_size(config) * positions
    return int(values * base.dtype.itemsize)


def head_size(config: Any) -> int:
    """Return the width of an attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def inner_size(config: Any) -> int:
    """Return the width inside the MLP; GPT-2 leaves it out."""
    return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)


class _DrawnToken(LogitsProcessor):
    """Masks all tokens except the drawn one, so that greedy search takes it."""

    def __init__(self, choose: Chooser, prompt: int) -> None:
        self._choose, self._prompt = choose, prompt

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        drawn = self._choose(scores, range(len(scores)), input_ids.shape[1] - self._prompt)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)


class _TokenCallback(StoppingCriteria):
    """Never stops generation; transformers calls it after every token."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._on_token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def generate(
    base: Base,
    examples: Sequence[Example],
    tokens: int,
    stop: bool,
    sampling: TokenSampling | None,
    on_token: Callable[[], None] | None,
) -> list[list[int]]:
    """Return the new token ids of every prompt; see `Engine.generate`.

    Prompts are padded on the left. Rows that ended are filled with padding.
    """
    base.model.eval()
    ids, attention_mask = _pad_left(base, examples)
    choose = Chooser(sampling, list(examples), tokens)
    transformers_generate: Any = base.model.generate
    output_ids = transformers_generate(
        input_ids=ids,
        attention_mask=attention_mask,
        max_new_tokens=tokens,
        min_new_tokens=None if stop else tokens,
        # also when sampling: `_DrawnToken` draws, so that no row depends on its batch
        do_sample=False,
        logits_processor=[_DrawnToken(choose, ids.shape[1])] if sampling else None,
        stopping_criteria=[_TokenCallback(on_token)] if on_token else None,
        pad_token_id=base.tokenizer.pad_token_id,
        eos_token_id=list(base.end_ids),
    )
    completions: list[list[int]] = output_ids[:, ids.shape[1] :].tolist()
    return completions


def _pad_left(base: Base, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(e.prompt_ids) for e in examples)
    ids = torch.full((len(examples), longest), int(base.tokenizer.pad_token_id))
    attention_mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        # padded on the left, so that every row continues at the same position
        ids[row, longest - len(example.prompt_ids) :] = torch.tensor(example.prompt_ids)
        attention_mask[row, longest - len(example.prompt_ids) :] = 1
    return ids.to(base.device), attention_mask.to(base.device)
