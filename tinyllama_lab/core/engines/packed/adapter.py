"""One adapter of a pack, stored as flat vectors of weights and gradients."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tinyllama_lab.core.engines.packed.layout import Layout, MatrixOffsets
from tinyllama_lab.core.models import lora
from tinyllama_lab.core.models.targets import of_module
from tinyllama_lab.study.trial import ADAPTER_WEIGHTS

_MOVED, _FIRST = "A - A0 and B0", "A0 and B0"  # the kinds of frozen factors


@dataclass
class Pairs:
    """The matrices of modules with the same input and rank, in the dtype of the matmuls.

    The A of all modules form one matrix, so that one matmul with the input serves all of them.
    Gradients accumulate in float32. What has none is frozen.
    """

    modules: list[str]
    a: torch.Tensor  # [modules * rank, inputs], in the dtype that the base computes in
    grad_a: torch.Tensor | None
    b: list[torch.Tensor]  # [outputs, rank] each
    grad_b: list[torch.Tensor]
    rank: int
    scaling: float  # of the low-rank update
    # of DoRA, `[outputs]` each: always in float32, since they scale what the base itself computes
    magnitudes: list[torch.Tensor]
    grad_magnitudes: list[torch.Tensor]


@dataclass
class Storage:
    """The vectors of one adapter, `[layout.size]` each."""

    weights: torch.Tensor  # float32 master weights, whatever the dtype of the base
    gradients: torch.Tensor  # float32
    compute_weights: torch.Tensor  # in the base's dtype; `weights` itself if that is float32

    @classmethod
    def new(cls, size: int, dtype: torch.dtype, device: torch.device) -> Storage:
        """Return zeros; both kinds of weights are one tensor if `dtype` is float32."""
        weights = torch.zeros(size, device=device)
        compute_weights = weights if dtype == weights.dtype else weights.to(dtype)
        return cls(weights, torch.zeros_like(weights), compute_weights)


class PackedAdapter:
    """An adapter as one flat vector, of which an optimizer sees two parts: all A, and the rest.

    Clipping and AdamW then take a few operations per adapter, instead of a few for each of its
    several hundred matrices.

    Attributes:
        flat: all weights, `[layout.size]` in float32.
    """

    def __init__(
        self,
        layout: Layout,
        storage: Storage,
        config: peft.LoraConfig,
        initial: dict[str, torch.Tensor],
        seed: int,
    ) -> None:
        self.config = config
        self.seed = seed
        self.rank = max(layout.ranks)
        self.dropout = float(config.lora_dropout)
        self.layout = layout
        self._storage = storage
        self.flat = storage.weights
        layout.fill(self.flat, initial)
        self._parts = [nn.Parameter(part) for part in layout.parts(self.flat)]
        for part, gradient in zip(self._parts, layout.parts(storage.gradients), strict=True):
            part.grad = gradient
        # the first matrices in float32, where the adapter is what it learned beyond them
        self._first: torch.Tensor | None = None
        self._beyond: dict[str, torch.Tensor] = {}  # flat vectors of frozen factors, by kind
        self._norms: dict[str, torch.Tensor] = {}  # of the weights of DoRA's modules, by name
        self.updated()
        self.row: torch.Tensor | None = None  # of the table that the kernels on a GPU read
        self.module_numbers: frozenset[int] = frozenset()  # of its modules, for these kernels
        # views of the storage, which is never allocated again, so they are built once
        self._pairs: dict[tuple[str, bool], list[Pairs]] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return two parts of the flat vector: all A, and all others."""
        return list(self._parts)

    @property
    def fast_parameters(self) -> list[nn.Parameter]:
        """Return those that LoRA+ trains faster: B and magnitudes."""
        return self._parts[1:]

    @property
    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Return none: it trains nothing of the base."""
        return []

    def matrices(self) -> dict[str, nn.Parameter]:
        """Return views of every matrix, with views of its gradient."""
        gradients = self.layout.split(self.gradients)
        matrices = {n: nn.Parameter(view) for n, view in self.layout.split(self.flat).items()}
        for name, matrix in matrices.items():
            matrix.grad = gradients[name]
        return matrices

    @property
    def compute_weights(self) -> torch.Tensor:
        """Return the flat vector in the base's dtype."""
        return self._storage.compute_weights

    @property
    def gradients(self) -> torch.Tensor:
        """Return the flat float32 gradient that backward adds to."""
        return self._storage.gradients

    def use_kernels(self, numbers: dict[str, int]) -> None:
        """Let the kernels on a GPU take this adapter; `numbers` are those of all modules.

        They know one rank of an adapter, no magnitudes and no frozen pairs. Others go without
        them.
        """
        if len(self.layout.ranks) > 1 or self.layout.has_magnitudes or self._first is not None:
            return
        scaling = self._scaling(next(iter(self.layout.offsets)))
        self.row = table_row(self.layout, numbers, self.compute_weights, self.gradients, scaling)
        self.module_numbers = frozenset(numbers[name] for name in self.layout.offsets)

    def keep_first(self, values: dict[str, torch.Tensor]) -> None:
        """Take the product of these matrices, `B0 A0`, out of the adapter's.

        So adapters that PEFT takes out of the base's weights share that base in a pack. What is
        left, `B A - B0 A0`, is computed as `(B - B0) A + B0 (A - A0)`: in half precision, the
        difference of two products would lose most of what was learned.
        """
        storage = self._storage
        self._first = torch.zeros_like(storage.weights)
        if storage.compute_weights is storage.weights:  # it holds B - B0 from now on
            storage.compute_weights = storage.weights.clone()
        for kind in (_MOVED, _FIRST):
            self._beyond[kind] = torch.zeros_like(storage.compute_weights)
        self._pairs.clear()
        self._set_first(values)
        self.updated()

    def _set_first(self, values: dict[str, torch.Tensor]) -> None:
        assert self._first is not None
        self.layout.fill(self._first, values)
        for factors in self._beyond.values():  # `updated` writes `A - A0` over one of the two A0
            factors.copy_(self._first)

    def freeze(self) -> None:
        """Free what only training needs: gradients, and float32 weights that are only updated."""
        storage = self._storage
        if not self.layout.has_magnitudes:
            storage.weights = storage.compute_weights
        # one element that every view of a gradient shows, since nothing is added to it any more
        storage.gradients = torch.zeros(1, device=storage.weights.device).expand(self.layout.size)
        self.flat = storage.weights
        self._parts = [nn.Parameter(storage.weights, requires_grad=False)]
        self._pairs.clear()

    @property
    def trainable_params(self) -> int:
        """Return the number of trained values, without the gaps between matrices."""
        return sum(matrix.numel() for matrix in self.layout.split(self.flat).values())

    def pairs(self, modules: Sequence[str], masked: bool = False) -> list[Pairs]:
        """Return the adapter's matrices on `modules`, which share their input; maybe none.

        Args:
            modules: names of modules.
            masked: whether dropout masks the input. Every module has its own mask, so no two of
                them can share the matmul with A.
        """
        if (modules[0], masked) not in self._pairs:
            groups: list[list[MatrixOffsets]] = []
            for offsets in (self.layout.offsets[m] for m in modules if m in self.layout.offsets):
                near = groups and self._share_input(groups[-1][-1], offsets)
                if near and not masked:
                    groups[-1].append(offsets)
                else:
                    groups.append([offsets])
            self._pairs[modules[0], masked] = [self._joined(group) for group in groups]
        return self._pairs[modules[0], masked]

    def _share_input(self, first: MatrixOffsets, second: MatrixOffsets) -> bool:
        """Return whether one matmul serves two modules of a layer."""
        same_scale = self._scaling(first.module) == self._scaling(second.module)
        return same_scale and self.layout.are_neighbours(first, second)

    def _scaling(self, module: str) -> float:
        """Return what PEFT multiplies the update of a module with."""
        rank = self.layout.offsets[module].shape.rank
        alpha = of_module(self.config.alpha_pattern, module, self.config.lora_alpha)
        return float(alpha / (rank**0.5 if self.config.use_rslora else rank))

    def _joined(self, neighbours: list[MatrixOffsets]) -> Pairs:
        layout, weights, gradients = self.layout, self._storage.compute_weights, self.gradients
        modules = [offsets.module for offsets in neighbours]
        return Pairs(
            modules,
            layout.joint(weights, neighbours),
            layout.joint(gradients, neighbours),
            [layout.matrices(weights, offsets)[1] for offsets in neighbours],
            [layout.matrices(gradients, offsets)[1] for offsets in neighbours],
            neighbours[0].shape.rank,
            self._scaling(modules[0]),
            self._magnitudes(self._storage.weights, neighbours),
            self._magnitudes(gradients, neighbours),
        )

    def first_pairs(self, trained: Pairs) -> list[Pairs]:
        """Return what completes trained pairs after `keep_first`; else none.

        These are `B0` and `A - A0`, whose A is trained, and the frozen `B0` and `A0`. The latter
        only count where dropout masks the input: the base has their product without a mask.
        """
        if self._first is None:
            return []
        key = f"first {trained.modules[0]}", len(trained.modules) == 1
        if key not in self._pairs:
            self._pairs[key] = [self._of_first(trained, kind) for kind in (_MOVED, _FIRST)]
        return self._pairs[key]

    def _of_first(self, trained: Pairs, kind: str) -> Pairs:
        flat, offsets = self._beyond[kind], [self.layout.offsets[m] for m in trained.modules]
        a = self.layout.joint(flat, offsets)
        b = [self.layout.matrices(flat, each)[1] for each in offsets]
        grad_a = trained.grad_a if kind == _MOVED else None
        return Pairs(trained.modules, a, grad_a, b, [], trained.rank, trained.scaling, [], [])

    def _magnitudes(
        self, flat: torch.Tensor, neighbours: Sequence[MatrixOffsets]
    ) -> list[torch.Tensor]:
        found = (self.layout.magnitudes(flat, offsets) for offsets in neighbours)
        return [lengths for lengths in found if lengths is not None]

    def norm(self, module: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what `compute` gave for a module since the last update."""
        if module not in self._norms:
            self._norms[module] = compute()
        return self._norms[module]

    def named(self, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the matrices in the parts of a flat vector, by name."""
        return self.layout.split(torch.cat([value.detach() for value in values]))

    def values(self, named: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return matrices as the parts of a flat vector; missing matrices are zero."""
        flat = torch.zeros_like(self.flat)
        self.layout.fill(flat, named)
        return self.layout.parts(flat)

    def zero_grad(self) -> None:
        """Set the gradient to zero in place."""
        self._storage.gradients.zero_()

    def updated(self) -> None:
        """Copy the weights to `compute_weights`, rounded, if those are another tensor."""
        self._norms.clear()
        storage, first = self._storage, self._first
        if first is not None:
            moved_a, moved_b = self.layout.parts(storage.weights - first)
            a, b = self.layout.parts(storage.compute_weights)
            a.copy_(self.layout.parts(storage.weights)[0])
            b.copy_(moved_b)
            self.layout.parts(self._beyond[_MOVED])[0].copy_(moved_a)
        elif storage.compute_weights is not storage.weights:
            storage.compute_weights.copy_(storage.weights)

    def save(self, folder: Path) -> None:
        """Write the folder that PEFT's own `save_pretrained` would write."""
        folder.mkdir(parents=True, exist_ok=True)
        named, config = self.layout.split(self.flat), self.config
        if self._first is not None:
            named, config = self._with_first(named), lora.doubled(config)
        matrices = {name: matrix.cpu().contiguous() for name, matrix in named.items()}
        save_file(matrices, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        # PEFT's `save_pretrained` sets this too
        config.inference_mode = True
        lora.sort_targets(config)
        config.save_pretrained(str(folder))

    def _with_first(self, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return `[A; A first]` and `[B, -B first]`, whose product is what was learned."""
        assert self._first is not None
        joined = {}
        for name, first in self.layout.split(self._first).items():
            is_a = ".lora_A." in name
            joined[name] = torch.cat([named[name], first if is_a else -first], 0 if is_a else 1)
        return joined

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Load the values that `save` wrote."""
        named = load_file(folder / ADAPTER_WEIGHTS)
        if self._first is not None:
            halves = {n: v.chunk(2, 0 if ".lora_A." in n else 1) for n, v in named.items()}
            named = {name: trained for name, (trained, _) in halves.items()}
            first = {n: f if ".lora_A." in n else -f for n, (_, f) in halves.items()}
            self._set_first(first)
        self.layout.fill(self.flat.zero_(), named)
        self.updated()


@dataclass(frozen=True)
class AdapterSpan:
    """The tokens `[begin, end)` of a micro-batch that belong to one adapter."""

    adapter: PackedAdapter
    begin: int
    end: int


def table_row(
    layout: Layout,
    numbers: dict[str, int],
    weights: torch.Tensor,
    gradients: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return an adapter's row of the table that `triton_lora` describes.

    Args:
        layout: where the matrices of its modules begin; all have one rank.
        numbers: the number of every module of the model, by name.
        weights: in the dtype of the base, `[layout.size]`.
        gradients: in float32, `[layout.size]`.
        scaling: of the low-rank update.
    """
    (bits,) = struct.unpack("<i", struct.pack("<f", scaling))
    (rank,) = layout.ranks
    row = [weights.data_ptr(), gradients.data_ptr(), rank, bits]
    begins = [-1] * (2 * len(numbers))
    for name, offsets in layout.offsets.items():
        begins[2 * numbers[name]] = offsets.a
        begins[2 * numbers[name] + 1] = offsets.b
    return torch.tensor([*row, *begins], dtype=torch.int64).to(weights.device)
