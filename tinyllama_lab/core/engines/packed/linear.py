"""A frozen linear layer with the low-rank updates of all adapters in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from tinyllama_lab.core.engines.packed import dora, fused_cpu
from tinyllama_lab.core.engines.packed.adapter import PackedAdapter, Pairs
from tinyllama_lab.core.engines.packed.batch import PackedBatch
from tinyllama_lab.core.engines.packed.dropout import mask
from tinyllama_lab.core.engines.packed.elementwise import Step
from tinyllama_lab.core.engines.packed.segments import ModuleColumns
from tinyllama_lab.core.engines.packed.weights import FrozenWeight


class Part(NamedTuple):
    """One adapter on modules that share one A: its rows and columns of the output."""

    adapter: PackedAdapter
    pairs: Pairs
    rows: slice
    columns: list[slice]  # of every module
    ranks: list[slice]  # of every module, in the output of the matmul with A
    dropout: torch.Tensor | None  # [rows, inputs] 0, or 1 / (1 - dropout)


class PackedLinear:
    """`x @ weight.T` plus `scaling * x @ A.T @ B.T` of every adapter, where `x = step(source)`."""

    def __init__(
        self,
        step: Step,
        weight: FrozenWeight,
        modules: Sequence[str],
        columns: ModuleColumns,
        bias: torch.Tensor | None = None,
    ) -> None:
        """`bias [outputs]` is added at the end; a frozen one has no part in backward."""
        self.step = step
        self.weight = weight
        self.bias = bias
        self.columns = columns
        self._modules = list(modules)
        self._squares: torch.Tensor | None = None  # of the lengths of the weight's rows
        ends = list(accumulate(weight.outputs))
        self._columns = {
            name: slice(end - outputs, end)
            for name, outputs, end in zip(modules, weight.outputs, ends, strict=True)
        }

    def __call__(self, source: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Map `source [tokens, …]` to `[tokens, outputs]`.

        Backward adds to the adapters' gradients in place, because the adapters are not inputs
        of the autograd function.
        """
        result: torch.Tensor = _Apply.apply(source, self, batch)
        return result

    def add(self, x: torch.Tensor, result: torch.Tensor, batch: PackedBatch) -> list[torch.Tensor]:
        """Add the updates of all adapters to `result [tokens, outputs]`, in place.

        Returns:
            What `add_gradients` needs beside x.
        """
        if batch.segments is None:
            return [kept for part in self.parts(batch) for kept in self._add(part, x, result)]
        if batch.segments.adapts(self.columns):
            return [batch.segments.forward(self.columns, x, result)]
        return []

    def _add(self, part: Part, x: torch.Tensor, result: torch.Tensor) -> list[torch.Tensor]:
        rows, undropped = result[part.rows], None
        if not part.pairs.magnitudes:
            return [_add_lora(part, x, rows)]
        if part.dropout is not None:
            (columns,) = part.columns
            undropped = rows[:, columns] - _masked(x, part) @ self.weight.dense()[columns].T
        h = _add_lora(part, x, rows)
        gains = [m / n for m, n in zip(part.pairs.magnitudes, self._norms(part), strict=True)]
        return [h, dora.rescale(rows, part.columns, gains, undropped)]

    def _norms(self, part: Part) -> list[torch.Tensor]:
        """Return the lengths of the rows of base and update together, `[outputs]` each."""

        def norm(number: int) -> torch.Tensor:
            weight, columns = self.weight.dense(), part.columns[number]
            if self._squares is None:
                lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
                self._squares = lengths.square()
            a, b = part.pairs.a[part.ranks[number]], part.pairs.b[number]
            squares = self._squares[columns]
            return dora.row_norms(weight[columns], squares, a, b, part.pairs.scaling)

        names = enumerate(part.pairs.modules)
        return [part.adapter.norm(name, partial(norm, number)) for number, name in names]

    def grad_of_sums(
        self, inner: Sequence[torch.Tensor], grad: torch.Tensor, batch: PackedBatch
    ) -> torch.Tensor:
        """Return the gradient of base plus updates, from that of the output that DoRA scales.

        The gradients of magnitudes are added in place. Without DoRA it is `grad` itself.
        """
        if not inner or not any(s.adapter.layout.has_magnitudes for s in batch.spans):
            return grad
        scaled = [(part, sums) for part, _, sums in self._kept(inner, batch) if sums is not None]
        covered = sum(sums.numel() for _, sums in scaled)
        # every part has tokens and columns of its own
        result = torch.empty_like(grad) if covered == grad.numel() else grad.clone()
        for part, sums in scaled:
            pairs, norms = part.pairs, self._norms(part)
            by_module = sums.split([each.stop - each.start for each in part.columns], dim=1)
            for number, (z, columns) in enumerate(zip(by_module, part.columns, strict=True)):
                gain = pairs.magnitudes[number] / norms[number]
                outer, inner_grad = grad[part.rows, columns], result[part.rows, columns]
                of_gain = dora.rescale_backward(outer, z, gain, inner_grad)
                pairs.grad_magnitudes[number].add_(of_gain / norms[number])
        return result

    def add_undropped(
        self, difference: torch.Tensor, grad_x: torch.Tensor, batch: PackedBatch
    ) -> None:
        """Add to `grad_x` what reaches `x` past the dropout of DoRA's adapters, in place.

        Args:
            difference: the gradient of the output minus that of the sums.
            grad_x: as if the base's part of the sums were not masked.
            batch: the tokens.
        """
        for part in self.parts(batch):
            if part.pairs.magnitudes and part.dropout is not None:
                (columns,) = part.columns
                grad = difference[part.rows, columns] @ self.weight.dense()[columns]
                grad_x[part.rows] += grad * (1 - part.dropout)

    def _kept(
        self, inner: Sequence[torch.Tensor], batch: PackedBatch
    ) -> Iterator[tuple[Part, torch.Tensor, torch.Tensor | None]]:
        """Yield every part with what `add` kept for it: `x @ A.T`, and sums that DoRA scales."""
        tensors = iter(inner)
        for part in self.parts(batch):
            yield part, next(tensors), next(tensors) if part.pairs.magnitudes else None

    def add_gradients(
        self,
        inner: Sequence[torch.Tensor],
        x: torch.Tensor,
        grad: torch.Tensor,
        grad_x: torch.Tensor,
        batch: PackedBatch,
    ) -> None:
        """Add to the gradients of A and B and to `grad_x [tokens, inputs]`, all in place."""
        if batch.segments is None:
            for part, h, _ in self._kept(inner, batch):
                _add_gradients(part, h, x, grad, grad_x)
        elif inner:
            batch.segments.backward(self.columns, x, inner[0], grad, grad_x)

    def parts(self, batch: PackedBatch) -> Iterator[Part]:
        """Yield every adapter on every module.

        The order is the same at every call: backward pairs the parts with saved tensors.
        """
        for span in batch.spans:
            rows = slice(span.begin, span.end)
            dropout = span.adapter.dropout if batch.dropout_keys is not None else 0.0
            for pairs in span.adapter.pairs(self._modules, masked=dropout > 0):
                dropout_mask = None
                if batch.dropout_keys is not None and dropout:
                    keys = batch.dropout_keys[rows]
                    width, dtype = pairs.a.shape[1], pairs.a.dtype
                    dropout_mask = mask(keys, pairs.modules[0], width, dropout, dtype)
                yield self._part(span.adapter, pairs, rows, dropout_mask)
                for number, first in enumerate(span.adapter.first_pairs(pairs)):
                    if number == 0:
                        yield self._part(span.adapter, first, rows, dropout_mask)
                    elif dropout_mask is not None:  # the base has the product on the whole input
                        yield self._part(span.adapter, first, rows, dropout_mask - 1)

    def _part(
        self,
        adapter: PackedAdapter,
        pairs: Pairs,
        rows: slice,
        dropout: torch.Tensor | None,
    ) -> Part:
        columns = [self._columns[name] for name in pairs.modules]
        ranks = [slice(n * pairs.rank, (n + 1) * pairs.rank) for n in range(len(columns))]
        return Part(adapter, pairs, rows, columns, ranks, dropout)


