"""Training tokens per second of packs, and of the usual ways to train one adapter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.flop_count import training_flops
from benchmarks.gpu.packs import Extent, Pack, Rounds, rows, science_of
from benchmarks.gpu.peft_loop import PeftLoop, by_length
from benchmarks.job import Adapter
from tinyllama_lab.config.schema import NO_CARD, HardwareConfig
from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.meter import PeakMemory
from tinyllama_lab.core.models.loading import Base

# Liger's kernels and torch.compile. Liger comes last, because it changes the modules of
# transformers, and so every model that the process loads after it.
PEERS = {
    "P3": (False, False),
    "P3 + compile": (False, True),
    "P3 + Liger": (True, False),
    "P3 + Liger + compile": (True, True),
}
_ENDLESS = 10_000  # steps, so that the learning rate hardly changes


@dataclass(frozen=True)
class Point:
    """One measurement of training."""

    arm: str
    adapters: int
    rows_per_step: int
    tokens_per_step: float  # of one adapter
    tokens_per_s: float
    tflops: float  # per second, of the frozen base's matmuls; adapters do not count
    gemm_share: float  # of the rate that the same matmuls reach alone
    warm_up_s: float  # the first steps, with compiling
    peak_gib: float | None  # what PyTorch allocated; None on a CPU


class Meter:
    """Turns seconds into points."""

    def __init__(self, base: Base, gemm_gflops: float) -> None:
        self._linears, self._head = linear_shapes(base)
        self._rate = gemm_gflops * 1e9

    def point(self, arm: str, count: int, size: int, rounds: Rounds, warm_up_s: float) -> Point:
        """Return the point of `count` adapters with `size` rows per step."""
        flops = training_flops(self._linears, self._head, rounds.tokens, rounds.labels)
        rate = flops / sum(rounds.seconds)
        on_gpu = torch.cuda.is_available()
        return Point(
            arm=arm,
            adapters=count,
            rows_per_step=size,
            tokens_per_step=rounds.tokens / rounds.steps,
            tokens_per_s=rounds.tokens_per_s,
            tflops=rate / 1e12,
            gemm_share=rate / self._rate,
            warm_up_s=warm_up_s,
            peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        )


def linear_shapes(base: Base) -> tuple[list[tuple[int, int, int]], int]:
    """Return output and input features of the blocks' linear layers, and the head's size."""
    model: Any = base.model
    layers = model.model.layers
    modules = [m for m in layers[0].modules() if hasattr(m, "in_features")]
    shapes = [(m.out_features, m.in_features, len(layers)) for m in modules]
    return shapes, int(model.get_output_embeddings().weight.numel())


def context_of(base: Base) -> WorkerContext:
    """Return the context of a worker, for its limit of tokens in a micro-batch."""
    hardware = HardwareConfig(
        device=base.device.type,
        workers=1,
        gpus=None,
        threads=None,
        micro_batch_tokens=None,
        gradient_checkpointing=False,
        keep_dequantized=False,
        checkpoint_every_s=600.0,
        max_attempts=1,
        silence_s=60.0,
        card=NO_CARD,
    )
    data: Any = None  # rows come from the benchmark
    memory = PeakMemory(base.device)
    return WorkerContext(base, data, hardware, memory, "gpu", lambda: False)


def pack(base: Base, extent: Extent, size: int, count: int) -> Pack:
    """Return a pack of `count` adapters of r = 16 on all linear layers."""
    examples = rows(extent.rows, extent.row_tokens, extent.measured.vocabulary)
    trials = [
        science_of(Adapter(16, "all_linear", 1e-4, seed), size, _ENDLESS) for seed in range(count)
    ]
    tokens = context_of(base).micro_batch_tokens
    return Pack(PackedEngine(base), base, trials, examples, tokens)


def ours(base: Base, extent: Extent, meter: Meter, size: int, count: int) -> Point:
    """Measure one pack."""
    _reset()
    packed = pack(base, extent, size, count)
    try:
        begin = time.perf_counter()
        packed.train(extent.warm_up)
        warm_up_s = time.perf_counter() - begin
        rounds = packed.train(extent.least_rounds)
        while sum(rounds.seconds) < extent.least_s:
            rounds.add(packed.train(extent.least_rounds))
        return meter.point("ours", count, size, rounds, warm_up_s)
    finally:
        packed.close()


def peer_base(extent: Extent, device: str, arm: str) -> Base:
    """Load a base for a peer, with Liger's kernels if the arm has them."""
    base = extent.measured.base(device, "auto")
    if PEERS[arm][0]:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=base.model, fused_linear_cross_entropy=True)
    return base


def peer(base: Base, extent: Extent, meter: Meter, arm: str, size: int) -> Point:
    """Measure one adapter with PEFT."""
    examples = rows(extent.rows, extent.row_tokens, extent.measured.vocabulary)
    steps = by_length(examples, size)
    # evenly over all lengths, and as many steps as of every other size
    counted = steps[:: max(1, len(steps) // extent.peer_steps)]
    counted *= max(1, extent.peer_steps // len(counted))
    _reset()
    loop = PeftLoop(base, science_of(Adapter(16, "all_linear", 1e-4, 0), size, _ENDLESS), _ENDLESS)
    try:
        if PEERS[arm][1]:
            _compile(base)
        begin = time.perf_counter()
        loop.measure([*counted[::4], steps[-1]])  # the longest too, so that memory is allocated
        warm_up_s = time.perf_counter() - begin
        return meter.point(arm, 1, size, loop.measure(counted), warm_up_s)
    finally:
        loop.close()


def _compile(base: Base) -> None:
    """Compile every block: all share their code, so this is the fastest way to compile."""
    model: Any = base.model
    blocks: Sequence[Any] = model.model.layers
    for block in blocks:
        block.compile(dynamic=True)


def _reset() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
