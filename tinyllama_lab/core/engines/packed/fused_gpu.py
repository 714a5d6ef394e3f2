"""Elementwise steps on a GPU; each is one launch of a kernel in `triton_steps`."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from tinyllama_lab.core.engines.packed.adapter import AdapterSpan, table_row
from tinyllama_lab.core.engines.packed.layout import Layout
from tinyllama_lab.core.engines.packed.segments import (
    HIGHEST_RANK,
    ModuleColumns,
    Segments,
    next_power_of_two,
)
from tinyllama_lab.core.models.lora import LowRank

logger = logging.getLogger(__name__)

_BLOCK = 1024  # elements of a program
_TOLERANCE = 0.02  # a few roundings to bfloat16
# of two adapters in one launch: common small ones, an odd one, and the highest
_CHECKED_RANKS = ((8, 16), (8, 33), (HIGHEST_RANK, 64))
_MODULES_OF = ("first", "second"), ("second",)  # each of the two adapters
_WIDTHS = {"first": 32, "second": 16}  # outputs of the modules
_NUMBERS = {"first": 0, "second": 1}


def can_run(*tensors: torch.Tensor) -> bool:
    """Return whether these kernels take the tensors: they are on a GPU that Triton supports."""
    # the kernels read row after row
    is_whole = all(tensor.is_contiguous() for tensor in tensors)
    return tensors[0].is_cuda and is_whole and works_on(tensors[0].device, tensors[0].dtype)


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
    _launch(
        "norm_forward", (rows,), source, weight, result, rstd, *sizes, SIZE=next_power_of_two(size)
    )
    return result, rstd


def rms_norm_backward(
    grad: torch.Tensor, source: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of `source`, `[rows, size]`."""
    rows, size = source.shape
    result = torch.empty_like(source)
    tensors = (grad.contiguous(), source, rstd, weight, result)
    _launch("norm_backward", (rows,), *tensors, size, SIZE=next_power_of_two(size))
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


def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether Triton's kernels run on a device and give the right numbers.

    Triton may be missing, or not support an older card: then PyTorch's own operators give the
    same numbers up to rounding, slower. The log says why.
    """
    # `cuda` is the same device as `cuda:0`
    return _works_on(torch.device(device.type, device.index or 0), dtype)


@functools.cache
def _works_on(device: torch.device, dtype: torch.dtype) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        differences = {**_lora_differences(device, dtype), **_step_differences(device, dtype)}
    except torch.OutOfMemoryError:
        raise  # it says nothing about the kernels
    except Exception as error:  # a compiler's errors have no common class
        logger.warning("Triton kernels do not run on this GPU, training is slower: %s", error)
        return False
    wrong = {name: value for name, value in differences.items() if not value < _TOLERANCE}
    if wrong:
        logger.warning("Triton kernels are wrong on this GPU, training is slower: %s", wrong)
    return not wrong


def _lora_differences(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Compare the low-rank kernels with matmuls: two adapters, of which one has one module.

    The kernels are compiled anew for other sizes of ranks, so several are compared.
    """
    return {
        f"{name}, ranks {ranks}": value
        for ranks in _CHECKED_RANKS
        for name, value in _differences_of_ranks(ranks, device, dtype).items()
    }


def _differences_of_ranks(
    ranks: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    inputs = 48
    x, grad = (_draw(49, 48, seed=seed).to(device, dtype) for seed in (1, 2))
    spans: list[AdapterSpan] = []
    rows: list[torch.Tensor] = []
    for rank, names, end in zip(ranks, _MODULES_OF, (40, 49), strict=True):
        layout = Layout({name: LowRank(_WIDTHS[name], inputs, rank) for name in names})
        weights = _draw(layout.size, seed=end).to(device, dtype)
        gradients = torch.zeros(layout.size, device=device)
        rows.append(table_row(layout, _NUMBERS, weights, gradients, scaling=2.0))
        numbers = {_NUMBERS[name] for name in names}
        # kept here, because the row has nothing but the addresses of weights and gradients
        facts = {"rank": rank, "layout": layout, "weights": weights, "gradients": gradients}
        adapter: Any = SimpleNamespace(module_numbers=numbers, **facts)
        spans.append(AdapterSpan(adapter, spans[-1].end if spans else 0, end))
    segments = Segments(spans, rows)
    columns = ModuleColumns(0, inputs, tuple(_WIDTHS.values()), device)
    result, grad_x = torch.zeros_like(grad), torch.zeros_like(x)
    h = segments.forward(columns, x, result)
    segments.backward(columns, x, h, grad, grad_x)
    differences, expected, expected_x = _compared_with_matmuls(spans, x.float(), grad.float())
    differences |= {"result": _apart(result, expected), "grad x": _apart(grad_x, expected_x)}
    return differences


def _compared_with_matmuls(
    spans: Sequence[Any], x: torch.Tensor, grad: torch.Tensor
) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Return differences of the adapters' gradients, and the right result and gradient of x."""
    result, grad_x = torch.zeros_like(grad), torch.zeros_like(x)
    differences = {}
    for number, span in enumerate(spans):
        at, adapter = slice(span.begin, span.end), span.adapter
        for name, offsets in adapter.layout.offsets.items():
            a, b = (m.float() for m in adapter.layout.matrices(adapter.weights, offsets))
            grad_a, grad_b = adapter.layout.matrices(adapter.gradients, offsets)
            begin = 0 if name == "first" else _WIDTHS["first"]
            columns = slice(begin, begin + _WIDTHS[name])
            inner, outer = 2.0 * x[at] @ a.T, grad[at, columns]
            result[at, columns] += inner @ b.T
            grad_x[at] += 2.0 * outer @ b @ a
            differences[f"grad A {number} {name}"] = _apart(grad_a, (2.0 * outer @ b).T @ x[at])
            differences[f"grad B {number} {name}"] = _apart(grad_b, outer.T @ inner)
    return differences, result, grad_x


def _step_differences(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Compare the elementwise kernels with PyTorch's operators and their gradients."""
    shapes = (9, 96), (9, 96), (96,)
    source, grad, weight = (
        _draw(*shape, seed=seed).to(device, dtype) for seed, shape in enumerate(shapes)
    )
    exact, outer = source.float().requires_grad_(), grad.float()
    norm, rstd = rms_norm(source, weight, 1e-5)
    expected = functional.rms_norm(exact, (96,), weight.float(), 1e-5)
    (expected_grad,) = torch.autograd.grad(expected, exact, outer)
    gate, up = exact.chunk(2, dim=-1)
    product = functional.silu(gate) * up
    (product_grad,) = torch.autograd.grad(product, exact, outer[:, :48])
    angles = torch.outer(torch.arange(9.0), 0.5 ** torch.arange(4)).to(device)
    cos, sin = (f(angles).repeat(1, 2).to(dtype) for f in (torch.cos, torch.sin))
    positions = torch.arange(9, dtype=torch.int32, device=device)
    turned = rotary(source, cos, sin, positions, 96)
    return {
        "norm": _apart(norm, expected),
        "norm backward": _apart(rms_norm_backward(grad, source, weight, rstd), expected_grad),
        "swiglu": _apart(swiglu(source), product),
        "swiglu backward": _apart(swiglu_backward(grad[:, :48], source), product_grad),
        "rotary": _apart(rotary(turned, cos, sin, positions, 96, backwards=True), exact),
    }


def _draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _apart(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    difference = (value.float() - expected).abs().max() / expected.abs().max()
    return float(difference.detach())
