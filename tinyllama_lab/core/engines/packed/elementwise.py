"""Elementwise steps before a frozen linear layer, recomputed in backward instead of saved.

Each has `forward(source) -> (x, saved)`, `recompute(source, saved) -> x` and
`backward(grad, source, saved) -> grad of source`. On a GPU each is one Triton kernel
(`fused_gpu.py`), on CPUs one fused loop where there is a compiler (`fused_cpu.py`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional

from tinyllama_lab.core.engines.packed import fused_cpu, fused_gpu


class Step(Protocol):
    """The elementwise step of a linear layer before its matmul."""

    def forward(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]: ...

    def recompute(self, source: torch.Tensor, saved: torch.Tensor | None) -> torch.Tensor: ...

    def backward(
        self, grad: torch.Tensor, source: torch.Tensor, saved: torch.Tensor | None
    ) -> torch.Tensor: ...


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
        if loops := _loops(source, self._weight):
            return loops.rms_norm(source, self._weight, self._eps)
        rstd = _rstd(source, self._eps)
        return _scaled(source, rstd, self._weight), rstd

    def recompute(self, source: torch.Tensor, saved: torch.Tensor | None) -> torch.Tensor:
        if loops := _loops(source, self._weight):
            return loops.rms_norm(source, self._weight, self._eps, saved)[0]
        assert saved is not None  # `forward` returns it
        return _scaled(source, saved, self._weight)

    def backward(
        self, grad: torch.Tensor, source: torch.Tensor, saved: torch.Tensor | None
    ) -> torch.Tensor:
        assert saved is not None  # `forward` returns it
        if loops := _loops(grad, source, self._weight):
            return loops.rms_norm_backward(grad, source, self._weight, saved)
        return _norm_backward(grad, source, saved, self._weight)


class NormAlone(torch.autograd.Function):
    """A norm that no `PackedLinear` follows."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        source = source.contiguous()  # the loops read row after row
        x, rstd = norm.forward(source)
        ctx.norm = norm
        ctx.save_for_backward(source, rstd)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.norm.backward(grad.contiguous(), *ctx.saved_tensors), None


class SwiGlu:
    """`silu(gate) * up` (arXiv 2002.05202) of `source = [gate | up]`."""

    def forward(self, source: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.recompute(source, None), None

    def recompute(self, source: torch.Tensor, saved: torch.Tensor | None) -> torch.Tensor:
        loops = _loops(source)
        return loops.swiglu(source) if loops else _swiglu(source)

    def backward(
        self, grad: torch.Tensor, source: torch.Tensor, saved: torch.Tensor | None
    ) -> torch.Tensor:
        if loops := _loops(grad, source):
            return loops.swiglu_backward(grad, source)
        return _swiglu_backward(grad, source)


def _loops(*tensors: torch.Tensor) -> Any | None:
    """Return the module of fused loops that takes these tensors, or None."""
    return next((module for module in (fused_gpu, fused_cpu) if module.can_run(*tensors)), None)


def _rstd(source: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / root mean square of every row, `[tokens, 1]` in float32."""
    # squares are summed in float32: in half precision they overflow or lose small terms
    norm = torch.linalg.vector_norm(source, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(source.shape[-1]).add_(eps).rsqrt_()


def _scaled(source: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (source * rstd).to(source.dtype).mul_(weight)


def _norm_backward(
    grad: torch.Tensor, source: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    # With dy = grad * weight and y = x * rstd: dx = rstd * dy - x * rstd^3 * mean(dy * x).
    scaled = (grad * weight).float()
    x = source.float()
    mean = torch.linalg.vecdot(scaled, x).unsqueeze(-1) / source.shape[-1]
    return scaled.mul_(rstd).addcmul_(x, mean * rstd**3, value=-1).to(source.dtype)


def _swiglu(source: torch.Tensor) -> torch.Tensor:
    gate, up = source.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _swiglu_backward(grad: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    gate, up = source.chunk(2, dim=-1)
    # y = silu(gate) * up, so d gate = grad * up * silu'(gate) and d up = grad * silu(gate)
    result = torch.empty_like(source)
    for_gate, for_up = result.chunk(2, dim=-1)
    torch.mul(functional.silu(gate), grad, out=for_up)
    torch.ops.aten.silu_backward(grad * up, gate, grad_input=for_gate)
    return result


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions (arXiv 2104.09864) to `x [..., size]`, paired as in transformers."""
    first, second = x.chunk(2, dim=-1)
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
