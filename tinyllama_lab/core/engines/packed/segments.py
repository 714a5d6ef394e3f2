"""The low-rank updates of a micro-batch on a GPU: one kernel launch for all adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tinyllama_lab.core.engines.packed.adapter import AdapterSpan

HIGHEST_RANK = 128  # a larger one does not fit into the registers of a program
_LEAST_RANKS = 16  # the narrowest matrix that a tensor core takes
_TILE_TOKENS = 32  # on an H100 tiles of 64 were no faster, and short spans fill fewer of them
_STEP_TOKENS = 64  # that a program adds to a gradient at a time


class ModuleColumns:
    """The modules of a linear layer: their numbers in the model, and their output columns."""

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
        """Take the spans and the table's row of the adapter of each.

        Raises:
            ValueError: an adapter has two spans, whose sums for one gradient would race.
        """
        if len({id(span.adapter) for span in spans}) < len(spans):
            raise ValueError("the rows of a batch must be sorted by adapter")
        self._modules = {n for span in spans for n in span.adapter.module_numbers}
        ranks = [span.adapter.rank for span in spans]
        self._ranks = max(_LEAST_RANKS, next_power_of_two(max(ranks)))
        self._even_ranks = _even(ranks, 8)
        tiles = [
            (begin, min(begin + _TILE_TOKENS, span.end), number)
            for number, span in enumerate(spans)
            for begin in range(span.begin, span.end, _TILE_TOKENS)
        ]
        self._tile_count, self._span_count = len(tiles), len(spans)
        flat = [value for tile in tiles for value in tile]
        # both begin at a multiple of 16 bytes: Triton compiles a kernel again for other addresses
        flat += [0] * (-len(flat) % 4)
        tiles_end = len(flat)
        flat += [value for span in spans for value in (span.begin, span.end)]
        device = rows[0].device
        host = torch.tensor(flat, dtype=torch.int32)
        # one copy for both, because every copy to the device has a fixed cost
        numbers = host.to(device, non_blocking=True)
        self._tiles, self._spans = numbers.split([tiles_end, 2 * len(spans)])
        self._table = torch.stack(list(rows))

    def adapts(self, columns: ModuleColumns) -> bool:
        """Return whether any adapter has a module of this layer."""
        return not self._modules.isdisjoint(columns.numbers)

    def forward(
        self, columns: ModuleColumns, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        """Add `scaling * x @ A.T @ B.T` to `result`.

        Returns:
            `scaling * x @ A.T`, `[tokens, modules, ranks]`.
        """
        h = self._projected(columns, x, is_b=False)
        self._expand(columns, h, result, is_b=True)
        return h

    def backward(
        self,
        columns: ModuleColumns,
        x: torch.Tensor,
        h: torch.Tensor,
        grad: torch.Tensor,
        grad_x: torch.Tensor,
    ) -> None:
        """Add to the adapters' gradients and to `grad_x [tokens, inputs]`."""
        grad_h = self._projected(columns, grad, is_b=True)
        self._accumulate(columns, grad, h, is_b=True)
        self._accumulate(columns, x, grad_h, is_b=False)
        self._expand(columns, grad_h, grad_x, is_b=False)

    def _projected(self, columns: ModuleColumns, source: torch.Tensor, is_b: bool) -> torch.Tensor:
        modules = len(columns.numbers)
        result = source.new_empty(len(source), modules, self._ranks)
        grid = (modules, self._tile_count)
        self._launch(
            "project", grid, columns, (source, source.stride(0), columns.starts, result), is_b
        )
        return result

    def _expand(
        self, columns: ModuleColumns, h: torch.Tensor, result: torch.Tensor, is_b: bool
    ) -> None:
        width, modules = (columns.widest, len(columns.numbers)) if is_b else (columns.inputs, 1)
        grid = (-(-width // self._columns(h)), self._tile_count, modules)
        self._launch("expand", grid, columns, (h, columns.starts, result, result.stride(0)), is_b)

    def _accumulate(
        self, columns: ModuleColumns, source: torch.Tensor, h: torch.Tensor, is_b: bool
    ) -> None:
        width = columns.widest if is_b else columns.inputs
        grid = (-(-width // self._columns(h)), self._span_count, len(columns.numbers))
        arguments = (source, source.stride(0), h, columns.starts)
        self._launch("accumulate", grid, columns, arguments, is_b)

    def _columns(self, tensor: torch.Tensor) -> int:
        """Return the columns of a block, which must fit into shared memory with the ranks."""
        return 128 if self._ranks * tensor.element_size() <= 64 else 64

    def _launch(
        self,
        name: str,
        grid: tuple[int, ...],
        columns: ModuleColumns,
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
            columns.numbers[0],
            IS_B=is_b,
            MODULES=len(columns.numbers),
            RANKS=self._ranks,
            TOKENS=_STEP_TOKENS if is_sum else _TILE_TOKENS,
            COLUMNS=self._columns(arguments[0]),
            EVEN=columns.even,
            EVEN_RANKS=self._even_ranks,
            PRECISION="ieee",  # float32 is not rounded to TF32; other dtypes ignore it
            num_warps=4,
            num_stages=3 if self._ranks <= 32 else 2,  # more would not fit shared memory
        )


def _even(values: Sequence[int], factor: int) -> int:
    """Return `factor` if it divides all values, else 1."""
    return 1 if any(value % factor for value in values) else factor


def next_power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()
