"""The low-rank updates of a micro-batch on a GPU: one kernel launch for all adapters."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from tinyllama_lab.core.engines.packed.adapter import AdapterSpan, table_row
from tinyllama_lab.core.engines.packed.layout import Layout

logger = logging.getLogger(__name__)

HIGHEST_RANK = 128  # a larger one does not fit into the registers of a program
_LEAST_RANKS = 16  # the narrowest matrix that a tensor core takes
_TILE_TOKENS = 32  # on an H100 tiles of 64 were no faster, and short spans fill fewer of them
_STEP_TOKENS = 64  # that a program adds to a gradient at a time
_TOLERANCE = 0.02  # a few roundings to bfloat16


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed; PyTorch brings it for GPUs on Linux."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels run on a device and give the right numbers.

    Triton may be missing, or not support an older card: then PyTorch's own operators give the
    same numbers, slower. The log says why.
    """
    if not has_triton():
        return False
    try:
        difference = _difference_to_matmuls(device, dtype)
    except Exception as error:  # a compiler's errors have no common class
        logger.warning("Triton kernels do not run on this GPU, training is slower: %s", error)
        return False
    if not difference < _TOLERANCE:
        logger.warning("Triton kernels are wrong by %g on this GPU, and not used", difference)
        return False
    return True


