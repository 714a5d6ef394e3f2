"""The frozen product with the small products of every adapter beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tinyllama_lab.core.packed.adapter import Pair
from tinyllama_lab.core.packed.batch import PackedBatch
from tinyllama_lab.core.packed.dropout import mask
from tinyllama_lab.core.packed.elementwise import Step
from tinyllama_lab.core.packed.layout import Layout
from tinyllama_lab.core.packed.stack import Stack
from tinyllama_lab.core.packed.weights import FrozenWeight


class Part(NamedTuple):
    """One adapter on one module: which rows and which columns of the product are its own."""

    pair: Pair
    rows: slice
    columns: slice
    scaling: float
    dropout: torch.Tensor | None  # [rows, inputs] zeros, and what makes up for them


class Product:
    """`step(source) @ weight.T`, to which every adapter adds `scaling * x @ A.T @ B.T`."""

    def __init__(self, step: Step, weight: FrozenWeight, modules: Sequence[str]) -> None:
        self.step = step
        self.weight = weight
        self._modules = list(modules)

    def __call__(self, source: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """`source [tokens, …]` to `[tokens, outputs]`; gradients of adapters add up in place."""
        result: torch.Tensor = _Apply.apply(source, self, batch)
        return result

    def columns(self, layout: Layout) -> list[tuple[str, slice]]:
        """The modules that a layout has places for, and their columns of the product."""
        found, begin = [], 0
        for name, outputs in zip(self._modules, self.weight.outputs, strict=True):
            if name in layout.places:
                found.append((name, slice(begin, begin + outputs)))
            begin += outputs
        return found

    def parts(self, batch: PackedBatch, x: torch.Tensor) -> Iterator[Part]:
        """Every adapter on every module, in the same order each time."""
        for span in batch.spans:
            rows, begin = slice(span.begin, span.end), 0
            for name, outputs in zip(self._modules, self.weight.outputs, strict=True):
                columns, begin = slice(begin, begin + outputs), begin + outputs
                if pair := span.adapter.pairs.get(name):
                    hidden = None
                    if span.adapter.dropout and batch.dropout_keys is not None:
                        keys, share = batch.dropout_keys[rows], span.adapter.dropout
                        hidden = mask(keys, name, x.shape[1], share).to(x.dtype)
                    yield Part(pair, rows, columns, span.adapter.scaling, hidden)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, source: torch.Tensor, product: Product, batch: PackedBatch
    ) -> torch.Tensor:
        x, kept = product.step.forward(source)
        result = x @ product.weight.dense().T
        inner = []
        if batch.stack is not None:
            for module, columns in product.columns(batch.stack.layout):
                inner.append(batch.stack.forward(module, x, result[:, columns]))
        else:
            for part in product.parts(batch, x):
                h = _masked(x, part) @ part.pair.a.T
                result[part.rows, part.columns].addmm_(h, part.pair.b.T, alpha=part.scaling)
                inner.append(h)
        ctx.product, ctx.batch = product, batch
        ctx.save_for_backward(source, kept, *inner)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source, kept, *inner = ctx.saved_tensors
        product: Product = ctx.product
        grad_x = grad @ product.weight.dense()
        stack: Stack | None = ctx.batch.stack
        x = product.step.again(source, kept) if inner else source
        if stack is not None:
            for (module, columns), h in zip(product.columns(stack.layout), inner, strict=True):
                grad_x.add_(stack.backward(module, x, h, grad[:, columns]))
        else:
            for part, h in zip(product.parts(ctx.batch, x), inner, strict=True):
                _add_gradients(part, h, x, grad, grad_x)
        return product.step.backward(grad_x, source, kept), None, None


def _add_gradients(
    part: Part, h: torch.Tensor, x: torch.Tensor, grad: torch.Tensor, grad_x: torch.Tensor
) -> None:
    pair, outer = part.pair, grad[part.rows, part.columns]
    grad_h = (outer @ pair.b).mul_(part.scaling)
    _accumulate(pair.grad_b, outer.T, h, part.scaling)
    _accumulate(pair.grad_a, grad_h.T, _masked(x, part), 1.0)
    if part.dropout is None:
        grad_x[part.rows].addmm_(grad_h, pair.a)
    else:
        grad_x[part.rows] += (grad_h @ pair.a).mul_(part.dropout)


def _masked(x: torch.Tensor, part: Part) -> torch.Tensor:
    return x[part.rows] if part.dropout is None else x[part.rows] * part.dropout


def _accumulate(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float
) -> None:
    """`total += scale * left @ right`; the total is float32, the factors may be narrower."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)
