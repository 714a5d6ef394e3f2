"""Whether losses on CUDA are those of the CPU and of PEFT, in every precision."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from typing import Any

import torch

from benchmarks.gpu.packs import Extent, Pack, rows, science_of
from benchmarks.gpu.peft_loop import PeftLoop, generated, mean_loss
from benchmarks.job import Adapter
from tinyllama_lab.config.schema import Science
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.engines.peft import PeftEngine
from tinyllama_lab.core.models.loading import Base

MIXED = (
    Adapter(4, "attention_qv", 3e-3, 1),
    Adapter(8, "all_linear", 1e-3, 2),
    Adapter(16, "mlp", 3e-3, 3),
    Adapter(3, "all_linear", 1e-3, 4),
)


@dataclass(frozen=True)
class Check:
    """One comparison: the largest relative difference, and what is allowed."""

    name: str
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        return self.difference <= self.allowed


class Reference:
    """What float32 on the CPU gives."""

    def __init__(self, extent: Extent, device: str) -> None:
        self.shape, self.device, self.steps = extent.checked, device, extent.steps
        self.examples = rows(24, extent.checked_tokens, self.shape.vocabulary)
        self.heldout = self.examples[:3]
        self.trials = [science_of(adapter, 4, self.steps) for adapter in MIXED]
        self.cpu = self.shape.base("cpu", "fp32")
        self.losses = packed_losses(self.cpu, self.trials, self)


def packed_losses(
    base: Base, trials: Sequence[Science], reference: Reference, **options: Any
) -> list[list[float]]:
    """Train the trials in one pack; return the losses of their steps and of held-out rows."""
    engine = PackedEngine(base, **options)
    return _trained(Pack(engine, base, trials, reference.examples, 2048), reference)


def _trained(pack: Pack, reference: Reference) -> list[list[float]]:
    try:
        pack.train(reference.steps)
        heldout = pack.scores(reference.heldout)
        return [a + b for a, b in zip(pack.losses(), heldout, strict=True)]
    finally:
        pack.close()


def peft_losses(base: Base, trials: Sequence[Science], reference: Reference) -> list[list[float]]:
    """Return the same losses of trials that PEFT and AdamW train one after the other."""
    losses = []
    for trial in trials:
        loop = PeftLoop(base, trial, reference.steps)
        steps = loop.losses(reference.examples)
        losses.append(steps + [mean_loss(base, row) for row in reference.heldout])
        loop.close()
    return losses


def difference(losses: list[list[float]], expected: list[list[float]]) -> float:
    """Return the largest relative difference; infinity if any loss is not finite."""
    pairs = [
        (a, b)
        for left, right in zip(losses, expected, strict=True)
        for a, b in zip(left, right, strict=True)
    ]
    return max(abs(a - b) / abs(b) if isfinite(a - b) else inf for a, b in pairs)


Checks = Callable[[Reference], Iterator[Check]]


def groups(device: str) -> dict[str, Checks]:
    """Return groups of comparisons that do not need each other, the most telling ones first."""
    wanted: dict[str, Checks] = {
        "fp32": _full_precision,
        "bf16": partial(_half, precision="bf16", allowed=2e-2),
        "deterministic": _deterministic,
    }
    if device == "cuda":
        wanted["fp16"] = partial(_half, precision="fp16", allowed=5e-3)
    if importlib.util.find_spec("bitsandbytes"):
        wanted |= {"nf4": _nf4, "int8": _int8}
    return wanted


def _full_precision(reference: Reference) -> Iterator[Check]:
    base = reference.shape.base(reference.device, "fp32")
    losses = packed_losses(base, reference.trials, reference)
    # 12 steps at high learning rates amplify the other order of sums
    yield Check("fp32 packed, to fp32 on the CPU", difference(losses, reference.losses), 5e-5)
    expected = peft_losses(base, reference.trials, reference)
    yield Check("fp32 packed, to PEFT and AdamW", difference(losses, expected), 5e-5)
    yield from _inference(reference, base)


def _inference(reference: Reference, base: Base) -> Iterator[Check]:
    pair, engine = reference.examples[:2], PackedEngine(base)
    items: Any = [WorkItem(None, example) for example in pair]
    with torch.no_grad():
        sums = engine.example_losses(items).tolist()
    means = [[total / row.labels] for total, row in zip(sums, pair, strict=True)]
    plain = [[mean_loss(base, row)] for row in pair]
    yield Check("fp32 scores of the base, to transformers", difference(means, plain), 1e-5)
    ours = engine.generate(items, 24, stop=False)
    wrong = sum(
        a != b
        for completion, example in zip(ours, pair, strict=True)
        for a, b in zip(completion, generated(base, example, 24), strict=True)
    )
    yield Check("fp32 greedy tokens that differ from transformers", wrong, 0)


def _half(reference: Reference, precision: str, allowed: float) -> Iterator[Check]:
    base = reference.shape.base(reference.device, precision)
    together = packed_losses(base, reference.trials, reference)
    yield Check(
        f"{precision} packed, to fp32 on the CPU", difference(together, reference.losses), allowed
    )
    alone = [packed_losses(base, [trial], reference)[0] for trial in reference.trials]
    yield Check(f"{precision} packed, to alone", difference(together, alone), allowed)
    expected = peft_losses(base, reference.trials, reference)
    yield Check(f"{precision} packed, to PEFT and AdamW", difference(together, expected), allowed)
    if reference.device == "cuda":
        plain = packed_losses(base, reference.trials, reference, triton=False)
        yield Check(f"{precision} kernels, to matmuls", difference(together, plain), allowed)


def _deterministic(reference: Reference) -> Iterator[Check]:
    base = reference.shape.base(reference.device, "bf16")

    def run(trials: Sequence[Science]) -> list[list[float]]:
        return packed_losses(base, trials, reference, mixed=False)

    torch.use_deterministic_algorithms(True)
    try:
        together = run(reference.trials)
        alone = [run([trial])[0] for trial in reference.trials]
    finally:
        torch.use_deterministic_algorithms(False)
    yield Check("bf16 deterministic, packed to alone", difference(together, alone), 0.0)


def _nf4(reference: Reference) -> Iterator[Check]:
    base = reference.shape.base(reference.device, "bf16", "nf4")
    expected = peft_losses(base, reference.trials, reference)
    losses = packed_losses(base, reference.trials, reference)
    yield Check("nf4 packed, to PEFT and AdamW", difference(losses, expected), 2e-2)
    kept = packed_losses(base, reference.trials, reference, keep_dequantized=True)
    yield Check("nf4, to a kept dequantized copy", difference(kept, losses), 2e-3)


def _int8(reference: Reference) -> Iterator[Check]:
    base = reference.shape.base(reference.device, "bf16", "int8")
    expected = peft_losses(base, reference.trials, reference)
    losses = [
        _trained(Pack(PeftEngine(base), base, [trial], reference.examples, 2048), reference)[0]
        for trial in reference.trials
    ]
    yield Check("int8, to PEFT and AdamW", difference(losses, expected), 2e-2)
