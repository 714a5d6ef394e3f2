"""Measured peaks of training against the planner's prediction."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.packs import Extent, Pack, rows, science_of
from benchmarks.gpu.throughput import context_of
from benchmarks.job import Adapter
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.training.memory import Planner

STEPS = 3


@dataclass(frozen=True)
class Case:
    """A pack whose memory is measured."""

    quant: str
    adapters: int
    r: int
    targets: str
    batch_size: int
    one_row: bool = False  # in a micro-batch; else as many as the worker takes
    recomputed: bool = False

    @property
    def name(self) -> str:
        """What the tables call it."""
        text = (
            f"{self.adapters} of r = {self.r} on {self.targets}, {self.batch_size} rows per step"
        )
        text += ", row by row" * self.one_row + ", activations recomputed" * self.recomputed
        return f"{self.quant}: {text}"


CASES = (
    Case("nf4", 8, 8, "attention_qv", 1, one_row=True),
    Case("nf4", 8, 8, "attention_qv", 1, one_row=True, recomputed=True),
    Case("none", 8, 8, "attention_qv", 1, one_row=True),
    Case("none", 8, 8, "attention_qv", 1, one_row=True, recomputed=True),
    Case("none", 16, 16, "all_linear", 4),
)


@dataclass(frozen=True)
class Peak:
    """The memory of one pack, in MiB."""

    name: str
    tokens: int  # of the largest micro-batch
    predicted_mib: float
    measured_mib: float
    reserved_mib: float | None


def peak(case: Case, extent: Extent, device: str) -> Peak:
    """Train a pack as a worker does and return its peak."""
    base = extent.measured.base(device, "auto", case.quant)
    trials = [
        science_of(Adapter(case.r, case.targets, 1e-4, seed), case.batch_size, STEPS)
        for seed in range(case.adapters)
    ]
    row_tokens = 2 * extent.row_tokens if case.one_row else extent.row_tokens
    # of one length, so that a micro-batch of one row has as many tokens as is said
    examples = rows(8, row_tokens, extent.measured.vocabulary, spread=0.0)
    engine, context = PackedEngine(base), context_of(base)
    if case.one_row:
        context.fitting_tokens = row_tokens
    context.memory.reset()
    planner = Planner(context, engine)
    pack = Pack(engine, base, trials, examples, context.micro_batch_tokens)
    try:
        planner.measure(pack.trainers[0].adapter, examples[0])
        if case.recomputed:
            planner.recompute()
        tokens = min(context.micro_batch_tokens, case.batch_size * case.adapters * row_tokens)
        planner.predict([engine.adapter_mib(trial.lora) for trial in trials], [tokens])
        pack.train(STEPS)
    finally:
        pack.close()
    return Peak(
        name=case.name,
        tokens=tokens,
        predicted_mib=planner.predicted()["memory/predicted_mib"],
        measured_mib=context.memory.read("train")["memory/train_peak_mib"],
        reserved_mib=context.memory.read("train").get("memory/train_reserved_mib"),
    )
