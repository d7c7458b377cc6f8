"""What follows a product of a decode step inside its kernel: adapters, bias, activation, the sum with the residual."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


@triton.jit
def active(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        value = tl.maximum(value, 0.0)
    elif ACTIVATION == 2:
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == 3:
        value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    elif ACTIVATION == 4:
        value = value * tl.sigmoid(value)
    return value


@triton.jit
def lifted(down, up, row, column, rows, n, rank, PARTS: tl.constexpr, R: tl.constexpr):
    """[BM, BN] in fp32: the sum of down [PARTS, rows, R], rounded, times up [n, rank] transposed."""
    r = tl.arange(0, R)
    live = (row < rows)[:, None]
    place = down + row[:, None] * R + r[None, :]
    low = tl.load(place, mask=live, other=0.0)
    for part in tl.static_range(1, PARTS):
        low += tl.load(place + part * rows * R, mask=live, other=0.0)
    right = up + column[None, :] * rank + r[:, None]
    right = tl.load(right, mask=(column < n)[None, :] & (r < rank)[:, None], other=0.0)
    return tl.dot(low.to(right.dtype), right)


@triton.jit
def finish(
    total, bias, added, down, up, out, row, column, rows, n, rank, factor,
    BIAS: tl.constexpr, ADDED: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Store out [rows, n] = activation(total + bias + factor x lifted) + added, of a tile, rounded once."""
    if PARTS:
        total += lifted(down, up, row, column, rows, n, rank, PARTS, R) * factor
    real = column < n
    if BIAS:
        total += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    total = active(total, ACTIVATION)
    place = row[:, None] * n + column[None, :]
    here = (row < rows)[:, None] & real[None, :]
    if ADDED:
        total += tl.load(added + place, mask=here, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=here)
