"""Triton kernels for the elementwise steps between matmuls, each one launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_forward(source, weight, result, rstd, size, eps, SIZE: tl.constexpr):
    """RMS norm of one row, rounded to the dtype before the weight, as in transformers."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    live = at < size
    x = tl.load(source + row * size + at, mask=live, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    tl.store(rstd + row, scale)
    w = tl.load(weight + at, mask=live, other=0.0).to(tl.float32)
    y = (x * scale).to(result.dtype.element_ty).to(tl.float32) * w
    tl.store(result + row * size + at, y.to(result.dtype.element_ty), mask=live)


@triton.jit
def norm_backward(grad, source, rstd, weight, result, size, SIZE: tl.constexpr):
    """Gradient of the RMS norm of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    live = at < size
    x = tl.load(source + row * size + at, mask=live, other=0.0).to(tl.float32)
    dy = tl.load(grad + row * size + at, mask=live, other=0.0).to(tl.float32)
    dy *= tl.load(weight + at, mask=live, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row)
    mean = tl.sum(dy * x, axis=0) / size
    dx = dy * scale - x * (mean * scale * scale * scale)
    tl.store(result + row * size + at, dx.to(result.dtype.element_ty), mask=live)


@triton.jit
def swiglu_forward(source, result, size, BLOCK: tl.constexpr):
    """`silu(gate) * up` of a block of one row of `[gate | up]`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    gate = tl.load(source + row * 2 * size + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(source + row * 2 * size + size + at, mask=live, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(result.dtype.element_ty).to(tl.float32)
    tl.store(result + row * size + at, (silu * up).to(result.dtype.element_ty), mask=live)


@triton.jit
def swiglu_backward(grad, source, result, size, BLOCK: tl.constexpr):
    """`[d gate | d up]` of a block of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    gate = tl.load(source + row * 2 * size + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(source + row * 2 * size + size + at, mask=live, other=0.0).to(tl.float32)
    dy = tl.load(grad + row * size + at, mask=live, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    for_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    for_up = dy * gate * sigmoid
    out = result + row * 2 * size + at
    tl.store(out, for_gate.to(result.dtype.element_ty), mask=live)
    tl.store(out + size, for_up.to(result.dtype.element_ty), mask=live)


@triton.jit
def rotary(
    source, result, cos, sin, positions, rotated, width, sign,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate the first `rotated` columns of one row, heads of SIZE; copy the others.

    A pair of columns is (n, n + SIZE / 2) of one head. A `sign` of -1 rotates back.
    """
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    HALF: tl.constexpr = SIZE // 2
    inside = pair % HALF
    first = (pair // HALF) * SIZE + inside
    live = first < width
    a = tl.load(source + row * width + first, mask=live, other=0.0).to(tl.float32)
    b = tl.load(source + row * width + first + HALF, mask=live, other=0.0).to(tl.float32)
    at = tl.load(positions + row) * SIZE + inside
    turns = first < rotated
    c = tl.load(cos + at, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=turns, other=0.0).to(tl.float32) * sign
    tl.store(result + row * width + first, (a * c - b * s).to(result.dtype.element_ty), mask=live)
    out = (b * c + a * s).to(result.dtype.element_ty)
    tl.store(result + row * width + first + HALF, out, mask=live)
