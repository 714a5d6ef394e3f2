"""Runs out of memory once, at one forward pass of a pack after the other.

The pack then goes on in smaller pieces. Its effective batch stays, and so do its losses: dropout
is 0, where nothing but rounding depends on the pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import configuration, cpu_hardware
from tests.faults.fault import Count, Draw, FaultClass
from tests.packs import QUIET, Lab, Wrapped, losses, quickly
from tinyllama_lab.config.schema import Science, part
from tinyllama_lab.core.dataset.dataset import DataCache
from tinyllama_lab.core.engines.base import WorkItem
from tinyllama_lab.core.models.loading import load_base
from tinyllama_lab.study.trial import State, TrialFolder

FAULTS = 50
RANKS = (2, 4, 8)
SETTINGS = {**QUIET, "train.deterministic": True, "train.max_steps": 6, "lora.dropout": 0.0}
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
)
TOLERANCE = 1e-6


class Once(Wrapped):
    """Runs out of memory at one forward pass, counted from 1."""

    number, passes = 0, 0
    error: Exception = ERRORS[0]

    def example_losses(self, items: Sequence[WorkItem[Any]]) -> torch.Tensor:
        self.passes += 1
        if self.passes == self.number:
            raise self.error
        return super().example_losses(items)


def new_lab(folder: Path) -> Lab:
    """Return what runs packs on the tiny base."""
    torch.set_num_threads(1)
    config = configuration()
    science: Science = part(Science, config)
    base = load_base(science.model, science.quant, "fp32", "cpu")
    return Lab(base, DataCache(base.tokenizer), configuration, cpu_hardware(), folder)


def run(lab: Lab, place: str, number: int, error: Exception) -> tuple[list[TrialFolder], int]:
    """Train and score a pack; return its trials and the number of forward passes."""
    engines: list[Once] = []

    def wrap(inside: Any) -> Any:
        engines.append(Once(inside))
        engines[-1].number, engines[-1].error = number, error
        return engines[-1]

    trials = [lab.trial({**SETTINGS, "lora.r": r}, place) for r in RANKS]
    lab.run(trials, lab.context(micro_batch_tokens=600), wrap)
    return trials, sum(engine.passes for engine in engines)


def memory(draw: Draw) -> Count:
    """Compare packs that ran out of memory with one that did not."""
    count = Count()
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        lab = new_lab(draw.folder)
        whole, passes = run(lab, "undisturbed", 0, ERRORS[0])
        for fault in range(draw.times(FAULTS)):
            number, error = fault % passes + 1, ERRORS[fault % len(ERRORS)]
            where = f"pass {number} of {passes}, {type(error).__name__}"
            _judge(count, where, whole, run(lab, f"fault{fault}", number, error)[0])
    torch.use_deterministic_algorithms(False)
    count.notes.append(f"losses of all steps and of scoring equal to {TOLERANCE:g}")
    return count


def _judge(
    count: Count, where: str, whole: Sequence[TrialFolder], trials: Sequence[TrialFolder]
) -> None:
    """Compare the losses of a pack with those of the undisturbed one."""
    wrong = []
    for ours, theirs in zip(trials, whole, strict=True):
        result, _ = ours.read_result()
        expected, _ = theirs.read_result()
        if result is None or expected is None or result.state is not State.DONE:
            wrong.append(f"{ours.name}: {result.error if result else 'lost'}")
            continue
        names = ("train/loss", "eval/loss")
        pairs = [*zip(losses(ours), losses(theirs), strict=True)]
        pairs += [(result.metrics[name], expected.metrics[name]) for name in names]
        off = max(abs(a - b) / abs(b) for a, b in pairs)
        if off > TOLERANCE:
            wrong.append(f"{ours.name}: losses differ by {off:.1e}")
        if result.data["train_rows_seen"] != expected.data["train_rows_seen"]:
            wrong.append(f"{ours.name}: another effective batch")
    if wrong:
        count.fail(f"{where}: {'; '.join(wrong)}")
    else:
        count.add("out of memory, done in smaller pieces")


MEMORY = FaultClass("memory", "out of memory at each forward pass of a pack", memory)
