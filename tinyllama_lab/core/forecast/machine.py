"""The memory and precision of this machine, or of a card that a plan is made for."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch

from tinyllama_lab.config.schema import CardConfig, HardwareConfig
from tinyllama_lab.core import resident
from tinyllama_lab.core.meter import SHARE, free_mib
from tinyllama_lab.core.models.loading import pick_device, pick_dtype
from tinyllama_lab.metrics import MIB

_GIB = 1024  # MiB
_ROWS, _REPEATS = 1024, 3  # of the matmuls that are timed


@dataclass(frozen=True)
class Machine:
    """Where the packs would run.

    Attributes:
        is_gpu: whether it is a CUDA GPU.
        dtype: what the base computes in with `train.precision=auto`.
        process_mib: memory of a worker before it loads a base.
        free_mib: memory that a worker may take in all, `process_mib` included.
        overhead_mib: memory beside what PyTorch allocates: the CUDA context.
        has_varlen: whether attention on this GPU keeps nothing but its input and output.
        total_mib: memory of the GPU, by which a worker chooses its micro-batches; 0 on a CPU.
    """

    is_gpu: bool
    dtype: torch.dtype
    process_mib: float
    free_mib: float
    overhead_mib: float
    has_varlen: bool
    total_mib: float = 0.0

    @property
    def device(self) -> torch.device:
        """Where the outline of a base lies: a GPU that is not here is the meta device."""
        return torch.device("meta" if self.is_gpu else "cpu")

    def dtype_of(self, precision: str) -> torch.dtype:
        """Return what a base computes in under this `train.precision`.

        Raises:
            ModelError: the machine cannot compute in it.
        """
        if precision == "auto":
            return self.dtype
        return pick_dtype(precision, torch.device("cuda" if self.is_gpu else "cpu"))


def machine_of(hardware: HardwareConfig) -> Machine:
    """Return the card of `hardware`, or this machine.

    Raises:
        ModelError: this machine lacks the device.
    """
    if hardware.card.name is not None:
        return _card(hardware.card, hardware.device)
    if hardware.threads is not None:  # as the worker does; measured speeds are kept for each
        torch.set_num_threads(hardware.threads)
    device = pick_device(hardware.device)
    dtype = pick_dtype("auto", device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        free, _ = torch.cuda.mem_get_info(device)
        varlen = torch.cuda.get_device_capability(device) >= (8, 0)
        # what is not free now holds the context of this process as well
        room, beside = SHARE * free / MIB, (total - free) / MIB
        return Machine(True, dtype, 0.0, room, beside, varlen, total / MIB)
    held = process_mib()
    workers = hardware.workers or 1
    # this process ends before a worker begins
    return Machine(False, dtype, held, (free_mib(device) + SHARE * held) / workers, 0.0, False)


def _card(card: CardConfig, device: str) -> Machine:
    is_gpu, bf16 = device == "cuda", bool(card.bf16)
    total, reserved = (_GIB * (gib or 0.0) for gib in (card.memory_gib, card.reserved_gib))
    half = torch.bfloat16 if bf16 else torch.float16 if is_gpu else torch.float32
    held = 0.0 if is_gpu else process_mib()
    overhead = reserved if is_gpu else 0.0
    room, varlen = SHARE * (total - reserved), is_gpu and bf16
    return Machine(is_gpu, half, held, room, overhead, varlen, total if is_gpu else 0.0)


def process_mib() -> float:
    """Return the resident memory of this process, which has imported what a worker does."""
    resident.give_back()  # as a worker does before it trains
    return psutil.Process().memory_info().rss / MIB


def gemm_gflops(width: int, inner: int, dtype: torch.dtype) -> float:
    """Return the rate of matmuls `[1024, width] @ [width, inner]` on this CPU, the best of three.

    The first call, which prepares the kernel, is not timed.
    """
    left = torch.ones(_ROWS, width, dtype=dtype)
    right = torch.ones(width, inner, dtype=dtype)
    seconds = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - begin)
    return 2e-9 * _ROWS * width * inner / min(seconds[1:])
