"""Stacks the adapters of a micro-batch, so that one grouped matmul takes all of them.

On GPUs a separate matmul for every adapter and module would cost more to launch than to
compute. `torch.nn.functional.grouped_mm` takes ragged groups of rows; it is fast from compute
capability 9.0 on. Adapters must share one layout, so ranks are padded with zeros, which stay
zero.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from tinyllama_lab.core.engines.packed.adapter import AdapterSpan


class Stack:
    """Weights and gradients `[adapters, size]` of the spans of one micro-batch."""

    def __init__(self, spans: list[AdapterSpan]) -> None:
        self._adapters = [span.adapter for span in spans]
        device = self._adapters[0].flat.device
        self.layout = self._adapters[0].layout
        # a copy, because a grouped matmul takes one tensor for all groups
        self._weights = torch.stack([adapter.compute_weights for adapter in self._adapters])
        # in float32, like the gradients of the adapters, to which `flush` adds them
        self._gradients = torch.zeros_like(self._weights, dtype=torch.float32)
        lengths = torch.tensor([span.end - span.begin for span in spans])
        scalings = torch.tensor([adapter.scaling for adapter in self._adapters])
        self._ends = lengths.cumsum(0).int().to(device, non_blocking=True)
        rows = scalings.to(self._weights.dtype).repeat_interleave(lengths)[:, None]
        self._scaling = rows.to(device, non_blocking=True)  # [tokens, 1]

    def forward(self, module: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Add `scaling * x @ A.T @ B.T` to `result`; return `scaling * x @ A.T`, `[tokens, r]`."""
        a, b = self.layout.matrices(self._weights, self.layout.offsets[module])
        h = self._grouped(x, a.transpose(1, 2)).mul_(self._scaling)
        result.add_(self._grouped(h, b.transpose(1, 2)))
        return h

    def backward(
        self, module: str, x: torch.Tensor, h: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        """Add to the gradients of A and B; return that of `x`, `[tokens, inputs]`."""
        offsets = self.layout.offsets[module]
        a, b = self.layout.matrices(self._weights, offsets)
        grad_a, grad_b = self.layout.matrices(self._gradients, offsets)
        grad_h = self._grouped(grad, b).mul_(self._scaling)
        grad_b.add_(self._grouped(grad.T, h))
        grad_a.add_(self._grouped(grad_h.T, x))
        return self._grouped(grad_h, a)

    def flush(self) -> None:
        """Add the stacked gradients to those of the adapters."""
        gradients = [adapter.gradients for adapter in self._adapters]
        parts: list[torch.Tensor] = [*self._gradients.unbind(0)]
        torch._foreach_add_(gradients, parts)

    def _grouped(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return functional.grouped_mm(left, right, offs=self._ends)


class Flush(torch.autograd.Function):
    """Identity at the start of forward, so its backward runs last, when gradients are complete."""

    @staticmethod
    def forward(ctx: object, source: torch.Tensor, stack: Stack) -> torch.Tensor:
        ctx.stack = stack  # type: ignore[attr-defined]
        return source.view_as(source)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[None, None]:
        ctx.stack.flush()  # type: ignore[attr-defined]
        return None, None
