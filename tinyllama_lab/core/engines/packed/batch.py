"""Concatenates the sequences of several adapters: no padding, sorted by adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed.adapter import AdapterSpan, PackedAdapter
from tinyllama_lab.core.engines.packed.dropout import noise, row_keys
from tinyllama_lab.core.engines.packed.segments import HIGHEST_RANK, Segments

WASTE = 1.25  # longest sequence of a bucket, at most, as a multiple of its shortest


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length, by number, whose attention is one padded matmul."""

    sequences: tuple[int, ...]
    longest: int


@dataclass
class PackedBatch:
    """One micro-batch. Tokens of the bare base belong to no span."""

    ids: torch.Tensor  # [tokens]
    lengths: list[int]  # of every sequence
    spans: list[AdapterSpan]
    label_at: torch.Tensor  # [labels] the token whose prediction is scored
    targets: torch.Tensor  # [labels]
    owners: torch.Tensor  # [labels] the sequence of each label
    dropout_keys: torch.Tensor | None = None  # [tokens] where an adapter has dropout
    smoothing: torch.Tensor | None = None  # [labels] where a row is trained with smoothed labels
    noisy: Sequence[WorkItem[PackedAdapter]] = ()  # all items, if any has noise on its embeddings
    # where one kernel takes all adapters
    segments: Segments | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        adapters = [span.adapter for span in self.spans]
        rows = [a.row for a in adapters if a.row is not None and a.rank <= HIGHEST_RANK]
        # dropout masks differ from module to module, which the kernels do not know
        if rows and len(rows) == len(adapters) and self.dropout_keys is None:
            self.segments = Segments(self.spans, rows)

    def with_noise(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return embeddings `[tokens, size]` with the noise of the items that have some."""
        if not self.noisy:
            return embeddings
        return embeddings + noise(self.noisy, embeddings.shape[1]).to(embeddings)

    @property
    def starts(self) -> list[int]:
        """Return the first token of every sequence."""
        starts, end = [], 0
        for length in self.lengths:
            starts.append(end)
            end += length
        return starts

    def buckets(self) -> list[Bucket]:
        """Group sequences by similar length, so that attention needs little padding."""
        buckets: list[Bucket] = []
        for number in sorted(range(len(self.lengths)), key=lambda n: -self.lengths[n]):
            last = buckets[-1] if buckets else None
            if last and last.longest <= WASTE * self.lengths[number]:
                buckets[-1] = Bucket((*last.sequences, number), last.longest)
            else:
                buckets.append(Bucket((number,), self.lengths[number]))
        return buckets


def lay_out(
    items: Sequence[WorkItem[PackedAdapter]], device: torch.device, prompts: bool = False
) -> PackedBatch:
    """Return one batch of items, sorted by adapter; with `prompts`, of their prompts alone."""
    sequences = [item.example.prompt_ids if prompts else item.example.ids for item in items]
    ids: list[int] = []
    label_at: list[int] = []
    owners: list[int] = []
    for number, item in enumerate(items):
        start = len(ids)
        ids += sequences[number]
        loss_mask = [] if prompts else item.example.loss_mask
        # the prediction of token n is made at token n - 1; the first token has none
        predicting = [start + n - 1 for n, counts in enumerate(loss_mask) if counts and n]
        label_at += predicting
        owners += [number] * len(predicting)
    label_tokens = torch.tensor(label_at, dtype=torch.long)
    tokens = torch.tensor(ids)
    has_dropout = any(i.dropout_key and i.adapter and i.adapter.dropout for i in items)
    keys = row_keys(items) if has_dropout else None
    return PackedBatch(
        ids=tokens.to(device, non_blocking=True),
        lengths=[len(sequence) for sequence in sequences],
        spans=spans_of([item.adapter for item in items], [len(s) for s in sequences]),
        label_at=label_tokens.to(device, non_blocking=True),
        targets=tokens[label_tokens + 1].to(device, non_blocking=True),
        owners=torch.tensor(owners, dtype=torch.long).to(device, non_blocking=True),
        dropout_keys=None if keys is None else keys.to(device, non_blocking=True),
        smoothing=_smoothing_of(items, owners, device),
        noisy=items if any(item.noise for item in items) else (),
    )


def _smoothing_of(
    items: Sequence[WorkItem[PackedAdapter]], owners: Sequence[int], device: torch.device
) -> torch.Tensor | None:
    """Return the label smoothing of every label, `[labels]` in float32; None if there is none."""
    if not any(item.smoothing for item in items):
        return None
    values = torch.tensor([items[owner].smoothing for owner in owners])
    return values.to(device, non_blocking=True)


def spans_of(
    adapters: Sequence[PackedAdapter | None], lengths: Sequence[int]
) -> list[AdapterSpan]:
    """Return the spans of sequences sorted by adapter; the bare base has none."""
    spans: list[AdapterSpan] = []
    end = 0
    for adapter, length in zip(adapters, lengths, strict=True):
        begin, end = end, end + length
        if adapter is None:
            continue
        # one span for neighbouring sequences of an adapter, so that one matmul serves them
        if spans and spans[-1].adapter is adapter and spans[-1].end == begin:
            begin = spans.pop().begin
        spans.append(AdapterSpan(adapter, begin, end))
    return spans
