"""Triton kernels for the low-rank updates of all adapters of a micro-batch.

A separate matmul for every adapter and module costs more to launch on a GPU than to compute.
These kernels take all adapters and all modules of a linear layer in one launch, as serving
systems do (Punica, arXiv 2310.18547). A program works on a tile: some neighbouring tokens of one
adapter. It reads that adapter's matrices where they lie and adds to its gradients in place, so
nothing is stacked or padded, and ranks and modules may differ between adapters.

A row of the table describes one adapter in int64:

    0                address of its weights, in the dtype of the base
    1                address of its gradients, in float32
    2                rank
    3                bits of the float32 scaling
    HEADER + 2 m     element at which A [rank, inputs] of module m begins, or -1 without it
    HEADER + 2 m + 1 the same of B [outputs, rank]
"""

from __future__ import annotations

import triton
import triton.language as tl

HEADER = tl.constexpr(4)


@triton.jit
def _matrix(table, table_stride, adapter, module, IS_B: tl.constexpr, EVEN_RANKS: tl.constexpr):
    """Return the row of an adapter, the offset of a module's A or B, and the rank."""
    row = table + adapter * table_stride
    offset = tl.multiple_of(tl.load(row + HEADER + 2 * module + IS_B), 8)
    rank = tl.multiple_of(tl.load(row + 2).to(tl.int32), EVEN_RANKS)
    return row, offset, rank


@triton.jit
def _columns_of(starts, number, IS_B: tl.constexpr, MODULES: tl.constexpr, EVEN: tl.constexpr):
    """Return the first column and the number of columns that a matrix is multiplied with.

    B belongs to the output of its module, A to the whole input. Without knowing that both are
    multiples of EVEN, the compiler would read one element at a time.
    """
    if IS_B:
        first = tl.load(starts + number)
        width = tl.load(starts + number + 1) - first
    else:
        first = tl.load(starts)  # 0
        width = tl.load(starts + MODULES + 1)
    return tl.multiple_of(first, EVEN), tl.multiple_of(width, EVEN)


@triton.jit
def _pointer(row, column, dtype: tl.constexpr):
    """Return the address in a row of the table as a pointer."""
    return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(dtype)), 16)


@triton.jit(do_not_specialize=["first_module"])
def project(
    source, source_stride, starts, result, table, table_stride, tiles, first_module,
    IS_B: tl.constexpr, MODULES: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, EVEN_RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `scaling * source @ A.T`, or `scaling * source[:, columns of m] @ B`.

    `result` is `[tokens, modules, RANKS]`; modules without an adapter stay as they are.
    """
    number, tile = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
    adapter = tl.load(tiles + 3 * tile + 2)
    row, offset, rank = _matrix(
        table, table_stride, adapter, first_module + number, IS_B, EVEN_RANKS
    )
    if offset < 0:
        return
    weights = _pointer(row, 0, source.dtype.element_ty) + offset
    scaling = tl.load(row + 3).to(tl.int32).to(tl.float32, bitcast=True)
    first, width = _columns_of(starts, number, IS_B, MODULES, EVEN)
    tokens = (begin + tl.arange(0, TOKENS)).to(tl.int64)
    ranks = tl.arange(0, RANKS)
    total = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
    for at in range(0, width, COLUMNS):
        columns = at + tl.arange(0, COLUMNS)
        x = tl.load(
            source + tokens[:, None] * source_stride + first + columns[None, :],
            mask=(tokens[:, None] < end) & (columns[None, :] < width),
            other=0.0,
        )
        if IS_B:
            offsets = columns[:, None] * rank + ranks[None, :]
        else:
            offsets = ranks[None, :] * width + columns[:, None]
        live = (columns[:, None] < width) & (ranks[None, :] < rank)
        w = tl.load(weights + offsets, mask=live, other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    offsets = tokens[:, None] * (MODULES * RANKS) + number * RANKS + ranks[None, :]
    value = (total * scaling).to(result.dtype.element_ty)
    tl.store(result + offsets, value, mask=tokens[:, None] < end)


@triton.jit(do_not_specialize=["first_module"])
def expand(
    inner, starts, result, result_stride, table, table_stride, tiles, first_module,
    IS_B: tl.constexpr, MODULES: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, EVEN_RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add `inner @ B.T` to the columns of each module, or the sum of all `inner @ A`."""
    block, tile = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
    adapter = tl.load(tiles + 3 * tile + 2)
    number = tl.program_id(2)  # 0 for A, whose programs take all modules
    first, width = _columns_of(starts, number, IS_B, MODULES, EVEN)
    if block * COLUMNS >= width:
        return
    tokens = (begin + tl.arange(0, TOKENS)).to(tl.int64)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANKS)
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    present = 0
    for step in range(1 if IS_B else MODULES):
        module = number + step
        row, offset, rank = _matrix(
            table, table_stride, adapter, first_module + module, IS_B, EVEN_RANKS
        )
        if offset >= 0:
            present += 1
            weights = _pointer(row, 0, result.dtype.element_ty) + offset
            offsets = tokens[:, None] * (MODULES * RANKS) + module * RANKS + ranks[None, :]
            h = tl.load(inner + offsets, mask=tokens[:, None] < end, other=0.0)
            if IS_B:
                offsets = columns[None, :] * rank + ranks[:, None]
            else:
                offsets = ranks[:, None] * width + columns[None, :]
            live = (columns[None, :] < width) & (ranks[:, None] < rank)
            w = tl.load(weights + offsets, mask=live, other=0.0)
            total = tl.dot(h, w, total, input_precision=PRECISION)
    if present == 0:
        return
    offsets = result + tokens[:, None] * result_stride + first + columns[None, :]
    live = (tokens[:, None] < end) & (columns[None, :] < width)
    value = tl.load(offsets, mask=live, other=0.0).to(tl.float32) + total
    tl.store(offsets, value.to(result.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["first_module"])
def accumulate(
    source, source_stride, inner, starts, table, table_stride, spans, first_module,
    IS_B: tl.constexpr, MODULES: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, EVEN_RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add `source.T @ inner` over an adapter's tokens to the gradient of A or B."""
    block, span, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, end = tl.load(spans + 2 * span), tl.load(spans + 2 * span + 1)
    row, offset, rank = _matrix(table, table_stride, span, first_module + number, IS_B, EVEN_RANKS)
    if offset < 0:
        return
    first, width = _columns_of(starts, number, IS_B, MODULES, EVEN)
    if block * COLUMNS >= width:
        return
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANKS)
    total = tl.zeros((COLUMNS, RANKS), dtype=tl.float32)
    for at in range(begin, end, TOKENS):
        tokens = (at + tl.arange(0, TOKENS)).to(tl.int64)
        x = tl.load(
            source + tokens[None, :] * source_stride + first + columns[:, None],
            mask=(tokens[None, :] < end) & (columns[:, None] < width),
            other=0.0,
        )
        offsets = tokens[:, None] * (MODULES * RANKS) + number * RANKS + ranks[None, :]
        h = tl.load(inner + offsets, mask=tokens[:, None] < end, other=0.0)
        total = tl.dot(x, h, total, input_precision=PRECISION)
    gradients = _pointer(row, 1, tl.float32) + offset
    if IS_B:
        offsets = columns[:, None] * rank + ranks[None, :]
    else:
        offsets = ranks[None, :] * width + columns[:, None]
    live = (columns[:, None] < width) & (ranks[None, :] < rank)
    value = tl.load(gradients + offsets, mask=live, other=0.0) + total
    tl.store(gradients + offsets, value, mask=live)
