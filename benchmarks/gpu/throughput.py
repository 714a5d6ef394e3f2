"""Training tokens per second of packs, and of the fastest ways to train one adapter."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.flop_count import training_flops
from benchmarks.gpu.packs import Pack, Rounds, Shape, rows, science_of
from benchmarks.gpu.peft_loop import PeftLoop, by_length
from benchmarks.job import Adapter
from tinyllama_lab.config.schema import HardwareConfig
from tinyllama_lab.core.context import WorkerContext
from tinyllama_lab.core.engines.packed.engine import PackedEngine
from tinyllama_lab.core.meter import PeakMemory
from tinyllama_lab.core.models.loading import Base

MEAN_TOKENS = 256  # of a row
COUNTS = (16, 8, 4, 1)
SIZES = (4, 1, 16)  # rows of a step
WARM_UP = 3
LEAST_ROUNDS, LEAST_S = 5, 1.5
ROWS = 64
PEER_STEPS = 16


@dataclass(frozen=True)
class Point:
    """One measurement."""

    arm: str
    adapters: int
    tokens_per_step: float  # of one adapter
    tokens_per_s: float
    tflops: float  # per second, of the frozen base's matmuls; adapters do not count
    gemm_share: float  # of the rate that the same matmuls reach alone
    warm_up_s: float  # the first steps, with compiling
    peak_gib: float

    def to_json(self) -> dict[str, Any]:
        """Return the point as plain values."""
        return asdict(self)


def linear_shapes(base: Base) -> tuple[list[tuple[int, int, int]], int]:
    """Return output and input features of the blocks' linear layers, and the head's size."""
    model: Any = base.model
    block = model.model.layers[0]
    count = len(model.model.layers)
    modules = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
    shapes = [(m.out_features, m.in_features, count) for m in modules]
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
    )
    data: Any = None  # rows come from the benchmark
    memory = PeakMemory(base.device)
    return WorkerContext(base, data, hardware, memory, "gpu", lambda: False)


class Meter:
    """Turns seconds into points."""

    def __init__(self, base: Base, gemm_gflops: float) -> None:
        self._linears, self._head = linear_shapes(base)
        self._rate = gemm_gflops * 1e9

    def point(self, arm: str, count: int, rounds: Rounds, warm_up_s: float, steps: int) -> Point:
        """Return a point; `steps` are those of all adapters together."""
        flops = training_flops(self._linears, self._head, rounds.tokens, rounds.labels)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        rate = flops / sum(rounds.seconds)
        return Point(
            arm=arm,
            adapters=count,
            tokens_per_step=rounds.tokens / steps,
            tokens_per_s=rounds.tokens_per_s,
            tflops=rate / 1e12,
            gemm_share=rate / self._rate,
            warm_up_s=warm_up_s,
            peak_gib=peak,
        )


def ours(base: Base, vocabulary: int, meter: Meter, sizes: Sequence[int]) -> Iterator[Point]:
    """Yield packs of every number of adapters and rows of a step."""
    for batch_size in sizes:
        for count in COUNTS:
            yield pack_point(base, vocabulary, meter, batch_size, count)


def pack_point(
    base: Base, vocabulary: int, meter: Meter, batch_size: int, count: int, arm: str = "ours"
) -> Point:
    """Measure one pack of `count` adapters of r = 16 on all linear layers."""
    examples = rows(ROWS, MEAN_TOKENS, vocabulary)
    trials = [
        science_of(Adapter(16, "all_linear", 1e-4, seed), batch_size, 10_000)
        for seed in range(count)
    ]
    engine = PackedEngine(base)
    context = context_of(base)
    _reset()
    pack = Pack(engine, base, trials, examples, context.micro_batch_tokens)
    try:
        begin = time.perf_counter()
        pack.train(WARM_UP)
        warm_up_s = time.perf_counter() - begin
        done = pack.train(LEAST_ROUNDS)
        while sum(done.seconds) < LEAST_S:
            more = pack.train(LEAST_ROUNDS)
            done.tokens += more.tokens
            done.labels += more.labels
            done.seconds += more.seconds
        return meter.point(arm, count, done, warm_up_s, count * len(done.seconds))
    finally:
        pack.close()


def peers(shape: Shape, device: str, meter: Meter, sizes: Sequence[int]) -> Iterator[Point]:
    """Yield the ways to train one adapter: plain, and compiled with Liger's kernels."""
    yield from _variant(shape, device, meter, sizes, liger=False, compiled=False)
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    yield from _variant(shape, device, meter, sizes, liger=has_liger, compiled=True)


def _variant(
    shape: Shape, device: str, meter: Meter, sizes: Sequence[int], *, liger: bool, compiled: bool
) -> Iterator[Point]:
    base = shape.base(device, "auto")
    arm = "P3" + liger * " + Liger" + compiled * " + compile"
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=base.model, fused_linear_cross_entropy=True)
    for batch_size in sizes:
        examples = rows(ROWS, MEAN_TOKENS, shape.vocabulary)
        steps = by_length(examples, batch_size)
        # evenly over all lengths, and the same steps before them to warm up
        counted = steps[:: max(1, len(steps) // PEER_STEPS)]
        science = science_of(Adapter(16, "all_linear", 1e-4, 0), batch_size, 10_000)
        _reset()
        loop = PeftLoop(base, science, 10_000)
        if compiled:
            model: Any = base.model
            for layer in model.model.layers:
                layer.compile(dynamic=True)
        begin = time.perf_counter()
        loop.measure(counted[::4], len(counted))
        warm_up_s = time.perf_counter() - begin
        done = loop.measure(counted, 0)
        yield meter.point(arm, 1, done, warm_up_s, len(counted))
        loop.close()


def _reset() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
