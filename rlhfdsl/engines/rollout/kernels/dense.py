"""Triton kernels for the dense layers of a decode step: norms with the sum before them, activations with the product
after them, and of a few rows the products of linear layers with what follows them.

Such a product reads its weights once and computes next to nothing, so what counts is that memory is never idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rlhfdsl.engines.rollout.kernels import lowrank, packed
from rlhfdsl.engines.rollout.kernels.epilogue import ACTIVATIONS, active, finish
from rlhfdsl.engines.rollout.kernels.launch import early_launch
from rlhfdsl.engines.rollout.operands import Adapter, Packed

ROWS = 32  # more are left to cuBLAS
COLUMNS = 1024  # of the output; fewer do not keep a GPU busy
WIDTH = 16_384  # elements of a row that a norm reads at once
BLOCK = 1024  # elements of a row that one program activates


def takes_product(x: torch.Tensor, weight: torch.Tensor | Packed, bias: torch.Tensor | None) -> bool:
    """Whether `product` is meant for these."""
    if isinstance(weight, Packed):
        return packed.takes(x, weight, bias)
    if weight.dim() != 2:
        return False
    n, k = weight.shape
    return (
        x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and weight.dtype == x.dtype
        and (bias is None or bias.dtype == x.dtype) and weight.is_contiguous() and weight.data_ptr() % 16 == 0
        and 0 < x.numel() <= ROWS * k and n >= COLUMNS and k % 256 == 0
    )  # fmt: skip


def takes_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `layer_norm` and `rms_norm` are meant for these."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and half and weight.dtype == x.dtype and weight.dim() == 1 and x.shape[-1] <= WIDTH


def product(
    x: torch.Tensor,
    weight: torch.Tensor | Packed,
    bias: torch.Tensor | None,
    adapter: Adapter | None,
    activation: str | None,
    added: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """out [..., N] = activation(x [..., K] @ weight [N, K]^T + adapter + bias [N]) + added [..., N], rounded once.

    At most `ROWS` rows; sums in fp32. adapter: which must be one that `takes_adapter`. activation: a name of
    `ACTIVATIONS`.
    """
    x = x.contiguous()
    added = None if added is None else added.contiguous()
    if isinstance(weight, Packed):
        packed.product(x, weight, bias, adapter, activation, added, out)
        return
    n, k = weight.shape
    rows = x.numel() // k
    block_n, block_k, stages = _tile(n, k, rows)
    arguments, constants = lowrank.lowered(x, adapter)
    _product[(triton.cdiv(n, block_n),)](
        x, weight, weight if bias is None else bias, x if added is None else added, *arguments, out, rows, n, k,
        BM=max(16, triton.next_power_of_2(rows)), BN=block_n, BK=block_k, STAGES=stages, BIAS=bias is not None,
        ADDED=added is not None, ACTIVATION=ACTIVATIONS[activation], **constants, num_warps=4, **early_launch(x.device),
    )  # fmt: skip


def _tile(n: int, k: int, rows: int) -> tuple[int, int, int]:
    """Columns and depth of a tile and how many are on their way, so that every multiprocessor has work.

    The best of those tried on an H100 for OPT-1.3B.
    """
    if n <= 4096:
        return (16, 512, 6) if rows <= 16 and k % 512 == 0 else (16, 256, 4)  # what shared memory holds
    return (32, 128, 4) if n <= 32_768 else (64, 256, 3)


@triton.jit
def _product(
    x, weight, bias, added, down, up, rank, factor, out, rows, n, k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
    ADDED: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BN
    column = first + tl.arange(0, BN)
    row = tl.arange(0, BM)
    depth = tl.arange(0, BK)
    real = column < n
    if EARLY:
        gdc_wait()
    left = x + row[:, None] * k + depth[None, :]
    right = weight + column[None, :].to(tl.int64) * k + depth[:, None]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in tl.range(0, k, BK, num_stages=STAGES):
        a = tl.load(left + start, mask=(row < rows)[:, None], other=0.0)
        b = tl.load(right + start, mask=real[None, :], other=0.0, eviction_policy="evict_first")
        total = tl.dot(a, b, total)
    if EARLY:
        gdc_launch_dependents()
    finish(
        total, bias, added, down, up, out, row, column, rows, n, rank, factor, BIAS, ADDED, ACTIVATION, PARTS, R
    )  # fmt: skip


def takes_adapter(x: torch.Tensor, adapter: Adapter) -> bool:
    """Whether `product` and `adapted` are meant for such an adapter."""
    return lowrank.takes(x, adapter)


def adapted(base: torch.Tensor, x: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """base [..., N], a linear layer's output for x [..., K], and what its adapter adds, rounded once."""
    return lowrank.added(base, x, adapter)


