"""Elementwise steps on a GPU; each is one launch of a kernel in `triton_steps`."""

from __future__ import annotations

from typing import Any

import torch

from tinyllama_lab.core.engines.packed.segments import works_on

_BLOCK = 1024  # elements of a program


def can_run(*tensors: torch.Tensor) -> bool:
    """Return whether these kernels take the tensors: they are on a GPU that Triton supports."""
    return tensors[0].is_cuda and works_on(tensors[0].device, tensors[0].dtype)


def rms_norm(
    source: torch.Tensor, weight: torch.Tensor, eps: float, rstd: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of `source [rows, size]` and 1 / root mean square, `[rows, 1]`.

    `rstd` is accepted and computed again: that takes no time beside reading the row.
    """
    rows, size = source.shape
    result = torch.empty_like(source)
    rstd = source.new_empty(rows, 1, dtype=torch.float32)
    sizes = (size, eps)
    _launch("norm_forward", (rows,), source, weight, result, rstd, *sizes, SIZE=_power(size))
    return result, rstd


def rms_norm_backward(
    grad: torch.Tensor, source: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of `source`, `[rows, size]`."""
    rows, size = source.shape
    result = torch.empty_like(source)
    tensors = (grad.contiguous(), source, rstd, weight, result)
    _launch("norm_backward", (rows,), *tensors, size, SIZE=_power(size))
    return result


def swiglu(source: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up` of `source = [gate | up]`, `[rows, 2 * size]`."""
    rows, size = len(source), source.shape[1] // 2
    result = source.new_empty(rows, size)
    grid = (rows, -(-size // _BLOCK))
    _launch("swiglu_forward", grid, source, result, size, BLOCK=_BLOCK)
    return result


def swiglu_backward(grad: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `source`, `[rows, 2 * size]`."""
    rows, size = len(source), source.shape[1] // 2
    result = torch.empty_like(source)
    grid = (rows, -(-size // _BLOCK))
    _launch("swiglu_backward", grid, grad.contiguous(), source, result, size, BLOCK=_BLOCK)
    return result


def rotary(
    joint: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    rotated: int,
    backwards: bool = False,
) -> torch.Tensor:
    """Return `joint [rows, width]` with its first `rotated` columns turned by their positions.

    Args:
        joint: queries, keys and values of all heads, side by side.
        cos: `[positions, size of a head]`; and `sin` like it.
        positions: of every row, `[rows]` in int32.
        rotated: columns of the queries and the keys.
        backwards: turn in the other direction, which is the gradient.
    """
    rows, width = joint.shape
    result = torch.empty_like(joint)
    grid = (rows, -(-width // (2 * _BLOCK)))
    sizes = (rotated, width, -1.0 if backwards else 1.0)
    tensors = (joint, result, cos, sin, positions)
    _launch("rotary", grid, *tensors, *sizes, SIZE=cos.shape[1], BLOCK=_BLOCK)
    return result


def _launch(kernel: str, grid: tuple[int, ...], *arguments: Any, **sizes: int) -> None:
    from tinyllama_lab.core.engines.packed import triton_steps

    getattr(triton_steps, kernel)[grid](*arguments, **sizes, num_warps=4)


def _power(value: int) -> int:
    """Return the smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()
