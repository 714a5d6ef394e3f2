"""The peer: one adapter at a time with PEFT and AdamW, in the usual way but without a trainer.

A trainer adds work of its own to every step. This loop is therefore at least as fast as one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu.packs import Rounds
from tinyllama_lab.config.schema import Science
from tinyllama_lab.core.dataset.example import Example
from tinyllama_lab.core.models import lora
from tinyllama_lab.core.models.loading import Base
from tinyllama_lab.core.training.step_schedule import batches, lr_factor


class PeftLoop:
    """One adapter on the base, through PEFT."""

    def __init__(self, base: Base, science: Science, steps: int) -> None:
        self.base, self.science, self.steps = base, science, steps
        self.model: Any = lora.attach(base.model, science.lora, science.seed)
        self.model.train()  # Liger's fused loss runs in training alone
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=science.train.lr, weight_decay=0.0, fused=True
        )
        device = base.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=base.dtype == torch.float16)

    def order(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Return the batches that the engine would train on, in order."""
        order = batches(len(examples), self.science.train, self.science.seed)
        return [[examples[row] for row in batch] for batch in order][: self.steps]

    def losses(self, examples: Sequence[Example]) -> list[float]:
        """Train; return the loss of every step."""
        return [float(self.step(batch, n)) for n, batch in enumerate(self.order(examples))]

    def measure(self, steps: Sequence[Sequence[Example]]) -> Rounds:
        """Train on batches of rows; the host waits for the GPU at the end alone."""
        done = Rounds()
        begin = time.perf_counter()
        loss = torch.zeros(())
        for number, batch in enumerate(steps):
            loss = self.step(batch, number)
            done.count(batch)
        loss.item()
        done.seconds.append(time.perf_counter() - begin)
        return done

    def step(self, batch: Sequence[Example], number: int) -> torch.Tensor:
        """Take one optimizer step; return its loss, which stays on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.science.train.lr * lr_factor(number, self.steps, self.science.train)
        loss = self._loss(batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _loss(self, batch: Sequence[Example]) -> torch.Tensor:
        longest = max(len(example.ids) for example in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(batch):
            size = len(example.ids)
            tokens = torch.tensor(example.ids)
            ids[row, :size], mask[row, :size] = tokens, 1
            labels[row, :size] = torch.where(torch.tensor(example.loss_mask), tokens, -100)
        labels[:, 0] = -100  # the first token has no prediction
        device = self.base.device
        ids, labels, mask = (x.to(device, non_blocking=True) for x in (ids, labels, mask))
        return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def close(self) -> None:
        """Take the adapter off the base."""
        lora.detach(self.model)


def by_length(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Return batches of similar length, which need the least padding."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]


def generated(base: Base, example: Example, tokens: int) -> list[int]:
    """Return greedy tokens by transformers."""
    ids = torch.tensor([example.prompt_ids], device=base.device)
    model: Any = base.model
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=[],
    )
    return [int(token) for token in out[0, ids.shape[1] :]]


def mean_loss(base: Base, example: Example) -> float:
    """Return the mean loss of a row by transformers, with the adapter that is on the base now."""
    ids = torch.tensor([example.ids], device=base.device)
    with torch.no_grad():
        model: Any = base.model
        logits = model(input_ids=ids).logits[0, :-1].float()
    mask = torch.tensor(example.loss_mask[1:], device=base.device)
    return float(functional.cross_entropy(logits[mask], ids[0, 1:][mask]))
