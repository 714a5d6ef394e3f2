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


class Decoder:
    """Completions in progress, one row each, with their key and value caches.

    Rows join and leave between two steps.

    Attributes:
        items: what every row completes, sorted by adapter.
        logits: of the next token of every row, `[rows, vocabulary]`.
    """

    def __init__(self, llama: FrozenLlama) -> None:
        """Begin without rows."""
        heads = llama.heads
        self._llama = llama
        self.items: list[WorkItem[PackedAdapter]] = []
        self.logits = torch.empty(0, 0, device=llama.device)
        self._lengths: list[int] = []  # positions in use of every row
        self._rooms: list[int] = []  # positions that every row may come to use
        empty = torch.empty(0, heads.keys, 0, heads.size, dtype=llama.dtype, device=llama.device)
        self._keys = [empty for _ in llama.layers]  # [rows, heads, positions, size]
        self._values = [empty for _ in llama.layers]

    @torch.no_grad()
    def add(self, items: Sequence[WorkItem[PackedAdapter]], tokens: Sequence[int]) -> None:
        """Read the prompts of `items`, sorted by adapter, with room for `tokens` new ones."""
        first, lengths = len(self.items), [len(item.example.prompt_ids) for item in items]
        self._rooms += [length + new for length, new in zip(lengths, tokens, strict=True)]
        self._grow(len(items))
        logits = self._read_prompts(items, first)
        self.logits = torch.cat([self.logits, logits]) if first else logits
        self.items += items
        self._lengths += lengths
        if first:
            self._sort()

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> None:
        """Read the next tokens of all rows, `ids [rows]`."""
        llama = self._llama
        no_labels = torch.empty(0, dtype=torch.long)
        lengths = [1] * len(ids)
        spans = spans_of([item.adapter for item in self.items], lengths)
        batch = PackedBatch(ids, lengths, spans, no_labels, no_labels, no_labels)
        longest = max(self._lengths) + 1
        at = torch.tensor(self._lengths).to(ids.device, non_blocking=True)
        # [rows, 1, size], with and without rotation
        rotary = {
            rotates: tuple(table[at, None] for table in llama.rotary(longest, rotates))
            for rotates in llama.rotations
        }
        # rows have caches of different lengths in tensors of one length
        visible = torch.arange(longest, device=ids.device) <= at[:, None]
        h = llama.embed(ids)
        for number, layer in enumerate(llama.layers):
            of_layer = {
                rotates: partial(self._attend, number, at, tables, visible)
                for rotates, tables in rotary.items()
            }
            h = layer(h, batch, of_layer)
        self._lengths = [length + 1 for length in self._lengths]
        self.logits = llama.logits(h)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only `rows`, in this order."""
        self.items = [self.items[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        self._rooms = [self._rooms[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.long, device=self.logits.device)
        self.logits = self.logits[index]
        for layer in range(len(self._keys)):  # one at a time: both copies of all do not fit
            self._keys[layer] = self._keys[layer].index_select(0, index)
            self._values[layer] = self._values[layer].index_select(0, index)

    def _grow(self, rows: int) -> None:
        """Make room for more rows, at the length that the longest of all rows may come to."""
        # at full length from the start: growing it would copy the cache for every token
        positions = max(self._rooms)
        for caches in (self._keys, self._values):
            for layer, old in enumerate(caches):
                count, heads, before, size = old.shape
                caches[layer] = old.new_zeros(count + rows, heads, positions, size)
                # a row that left may have had more positions
                kept = min(before, positions)
                caches[layer][:count, :, :kept] = old[:, :, :kept]

    def _sort(self) -> None:
        """Sort the rows by adapter, so that one matmul serves all rows of an adapter."""
        first: dict[int, int] = {}
        for row, item in enumerate(self.items):
            first.setdefault(id(item.adapter), row)
        rows = sorted(range(len(self.items)), key=lambda row: first[id(self.items[row].adapter)])
        if rows != [*range(len(rows))]:
            self.keep(rows)

    def _read_prompts(
        self, items: Sequence[WorkItem[PackedAdapter]], first_row: int
    ) -> torch.Tensor:
        """Fill the cache; return the logits of every first new token, `[rows, vocabulary]`."""
        llama = self._llama
        batch = lay_out(items, llama.device, prompts=True)
        plans = {
            rotates: plan_attention(batch, llama.heads, *llama.rotary(max(batch.lengths), rotates))
            for rotates in llama.rotations
        }
        h = llama.embed(batch.ids)
        rows_of = [
            (torch.tensor(bucket.sequences) + first_row).to(h.device, non_blocking=True)
            for bucket in next(iter(plans.values())).buckets
        ]

        def keep(layer: int, bucket: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            at = rows_of[bucket]
            # after a shorter prompt there is padding, masked until new tokens overwrite it
            self._keys[layer][at, :, : keys.shape[2]] = keys
            self._values[layer][at, :, : keys.shape[2]] = values

        for number, layer in enumerate(llama.layers):
            of_layer = {
                rotates: partial(attend, plan=plan, keep=partial(keep, number))
                for rotates, plan in plans.items()
            }
            h = layer(h, batch, of_layer)
        last = torch.tensor([s + n - 1 for s, n in zip(batch.starts, batch.lengths, strict=True)])
        return llama.logits(h[last.to(h.device, non_blocking=True)])

    def _attend(
        self,
        layer: int,
        at: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
        visible: torch.Tensor,
        joint: torch.Tensor,
    ) -> torch.Tensor:
        """Attend from one new token of every row to its cache.

        Args:
            layer: number of the layer.
            at: positions of the new tokens, `[rows]`.
            rotary: their cosines and sines, `[rows, 1, size]`.
            visible: which positions they attend to, `[rows, positions]`.
            joint: their queries, keys and values, `[rows, heads * size]`.

        Returns:
            `[rows, queries * size]`.
        """
        heads, count = self._llama.heads, len(joint)
        parts = joint.view(count, heads.all, heads.size)
        queries = rotated(parts[:, : heads.queries], *rotary)
        keys = rotated(parts[:, heads.queries : heads.queries + heads.keys], *rotary)
        rows = torch.arange(count, device=joint.device)
        self._keys[layer][rows, :, at] = keys
        self._values[layer][rows, :, at] = parts[:, heads.queries + heads.keys :]
        longest = visible.shape[1]
        k, v = self._keys[layer][:, :, :longest], self._values[layer][:, :, :longest]
        q = queries.reshape(count, heads.keys, -1, heads.size)
        scores = (q @ k.transpose(2, 3)).mul_(1 / math.sqrt(heads.size))
        scores.masked_fill_(~visible[:, None, None], -math.inf)
        weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return (weights @ v).reshape(count, heads.queries * heads.size)


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
    decoder, numbers = Decoder(llama), list(range(len(items)))  # which item a row belongs to
    choose = Chooser(sampling, [item.example for item in items], tokens)
    decoder.add(items, [tokens] * len(items))
    for count in range(1, tokens + 1):
        next_ids = choose(decoder.logits, numbers, count - 1)
        chosen_ids = next_ids.tolist()
        if on_token:
            on_token()
        alive = []
        for row, token in enumerate(chosen_ids):
            completion = completions[numbers[row]]
            if not completion or completion[-1] not in ends:
                completion.append(token)
                if token not in ends:
                    alive.append(row)
        if not alive or count == tokens:
            break
        # Dropping rows copies the cache, so a few finished ones stay; their tokens are ignored.
        if len(alive) < COMPACT_BELOW * len(chosen_ids):
            decoder.keep(alive)
            numbers = [numbers[row] for row in alive]
            next_ids = next_ids[torch.tensor(alive, device=next_ids.device)]
        decoder.step(next_ids)
    return completions