def _difference_to_matmuls(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference of the kernels to matmuls, relative to the largest value."""
    tokens, inputs, outputs = 40, 48, 32
    layout = Layout(8, {"module": (outputs, inputs)})
    generator = torch.Generator().manual_seed(0)
    x, grad, weights = (
        torch.randn(*shape, generator=generator).to(device, dtype)
        for shape in ((tokens, inputs), (tokens, outputs), (layout.size,))
    )
    gradients = torch.zeros(layout.size, device=device)
    row = table_row(layout, {"module": 0}, weights, gradients, scaling=2.0)
    adapter: Any = SimpleNamespace(layout=layout, module_numbers={0})
    segments = Segments([AdapterSpan(adapter, 0, tokens)], [row])
    place = Place(0, inputs, [outputs], device)
    result, grad_x = torch.zeros_like(grad), torch.zeros_like(x)
    h = segments.forward(place, x, result)
    segments.backward(place, x, h, grad, grad_x)

    offsets = layout.offsets["module"]
    a, b = (matrix.float() for matrix in layout.matrices(weights, offsets))
    grad_h = 2.0 * grad.float() @ b
    expected = (2.0 * x.float() @ a.T @ b.T, grad_h @ a, grad_h.T @ x.float())
    found = (result, grad_x, layout.matrices(gradients, offsets)[0])
    pairs = zip(found, expected, strict=True)
    return max(float((f.float() - e).abs().max() / e.abs().max()) for f, e in pairs)


class Place:
    """Where a linear layer's modules are: their numbers in the model and their columns."""

    def __init__(self, first: int, inputs: int, outputs: Sequence[int], device: torch.device):
        """Take the number of the first module; the others follow it."""
        self.numbers = range(first, first + len(outputs))
        self.inputs = inputs
        self.widest = max(outputs)
        starts = [sum(outputs[:count]) for count in range(len(outputs) + 1)]
        self.starts = torch.tensor([*starts, inputs], dtype=torch.int32, device=device)
        self.even = _even([inputs, *outputs], 16)


class Segments:
    """The tokens of every adapter, cut into tiles, and the table of adapters."""

    def __init__(self, spans: Sequence[AdapterSpan], rows: Sequence[torch.Tensor]) -> None:
        """Take the spans and the table's row of the adapter of each."""
        self._modules = {n for span in spans for n in span.adapter.module_numbers}
        ranks = [span.adapter.layout.rank for span in spans]
        self._ranks = max(_LEAST_RANKS, _power(max(ranks)))
        self._even_ranks = _even(ranks, 8)
        tiles = [
            (begin, min(begin + _TILE_TOKENS, span.end), number)
            for number, span in enumerate(spans)
            for begin in range(span.begin, span.end, _TILE_TOKENS)
        ]
        self._tile_count, self._span_count = len(tiles), len(spans)
        flat = [value for tile in tiles for value in tile]
        flat += [value for span in spans for value in (span.begin, span.end)]
        device = rows[0].device
        host = torch.tensor(flat, dtype=torch.int32)
        # one copy for both, because every copy to the device has a fixed cost
        numbers = host.to(device, non_blocking=True)
        self._tiles, self._spans = numbers.split([3 * len(tiles), 2 * len(spans)])
        self._table = torch.stack(list(rows))

    def adapts(self, place: Place) -> bool:
        """Return whether any adapter has a module of this layer."""
        return not self._modules.isdisjoint(place.numbers)

    def forward(self, place: Place, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Add `scaling * x @ A.T @ B.T` to `result`.

        Returns:
            `scaling * x @ A.T`, `[tokens, modules, ranks]`.
        """
        h = self._projected(place, x, is_b=False)
        self._expand(place, h, result, is_b=True)
        return h

    def backward(
        self,
        place: Place,
        x: torch.Tensor,
        h: torch.Tensor,
        grad: torch.Tensor,
        grad_x: torch.Tensor,
    ) -> None:
        """Add to the adapters' gradients and to `grad_x [tokens, inputs]`."""
        grad_h = self._projected(place, grad, is_b=True)
        self._accumulate(place, grad, h, is_b=True)
        self._accumulate(place, x, grad_h, is_b=False)
        self._expand(place, grad_h, grad_x, is_b=False)

    def _projected(self, place: Place, source: torch.Tensor, is_b: bool) -> torch.Tensor:
        modules = len(place.numbers)
        result = source.new_empty(len(source), modules, self._ranks)
        grid = (modules, self._tile_count)
        self._launch(
            "project", grid, place, (source, source.stride(0), place.starts, result), is_b
        )
        return result

    def _expand(self, place: Place, h: torch.Tensor, result: torch.Tensor, is_b: bool) -> None:
        width, modules = (place.widest, len(place.numbers)) if is_b else (place.inputs, 1)
        grid = (-(-width // self._columns(h)), self._tile_count, modules)
        self._launch("expand", grid, place, (h, place.starts, result, result.stride(0)), is_b)

    def _accumulate(self, place: Place, source: torch.Tensor, h: torch.Tensor, is_b: bool) -> None:
        width = place.widest if is_b else place.inputs
        grid = (-(-width // self._columns(h)), self._span_count, len(place.numbers))
        arguments = (source, source.stride(0), h, place.starts)
        self._launch("accumulate", grid, place, arguments, is_b)

    def _columns(self, tensor: torch.Tensor) -> int:
        """Return the columns of a block, which must fit into shared memory with the ranks."""
        return 128 if self._ranks * tensor.element_size() <= 64 else 64

    def _launch(
        self,
        name: str,
        grid: tuple[int, ...],
        place: Place,
        arguments: tuple[Any, ...],
        is_b: bool,
    ) -> None:
        from tinyllama_lab.core.engines.packed import triton_lora

        kernel: Callable[..., Any] = getattr(triton_lora, name)[grid]
        is_sum = name == "accumulate"
        kernel(
            *arguments,
            self._table,
            self._table.stride(0),
            self._spans if is_sum else self._tiles,
            place.numbers[0],
            IS_B=is_b,
            MODULES=len(place.numbers),
            RANKS=self._ranks,
            TOKENS=_STEP_TOKENS if is_sum else _TILE_TOKENS,
            COLUMNS=self._columns(arguments[0]),
            EVEN=place.even,
            EVEN_RANKS=self._even_ranks,
            PRECISION="ieee",  # float32 is not rounded to TF32; other dtypes ignore it
            num_warps=4,
            num_stages=3 if self._ranks <= 32 else 2,  # more would not fit shared memory
        )


def _even(values: Sequence[int], factor: int) -> int:
    """Return `factor` if it divides all values, else 1."""
    return 1 if any(value % factor for value in values) else factor


def _power(value: int) -> int:
    """Return the smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()
