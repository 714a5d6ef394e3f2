"""Frozen weights as products need them: neighbours in one matrix, 4-bit ones made wide again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class FrozenWeight:
    """The weights of modules that share their input, as one matrix `[outputs, inputs]`.

    Dense weights are laid side by side once, and the model's own modules become views of that,
    so no memory is added. Weights of 4 bits (QLoRA, arXiv 2305.14314) are made wide at every
    use, or once where `resident`: the numbers are the same.
    """

    def __init__(
        self, modules: Sequence[nn.Linear], dtype: torch.dtype, resident: bool = False
    ) -> None:
        self._modules = list(modules)
        self._dtype = dtype
        self.outputs = [module.out_features for module in modules]
        self._dense: torch.Tensor | None = None
        if not self.is_quantized:
            self._dense = _side_by_side(modules)
        elif resident:
            self._dense = self._widened()

    @property
    def is_quantized(self) -> bool:
        """Whether the modules hold 4-bit weights."""
        return hasattr(self._modules[0].weight, "quant_state")

    def dense(self) -> torch.Tensor:
        """The matrix, in the dtype that the base computes in."""
        return self._widened() if self._dense is None else self._dense

    def _widened(self) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        inputs = self._modules[0].in_features
        device = self._modules[0].weight.device
        matrix = torch.empty(sum(self.outputs), inputs, dtype=self._dtype, device=device)
        for part, module in zip(matrix.split(self.outputs), self._modules, strict=True):
            weight: Any = module.weight
            part.copy_(dequantize_4bit(weight.data, weight.quant_state))
        return matrix


def _side_by_side(modules: Sequence[nn.Linear]) -> torch.Tensor:
    if len(modules) == 1:
        return modules[0].weight.data
    outputs = [module.out_features for module in modules]
    matrix = torch.cat([module.weight.data for module in modules])
    for part, module in zip(matrix.split(outputs), modules, strict=True):
        module.weight.data = part
    return matrix
