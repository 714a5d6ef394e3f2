"""Padded batches and the loss on their labels, through transformers' own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from tinyllama_lab.core.dataset.dataset import Example
from tinyllama_lab.core.engines.base import A, WorkItem

# Architectures whose logits are the output embedding of the last hidden state and nothing else,
# so that the head may be evaluated at chosen positions. Others (soft caps, logit scales) pay for
# every position.
PLAIN_HEADS = {"llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2"}


@dataclass
class Batch:
    """Examples padded on the right; a causal model never looks at what stands behind it."""

    ids: torch.Tensor  # [batch, seq]
    rows: torch.Tensor  # [labels] the example of each label
    positions: torch.Tensor  # [labels] where its prediction is made
    targets: torch.Tensor  # [labels]
    tokens: int  # real ones, without padding


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """Pad to the longest and list the positions that predict a label."""
    longest = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), longest), pad_id)
    loss_mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        loss_mask[row, : len(example.ids)] = torch.tensor(example.loss_mask)
    rows, positions = torch.nonzero(loss_mask[:, 1:], as_tuple=True)
    batch = Batch(
        ids, rows, positions, ids[rows, positions + 1], sum(len(e.ids) for e in examples)
    )
    for name in ("ids", "rows", "positions", "targets"):
        setattr(batch, name, getattr(batch, name).to(device, non_blocking=True))
    return batch


def label_losses(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Cross entropy of every label, `[labels]` in float32."""
    if model.config.model_type in PLAIN_HEADS:
        backbone = getattr(model, model.base_model_prefix)
        hidden = backbone(input_ids=batch.ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[batch.rows, batch.positions])
    else:
        logits = model(input_ids=batch.ids, use_cache=False).logits[batch.rows, batch.positions]
    return functional.cross_entropy(logits.float(), batch.targets, reduction="none")


def micro_batches(items: Sequence[WorkItem[A]], max_tokens: int) -> list[list[WorkItem[A]]]:
    """Cut work into pieces of similar length with at most `max_tokens` padded tokens each.

    One example is never cut, so a piece of a single long one may be larger.
    """
    pieces: list[list[WorkItem[A]]] = []
    for item in sorted(items, key=lambda i: len(i.example.ids), reverse=True):
        # sorted by length: the first of a piece is its longest and sets the padded width
        if pieces and len(pieces[-1][0].example.ids) * (len(pieces[-1]) + 1) <= max_tokens:
            pieces[-1].append(item)
        else:
            pieces.append([item])
    return pieces