class _Apply(torch.autograd.Function):
    """The layer with a hand-written backward, as given in the package's docstring."""

    @staticmethod
    def forward(
        ctx: Any, source: torch.Tensor, linear: PackedLinear, batch: PackedBatch
    ) -> torch.Tensor:
        x, saved = linear.step.forward(source)
        result = x @ linear.weight.dense().T
        # kept for backward: the small `h` of every adapter, but not x, which is recomputed
        inner = linear.add(x, result, batch)
        if linear.bias is not None:  # after the adapters, because DoRA does not scale it
            result += linear.bias
        ctx.linear, ctx.batch = linear, batch
        ctx.save_for_backward(source, saved, *inner)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source, saved, *inner = ctx.saved_tensors
        linear: PackedLinear = ctx.linear
        grad = grad.contiguous()  # some models transpose an output
        grad_sums = linear.grad_of_sums(inner, grad, ctx.batch)
        grad_x = grad_sums @ linear.weight.dense()
        # only the gradients of adapters read x: without an adapter on this layer, nothing is
        # saved in `inner`, x is never used, and recomputing it would be wasted
        x = linear.step.recompute(source, saved) if inner else source
        linear.add_gradients(inner, x, grad_sums, grad_x, ctx.batch)
        if grad_sums is not grad:
            linear.add_undropped(grad - grad_sums, grad_x, ctx.batch)
        return linear.step.backward(grad_x, source, saved), None, None


def _add_lora(part: Part, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Add to `result` in place; return `x @ A.T` of all modules, `[rows, modules * rank]`."""
    h = x.new_empty(len(result), len(part.pairs.a))
    _project(_masked(x, part), part.pairs.a.T, 1.0, h)
    for columns, ranks, b in zip(part.columns, part.ranks, part.pairs.b, strict=True):
        # a view: the update is written into the output of the frozen matmul
        _expand(result[:, columns], h[:, ranks], b.T, part.pairs.scaling)
    return h


def _add_gradients(
    part: Part, h: torch.Tensor, x: torch.Tensor, grad: torch.Tensor, grad_x: torch.Tensor
) -> None:
    """Add to the gradients of A and B and to `grad_x [tokens, inputs]`, all in place."""
    pairs, outer, grad_h = part.pairs, grad[part.rows], torch.empty_like(h)
    for number, (columns, ranks) in enumerate(zip(part.columns, part.ranks, strict=True)):
        _project(outer[:, columns], pairs.b[number], part.pairs.scaling, grad_h[:, ranks])
        if pairs.grad_b:
            _reduce(pairs.grad_b[number].T, h[:, ranks], outer[:, columns], part.pairs.scaling)
    if pairs.grad_a is not None:
        _reduce(pairs.grad_a, grad_h, _masked(x, part), 1.0)
    if part.dropout is None:
        _expand(grad_x[part.rows], grad_h, pairs.a, 1.0)
    else:
        grad_x[part.rows] += (grad_h @ pairs.a).mul_(part.dropout)


def _masked(x: torch.Tensor, part: Part) -> torch.Tensor:
    return x[part.rows] if part.dropout is None else x[part.rows] * part.dropout


def _project(x: torch.Tensor, weight: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Compute `out [tokens, rank] = scale * x @ weight`."""
    if fused_cpu.supports(x):
        fused_cpu.project(x, weight, scale, out)
    else:
        torch.mm(x, weight, out=out).mul_(scale)


def _expand(out: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, scale: float) -> None:
    """Compute `out [tokens, columns] += scale * h [tokens, rank] @ weight`."""
    if fused_cpu.supports(h):
        fused_cpu.expand_(out, h, weight, scale)
    else:
        out.addmm_(h, weight, alpha=scale)


def _reduce(total: torch.Tensor, h: torch.Tensor, x: torch.Tensor, scale: float) -> None:
    """Compute `total [rank, columns] += scale * h [tokens, rank].T @ x`, in float32."""
    if fused_cpu.supports(h):
        fused_cpu.reduce_(total, h, x, scale)
    elif h.dtype == total.dtype:
        total.addmm_(h.T, x, alpha=scale)
    else:
        # matmuls need one dtype, and gradients must not accumulate in half precision
        total.add_(h.T @ x, alpha=scale)
