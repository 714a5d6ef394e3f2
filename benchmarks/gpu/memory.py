"""Measured peaks of training against the planner's prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu.packs import Pack, Shape, rows, science_of
from benchmarks.gpu.throughput import context_of
from benchmarks.job import Adapter
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.training.memory import Planner


@dataclass(frozen=True)
class Peak:
    """The memory of one pack, in MiB."""

    name: str
    predicted_mib: float
    measured_mib: float
    reserved_mib: float

    def to_json(self) -> dict[str, Any]:
        """Return the peak as plain values."""
        return asdict(self)


def peaks(shape: Shape, device: str, quants: Sequence[str]) -> Iterator[Peak]:
    """Yield the peaks of packs on each kind of base."""
    eight = [Adapter(8, "attention_qv", 1e-4, seed) for seed in range(8)]
    sixteen = [Adapter(16, "all_linear", 1e-4, seed) for seed in range(16)]
    for quant in quants:
        yield _peak(shape, device, quant, eight, 1, 512, 512)
        yield _peak(shape, device, quant, eight, 1, 512, 512, checkpointing=True)
        if quant == "none":
            yield _peak(shape, device, quant, sixteen, 4, 256, None)


def _peak(
    shape: Shape,
    device: str,
    quant: str,
    adapters: Sequence[Adapter],
    batch_size: int,
    mean_tokens: int,
    max_tokens: int | None,
    checkpointing: bool = False,
) -> Peak:
    base = shape.base(device, "auto", quant)
    trials = [science_of(each, batch_size, 3) for each in adapters]
    examples = rows(16, mean_tokens, shape.vocabulary)
    engine = PackedEngine(base)
    context = context_of(base)
    tokens = max_tokens or context.micro_batch_tokens
    context.fitting_tokens = max(tokens, max(len(example.ids) for example in examples))
    context.memory.reset()
    planner = Planner(context, engine)
    sizes = [engine.adapter_mib(trial.lora) for trial in trials]
    pack = Pack(engine, base, trials, examples, context.micro_batch_tokens)
    try:
        longest = max(examples, key=lambda example: len(example.ids))
        planner.measure(pack.trainers[0].adapter, longest)
        if checkpointing:
            planner.recompute()
        batch = batch_size * len(adapters) * mean_tokens
        planner.predict(sizes, min(context.micro_batch_tokens, batch))
        pack.train(3)
    finally:
        pack.close()
    measured = context.memory.read("train")
    name = f"{quant}, {len(adapters)} x r={adapters[0].r} {adapters[0].targets}, "
    name += f"{context.micro_batch_tokens} tokens" + ", recomputed" * checkpointing
    predicted = planner.predicted()["memory/predicted_mib"]
    reserved = measured.get("memory/train_reserved_mib", 0.0)
    return Peak(name, predicted, measured["memory/train_peak_mib"], reserved)
