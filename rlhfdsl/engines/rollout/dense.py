"""Triton kernels for the dense layers of a decode step: a product with what follows it, and norms, of a few rows.

Such a product reads its weights once and computes next to nothing, so what counts is that memory is never idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rlhfdsl.engines.rollout.launch import early_launch

ROWS = 32  # more are left to cuBLAS
COLUMNS = 1024  # of the output; fewer do not keep a GPU busy
WIDTH = 16_384  # elements of a row that a norm reads at once
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def takes_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `product` is meant for these."""
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
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    added: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """out [..., N] = activation(x [..., K] @ weight [N, K]^T + bias [N]) + added [..., N], rounded once.

    At most `ROWS` rows; sums in fp32. activation: a name of `ACTIVATIONS`.
    """
    n, k = weight.shape
    rows = x.numel() // k
    x = x.contiguous()
    added = None if added is None else added.contiguous()
    block_n, block_k, stages = _tile(n, k, rows)
    _product[(triton.cdiv(n, block_n),)](
        x, weight, weight if bias is None else bias, x if added is None else added, out, rows, n, k,
        BM=max(16, triton.next_power_of_2(rows)), BN=block_n, BK=block_k, STAGES=stages, BIAS=bias is not None,
        ADDED=added is not None, ACTIVATION=ACTIVATIONS[activation], num_warps=4, **early_launch(x.device),
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
    x, weight, bias, added, out, rows, n, k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
    ADDED: tl.constexpr, ACTIVATION: tl.constexpr, EARLY: tl.constexpr,
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
    if BIAS:
        total += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == 1:
        total = tl.maximum(total, 0.0)
    elif ACTIVATION == 2:
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    elif ACTIVATION == 3:
        total = total * tl.sigmoid(1.5957691216057308 * (total + 0.044715 * total * total * total))
    elif ACTIVATION == 4:
        total = total * tl.sigmoid(total)
    place = row[:, None] * n + column[None, :]
    here = (row < rows)[:, None] & real[None, :]
    if ADDED:
        total += tl.load(added + place, mask=here, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=here)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """As `torch.nn.functional.layer_norm` over the last dimension, of half types."""
    return _normed(x, weight, bias, eps, centred=True)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's type and then times weight (Zhang and Sennrich 2019, as in Llama)."""
    return _normed(x, weight, None, eps, centred=False)


def _normed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, centred: bool
) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _norm[(x.numel() // width,)](
        x, weight, weight if bias is None else bias, out, width, eps, WIDTH=triton.next_power_of_2(width),
        CENTRED=centred, BIAS=bias is not None, num_warps=8 if width > 1024 else 4, **early_launch(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _norm(
    x, weight, bias, out, width, eps,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    real = column < width
    scale = tl.load(weight + column, mask=real, other=0.0)
    if EARLY:
        gdc_wait()
    value = tl.load(x + row * width + column, mask=real, other=0.0).to(tl.float32)
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
