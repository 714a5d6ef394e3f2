"""Frozen weights for matmuls: modules with one input joined, 4-bit weights dequantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class FrozenWeight:
    """The weights of modules that share their input, as one matrix `[outputs, inputs]`.

    Weights are joined once, and the model's own modules become views of the result, so this takes
    no additional memory. 4-bit weights (QLoRA, arXiv 2305.14314) are dequantized at every use:
    in one call, if no quantization block would span two modules. With `keep_dequantized` this
    happens once, which takes more memory and gives the same numbers.
    """

    def __init__(
        self,
        modules: Sequence[nn.Linear | Conv1D],
        dtype: torch.dtype,
        keep_dequantized: bool = False,
    ) -> None:
        self._modules = list(modules)
        self._dtype = dtype
        self.inputs = _sizes(modules[0])[1]
        self.outputs = [_sizes(module)[0] for module in modules]
        self._packed_4bit: torch.Tensor | None = None
        self._dense: torch.Tensor | None = None
        if not self.is_quantized:
            self._dense = _side_by_side(modules)
        elif keep_dequantized:
            self._dense = self._dequantized()
        elif _end_with_a_block(modules):
            self._packed_4bit = _side_by_side(modules)
        # else: dequantized module by module, because a block would span two

    @property
    def is_quantized(self) -> bool:
        """Return whether the modules hold 4-bit weights."""
        return hasattr(self._modules[0].weight, "quant_state")

    def dense(self) -> torch.Tensor:
        """Return the matrix in the base's dtype."""
        return self._dequantized() if self._dense is None else self._dense

    def _dequantized(self) -> torch.Tensor:
        """Return the 4-bit weights as one dense matrix, in one call if they are joined."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        weights: list[Any] = [module.weight for module in self._modules]
        states = [weight.quant_state for weight in weights]
        if self._packed_4bit is None:
            parts = [dequantize_4bit(w.data, w.quant_state) for w in weights]
            return torch.cat(parts).to(self._dtype)
        first = states[0]
        joint = QuantState(
            # one state for all modules, so that one call dequantizes them together
            absmax=torch.cat([_scales(state) for state in states]),
            shape=torch.Size((sum(self.outputs), self.inputs)),
            code=first.code,
            blocksize=first.blocksize,
            quant_type=first.quant_type,
            dtype=first.dtype,
        )
        return dequantize_4bit(self._packed_4bit, joint).to(self._dtype)


def joint_bias(modules: Sequence[nn.Linear]) -> torch.Tensor | None:
    """Return the biases of modules that share their input, `[outputs]`; None if there are none."""
    if all(module.bias is None for module in modules):
        return None
    like = next(module.bias for module in modules if module.bias is not None)
    biases = [
        like.new_zeros(module.out_features) if module.bias is None else module.bias.detach()
        for module in modules
    ]
    return torch.cat(biases)


def _scales(state: Any) -> torch.Tensor:
    """Return the float32 scale of each 4-bit block; double quantization stores them in 8 bits."""
    from bitsandbytes.functional import dequantize_blockwise

    scales: torch.Tensor = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.float()


def _end_with_a_block(modules: Sequence[nn.Linear | Conv1D]) -> bool:
    """Return whether no quantization block would span two modules."""
    weights: list[Any] = [module.weight for module in modules]
    states = [weight.quant_state for weight in weights]
    return all(state.shape.numel() % state.blocksize == 0 for state in states)


def _sizes(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return the outputs and inputs of a linear layer."""
    if isinstance(module, Conv1D):  # GPT-2's, whose weight is `[inputs, outputs]`
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def _side_by_side(modules: Sequence[nn.Linear | Conv1D]) -> torch.Tensor:
    if len(modules) == 1:
        weight = modules[0].weight.data
        return weight.T if isinstance(modules[0], Conv1D) else weight
    matrix = torch.cat([module.weight.data for module in modules])
    sizes = [len(module.weight.data) for module in modules]
    for part, module in zip(matrix.split(sizes), modules, strict=True):
        # a view of the joint matrix, so that the weights are in memory once
        module.weight.data = part
    return matrix
