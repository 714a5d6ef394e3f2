"""The offsets of an adapter's matrices in one flat vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tinyllama_lab.core.models.lora import LowRank

ALIGN = 8  # elements: kernels on a GPU read 16 bytes at a time


@dataclass(frozen=True)
class MatrixOffsets:
    """Where the matrices of one module begin in the flat vector, and their shapes.

    `A [rank, inputs]` begins at element `a`, `B [outputs, rank]` at element `b`, and the
    magnitudes `[outputs]` of DoRA at element `magnitudes`.
    """

    module: str  # name in the model, such as model.layers.0.self_attn.q_proj
    a: int
    b: int
    magnitudes: int | None
    shape: LowRank


class Layout:
    """The offsets of all adapted modules.

    All A come first, so that those of neighbours, which have the same input, form one matrix.
    """

    def __init__(self, shapes: Mapping[str, LowRank], has_magnitudes: bool = False) -> None:
        """Lay out the matrices of every module, by its name."""
        self.has_magnitudes = has_magnitudes
        self.offsets: dict[str, MatrixOffsets] = {}
        a = 0
        # B begins where the last A ends
        b = self._first_b = sum(_aligned(s.rank * s.inputs) for s in shapes.values())
        end = b + sum(_aligned(shape.outputs * shape.rank) for shape in shapes.values())
        for module, shape in shapes.items():
            at = end if has_magnitudes else None
            self.offsets[module] = MatrixOffsets(module, a, b, at, shape)
            a, b = (
                _aligned(a + shape.rank * shape.inputs),
                _aligned(b + shape.outputs * shape.rank),
            )
            end = _aligned(end + shape.outputs) if has_magnitudes else end
        self.size = end

    @property
    def ranks(self) -> set[int]:
        """Return the ranks that occur."""
        return {offsets.shape.rank for offsets in self.offsets.values()}

    def parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return two views of `flat [size]`: all A, and all others."""
        return [flat[: self._first_b], flat[self._first_b :]]

    def matrices(
        self, flat: torch.Tensor, offsets: MatrixOffsets
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of A and B in `flat [..., size]`; leading dimensions are kept."""
        (outputs, inputs, rank), leading = offsets.shape, flat.shape[:-1]
        a = flat[..., offsets.a : offsets.a + rank * inputs]
        b = flat[..., offsets.b : offsets.b + outputs * rank]
        return a.view(*leading, rank, inputs), b.view(*leading, outputs, rank)

    def magnitudes(self, flat: torch.Tensor, offsets: MatrixOffsets) -> torch.Tensor | None:
        """Return a view of a module's magnitudes `[..., outputs]`; None if it has none."""
        begin = offsets.magnitudes
        return None if begin is None else flat[..., begin : begin + offsets.shape.outputs]

    def joint(self, flat: torch.Tensor, neighbours: Sequence[MatrixOffsets]) -> torch.Tensor:
        """Return the A of neighbours as one view, `[len(neighbours) * rank, inputs]`."""
        _, inputs, rank = neighbours[0].shape
        rows = len(neighbours) * rank
        return flat[neighbours[0].a : neighbours[0].a + rows * inputs].view(rows, inputs)

    def are_neighbours(self, first: MatrixOffsets, second: MatrixOffsets) -> bool:
        """Return whether the A of the second begins where that of the first ends."""
        _, inputs, rank = first.shape
        return second.shape[1:] == (inputs, rank) and second.a == first.a + rank * inputs

    def split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of an adapter's matrices, by the names that PEFT saves."""
        matrices: dict[str, torch.Tensor] = {}
        for offsets in self.offsets.values():
            a, b = self.matrices(flat, offsets)
            matrices[f"base_model.model.{offsets.module}.lora_A.weight"] = a
            matrices[f"base_model.model.{offsets.module}.lora_B.weight"] = b
            if (lengths := self.magnitudes(flat, offsets)) is not None:
                matrices[f"base_model.model.{offsets.module}.lora_magnitude_vector"] = lengths
        return matrices

    def fill(self, flat: torch.Tensor, matrices: dict[str, torch.Tensor]) -> None:
        """Copy matrices into `flat`; the inverse of `split`. Missing matrices stay unchanged."""
        for name, view in self.split(flat).items():
            # a model of PEFT has magnitudes under a longer name than its files
            for known in (name, f"{name}.weight"):
                if known in matrices:
                    view.copy_(matrices[known])


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN
