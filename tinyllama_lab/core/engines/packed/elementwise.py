"""Elementwise steps before a frozen linear layer, recomputed in backward instead of saved.

Each has `forward(source) -> (x, saved)`, `recompute(source, saved) -> x` and
`backward(grad, source, saved) -> grad of source`. On CUDA the functions are compiled, to launch
fewer kernels. On CPUs the fused loops of `kernels.py` replace them, where there are any.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn import functional

from tinyllama_lab.core.engines.packed import kernels


class Step(Protocol):
    """The elementwise step of a linear layer before its matmul."""

    def forward(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]: ...

    def recompute(self, source: torch.Tensor, saved: torch.Tensor | None) -> torch.Tensor: ...

    def backward(
        self, grad: torch.Tensor, source: torch.Tensor, saved: torch.Tensor | None
    ) -> torch.Tensor: ...


def fused_on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function on CUDA, where launching a kernel per operation costs the most time."""
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not args[0].is_cuda:
            return function(*args)
        if not compiled:
            # not at import: it takes seconds; dynamic, because token counts vary
            compiled.append(torch.compile(function, dynamic=True))
        return compiled[0](*args)

    return call


class Plain:
    """No step: the matmul takes the input unchanged."""

    def forward(self, source: torch.Tensor) -> tuple[torch.Tensor, None]:
        return source, None

    def recompute(self, source: torch.Tensor, saved: torch.Tensor | None) -> torch.Tensor:
        return source

    def backward(
        self, grad: torch.Tensor, source: torch.Tensor, saved: torch.Tensor | None
    ) -> torch.Tensor:
        return grad


class RmsNorm:
    """Root mean square layer norm (arXiv 1910.07467), rounded as Llama's in transformers."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def forward(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if kernels.can_run(source, self._weight):
            return kernels.rms_norm(source, self._weight, self._eps)
        rstd = _rstd(source, self._eps)
        return _scaled(source, rstd, self._weight), rstd

    def recompute(self, source: torch.Tensor, saved: torch.Tensor | None) -> torch.Tensor:
        if kernels.can_run(source, self._weight):
            return kernels.rms_norm(source, self._weight, self._eps, saved)[0]
        return _scaled(source, saved, self._weight)

    def backward(
        self, grad: torch.Tensor, source: torch.Tensor, saved: torch.Tensor | None
    ) -> torch.Tensor:
        if saved is not None and kernels.can_run(grad, source, self._weight):
            return kernels.rms_norm_backward(grad, source, self._weight, saved)
        return _norm_backward(grad, source, saved, self._weight)


class SwiGlu:
    """`silu(gate) * up` (arXiv 2002.05202) of `source = [gate | up]`."""

    def forward(self, source: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.recompute(source, None), None

    def recompute(self, source: torch.Tensor, saved: torch.Tensor | None) -> torch.Tensor:
        return kernels.swiglu(source) if kernels.can_run(source) else _swiglu(source)

    def backward(
        self, grad: torch.Tensor, source: torch.Tensor, saved: torch.Tensor | None
    ) -> torch.Tensor:
        if kernels.can_run(grad, source):
            return kernels.swiglu_backward(grad, source)
        return _swiglu_joined(grad, source) if source.is_cuda else _swiglu_backward(grad, source)


@fused_on_cuda
def _rstd(source: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / root mean square of every row, `[tokens, 1]` in float32."""
    # squares are summed in float32: in half precision they overflow or lose small terms
    norm = torch.linalg.vector_norm(source, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(source.shape[-1]).add_(eps).rsqrt_()


@fused_on_cuda
def _scaled(source: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (source * rstd).to(source.dtype).mul_(weight)


@fused_on_cuda
def _norm_backward(
    grad: torch.Tensor, source: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    # With dy = grad * weight and y = x * rstd: dx = rstd * dy - x * rstd^3 * mean(dy * x).
    scaled = (grad * weight).float()
    x = source.float()
    mean = torch.linalg.vecdot(scaled, x).unsqueeze(-1) / source.shape[-1]
    return scaled.mul_(rstd).addcmul_(x, mean * rstd**3, value=-1).to(source.dtype)


@fused_on_cuda
def _swiglu(source: torch.Tensor) -> torch.Tensor:
    gate, up = source.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


@fused_on_cuda
def _swiglu_joined(grad: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    gate, up = source.chunk(2, dim=-1)
    # y = silu(gate) * up, so d gate = grad * up * silu'(gate) and d up = grad * silu(gate)
    for_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([for_gate, functional.silu(gate) * grad], dim=-1)


def _swiglu_backward(grad: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Like `_swiglu_joined`, but writes in place: in eager mode `cat` would copy everything."""
    gate, up = source.chunk(2, dim=-1)
    result = torch.empty_like(source)
    for_gate, for_up = result.chunk(2, dim=-1)
    torch.mul(functional.silu(gate), grad, out=for_up)
    torch.ops.aten.silu_backward(grad * up, gate, grad_input=for_gate)
    return result


@fused_on_cuda
def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions (arXiv 2104.09864) to `x [..., size]`, paired as in transformers."""
    first, second = x.chunk(2, dim=-1)
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
