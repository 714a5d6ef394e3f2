"""The rate of this machine in matrix products of the shapes of the model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benchmarks.flop_count import PER_PARAMETER

GEMM_ROWS = 1024
MEASURED_S = 0.25  # at least, for each product


def gemm_gflops(linears: Sequence[Sequence[int]], device: str) -> dict[str, float]:
    """Measure the GFLOP/s of the model's linear layers in float32 and bfloat16.

    The products are those of the forward pass and of the input's gradient. The fastest of several
    tries counts, because a rate that is too low would make the utilisation look too high.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {
        name: gemm_rate(linears, dtype, device, GEMM_ROWS, MEASURED_S)
        for name, dtype in dtypes.items()
    }


def gemm_rate(
    linears: Sequence[Sequence[int]], dtype: torch.dtype, device: str, rows: int, least_s: float
) -> float:
    """Measure the GFLOP/s of the model's linear layers in one dtype."""
    flops, seconds = 0.0, 0.0
    for out, into, count in linears:
        weight = torch.randn(out, into, device=device, dtype=dtype)
        inputs = torch.randn(rows, into, device=device, dtype=dtype)
        gradient = torch.randn(rows, out, device=device, dtype=dtype)
        pairs = ((inputs, weight.T), (gradient, weight))
        seconds += count * sum(_fastest(*pair, least_s) for pair in pairs)
        flops += count * PER_PARAMETER * rows * out * into
    return flops / seconds / 1e9


def _fastest(left: torch.Tensor, right: torch.Tensor, least_s: float) -> float:
    # a GPU's host would wait for every product, which takes longer than some of them
    together = 20 if left.is_cuda else 1
    times: list[float] = []
    while len(times) < 3 or sum(times) < least_s:
        _wait(left)
        begin = time.perf_counter()
        for _ in range(together):
            torch.mm(left, right)
        _wait(left)
        times.append(time.perf_counter() - begin)
    return min(times) / together


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
