"""Generates tokens for many adapters together, with a key and value cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch.nn import functional

from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed.adapter import PackedAdapter
from tinyllama_lab.core.engines.packed.attention import attend, plan_attention
from tinyllama_lab.core.engines.packed.batch import PackedBatch, lay_out, spans_of
from tinyllama_lab.core.engines.packed.elementwise import rotated
from tinyllama_lab.core.engines.packed.llama import FrozenLlama
from tinyllama_lab.core.engines.sampling import Chooser, TokenSampling

COMPACT_BELOW = 0.75  # share of unfinished rows below which the finished ones are dropped


class _DecodingRows:
    """The unfinished completions, one row each, and their key and value caches."""

    def __init__(
        self, llama: FrozenLlama, items: Sequence[WorkItem[PackedAdapter]], tokens: int
    ) -> None:
        heads, device = llama.heads, llama.device
        self.numbers = list(range(len(items)))  # which item a row belongs to
        self.adapters = [item.adapter for item in items]
        lengths = [len(item.example.prompt_ids) for item in items]
        self.cache_lengths = torch.tensor(lengths, device=device)  # [rows] positions in use
        self.longest = max(lengths)
        # at full length from the start: growing it would copy the cache for every token
        shape = (len(items), heads.keys, self.longest + tokens, heads.size)
        self.keys = [torch.zeros(shape, dtype=llama.dtype, device=device) for _ in llama.layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only `rows`."""
        self.numbers = [self.numbers[row] for row in rows]
        self.adapters = [self.adapters[row] for row in rows]
        index = torch.tensor(rows, device=self.cache_lengths.device)
        self.cache_lengths = self.cache_lengths[index]
        for layer in range(len(self.keys)):  # one at a time: both copies of all do not fit
            self.keys[layer] = self.keys[layer].index_select(0, index)
            self.values[layer] = self.values[layer].index_select(0, index)


@torch.no_grad()
def decode(
    llama: FrozenLlama,
    items: Sequence[WorkItem[PackedAdapter]],
    tokens: int,
    ends: Collection[int],
    sampling: TokenSampling | None = None,
    on_token: Callable[[], None] | None = None,
) -> list[list[int]]:
    """Return up to `tokens` new token ids for every item's prompt, until a token in `ends`.

    Items are sorted by adapter. The ids include the end token, if it was generated.
    """
    completions: list[list[int]] = [[] for _ in items]
    rows = _DecodingRows(llama, items, tokens)
    choose = Chooser(sampling, [item.example for item in items], tokens)
    logits = _read_prompts(llama, items, rows)
    for count in range(1, tokens + 1):
        next_ids = choose(logits, rows.numbers, count - 1)
        chosen_ids = next_ids.tolist()
        if on_token:
            on_token()
        alive = []
        for row, token in enumerate(chosen_ids):
            completion = completions[rows.numbers[row]]
            if not completion or completion[-1] not in ends:
                completion.append(token)
                if token not in ends:
                    alive.append(row)
        if not alive or count == tokens:
            break
        # Dropping rows copies the cache, so a few finished ones stay; their tokens are ignored.
        if len(alive) < COMPACT_BELOW * len(chosen_ids):
            rows.keep(alive)
            next_ids = next_ids[torch.tensor(alive, device=next_ids.device)]
        logits = _decode_step(llama, next_ids, rows)
    return completions


def _read_prompts(
    llama: FrozenLlama, items: Sequence[WorkItem[PackedAdapter]], rows: _DecodingRows
) -> torch.Tensor:
    """Fill the cache; return the logits of every first new token, `[rows, vocabulary]`."""
    batch = lay_out(items, llama.device, prompts=True)
    plan = plan_attention(batch, llama.heads, *llama.rotary(max(batch.lengths)))
    h = llama.embed(batch.ids)
    rows_of = [
        torch.tensor(bucket.sequences).to(h.device, non_blocking=True) for bucket in plan.buckets
    ]

    def keep(layer: int, bucket: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        at = rows_of[bucket]
        # after a shorter prompt there is padding, masked until new tokens overwrite it
        rows.keys[layer][at, :, : keys.shape[2]] = keys
        rows.values[layer][at, :, : keys.shape[2]] = values

    for number, layer in enumerate(llama.layers):
        h = layer(h, batch, partial(attend, plan=plan, keep=partial(keep, number)))
    last = torch.tensor([s + n - 1 for s, n in zip(batch.starts, batch.lengths, strict=True)])
    return llama.logits(h[last.to(h.device, non_blocking=True)])


def _decode_step(llama: FrozenLlama, ids: torch.Tensor, rows: _DecodingRows) -> torch.Tensor:
    """Read the new tokens `ids [rows]`; return the next logits, `[rows, vocabulary]`."""
    no_labels = torch.empty(0, dtype=torch.long)
    lengths = [1] * len(ids)
    spans = spans_of(rows.adapters, lengths)
    batch = PackedBatch(ids, lengths, spans, no_labels, no_labels, no_labels)
    cos, sin = llama.rotary(rows.longest + 1)
    rotary = cos[rows.cache_lengths, None], sin[rows.cache_lengths, None]  # [rows, 1, size]
    # rows have caches of different lengths in tensors of one length
    visible = torch.arange(rows.longest + 1, device=ids.device) <= rows.cache_lengths[:, None]
    h = llama.embed(ids)
    for number, layer in enumerate(llama.layers):
        h = layer(h, batch, partial(_attend_one, llama, rows, number, rotary, visible))
    rows.cache_lengths = rows.cache_lengths + 1
    rows.longest += 1
    return llama.logits(h)


def _attend_one(
    llama: FrozenLlama,
    rows: _DecodingRows,
    layer: int,
    rotary: tuple[torch.Tensor, torch.Tensor],
    visible: torch.Tensor,
    joint: torch.Tensor,
) -> torch.Tensor:
    """Attend from one new token of every row to its cache; return `[rows, queries * size]`."""
    heads, count = llama.heads, len(joint)
    parts = joint.view(count, heads.all, heads.size)
    queries = rotated(parts[:, : heads.queries], *rotary)
    keys = rotated(parts[:, heads.queries : heads.queries + heads.keys], *rotary)
    row_numbers = torch.arange(count, device=joint.device)
    rows.keys[layer][row_numbers, :, rows.cache_lengths] = keys
    rows.values[layer][row_numbers, :, rows.cache_lengths] = parts[:, heads.queries + heads.keys :]
    longest = visible.shape[1]
    k, v = rows.keys[layer][:, :, :longest], rows.values[layer][:, :, :longest]
    q = queries.reshape(count, heads.keys, -1, heads.size)
    scores = (q @ k.transpose(2, 3)).mul_(1 / math.sqrt(heads.size))
    scores.masked_fill_(~visible[:, None, None], -math.inf)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).reshape(count, heads.queries * heads.size)