def takes_rows(x: torch.Tensor) -> bool:
    """Whether `activated`, and a norm's sum, are meant for this."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and half and x.dim() >= 2 and x.stride(-1) == 1 and x.numel() > 0


def activated(x: torch.Tensor, activation: str, factor: torch.Tensor | None, out: torch.Tensor) -> None:
    """out [..., N] = activation(x [..., K]) rounded, times factor [..., N] if there is one."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    factors = rows if factor is None else factor.reshape(-1, width)
    _activated[(len(rows), triton.cdiv(width, BLOCK))](
        rows, factors, out, width, rows.stride(0), factors.stride(0), ACTIVATION=ACTIVATIONS[activation],
        FACTOR=factor is not None, BLOCK=BLOCK, num_warps=4, **early_launch(x.device),
    )  # fmt: skip


@triton.jit
def _activated(
    x, factor, out, width, x_row, factor_row,
    ACTIVATION: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    if EARLY:
        gdc_wait()
    value = tl.load(x + row * x_row + column, mask=real, other=0.0)
    value = active(value.to(tl.float32), ACTIVATION).to(out.dtype.element_ty)
    if FACTOR:
        value = value * tl.load(factor + row * factor_row + column, mask=real, other=0.0)
    if EARLY:
        gdc_launch_dependents()
    tl.store(out + row * width + column, value, mask=real)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float,
    added: torch.Tensor | None = None, total: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """As `torch.nn.functional.layer_norm` over the last dimension, of half types.

    added: the norm is of x + added, rounded, which also goes to `total`.
    """
    return _normed(x, weight, bias, eps, added, total, centred=True)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float,
    added: torch.Tensor | None = None, total: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x / sqrt(mean(x^2) + eps), rounded to x's type and then times weight (Zhang and Sennrich 2019, as in Llama).

    added, total: as in `layer_norm`.
    """
    return _normed(x, weight, None, eps, added, total, centred=False)


def _normed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float,
    added: torch.Tensor | None, total: torch.Tensor | None, centred: bool,
) -> torch.Tensor:  # fmt: skip
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _norm[(x.numel() // width,)](
        x, x if added is None else added, x if total is None else total, weight, weight if bias is None else bias, out,
        width, eps, WIDTH=triton.next_power_of_2(width), CENTRED=centred, BIAS=bias is not None,
        ADDED=added is not None, num_warps=8 if width > 1024 else 4, **early_launch(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _norm(
    x, added, total, weight, bias, out, width, eps,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    real = column < width
    scale = tl.load(weight + column, mask=real, other=0.0)
    if EARLY:
        gdc_wait()
    value = tl.load(x + row * width + column, mask=real, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(added + row * width + column, mask=real, other=0.0).to(tl.float32)
        rounded = value.to(out.dtype.element_ty)
        tl.store(total + row * width + column, rounded, mask=real)
        value = rounded.to(tl.float32)
    if CENTRED:
        value = tl.where(real, value - tl.sum(value, 0) / width, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    if CENTRED:
        value = value * scale.to(tl.float32)
    else:
        value = value.to(out.dtype.element_ty).to(tl.float32) * scale.to(tl.float32)
    if BIAS:
        value += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=real)
