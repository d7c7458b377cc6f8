"""Triton kernels for the adapters of a decode step: x A^T B^T beside a product of few rows.

A has few rows and its whole depth is summed for each: cut along the depth it is work for many multiprocessors. B and
the sum are the end of the product's own kernel (`epilogue.lifted`), or one kernel after it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rlhfdsl.engines.rollout.kernels.epilogue import finish
from rlhfdsl.engines.rollout.kernels.launch import early_launch
from rlhfdsl.engines.rollout.operands import Adapter

RANK = 64  # more do not fit beside a tile
BLOCK = 128  # of the depth, at once
DEPTH = 512  # of one program at least
PARTS = 16  # of the depth at most; each tile of the product reads them all


def takes(x: torch.Tensor, adapter: Adapter) -> bool:
    """Whether these kernels are meant for these."""
    parts = adapter.down, adapter.up
    return (
        x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and len(adapter.down) <= RANK
        and all(part.dtype == x.dtype and part.is_contiguous() for part in parts)
    )  # fmt: skip


Told = tuple[tuple[torch.Tensor, torch.Tensor, int, float], dict[str, int]]
"""What a kernel that ends in `finish` is told of an adapter: down, up, rank and factor; its constants."""


def lowered(x: torch.Tensor, adapter: Adapter | None) -> Told:
    """x A^T, computed here in parts of its depth, and the rest of the adapter; or that there is none."""
    if adapter is None:
        return (x, x, 0, 0.0), {"PARTS": 0, "R": 16}
    rank, k = adapter.down.shape
    rows = x.numel() // k
    parts = min(max(k // DEPTH, 1), PARTS)
    depth = triton.cdiv(triton.cdiv(k, parts), BLOCK) * BLOCK
    parts = triton.cdiv(k, depth)
    wide = max(16, triton.next_power_of_2(rank))
    down = torch.empty(parts, rows, wide, dtype=torch.float32, device=x.device)
    block = 16 if rows <= 16 else 32
    _down[(parts, triton.cdiv(rows, block))](
        x, adapter.down, down, rows, k, rank, DEPTH=depth, BM=block, BK=BLOCK, R=wide, num_warps=4,
        **early_launch(x.device),
    )  # fmt: skip
    return (down, adapter.up, rank, adapter.factor), {"PARTS": parts, "R": wide}


@triton.jit
def _down(
    x, weight, out, rows, k, rank,
    DEPTH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    r = tl.arange(0, R)
    if EARLY:
        gdc_wait()
    total = tl.zeros((BM, R), dtype=tl.float32)
    for start in tl.range(part * DEPTH, part * DEPTH + DEPTH, BK, num_stages=4):
        depth = start + tl.arange(0, BK)
        real = depth < k
        a = tl.load(x + row[:, None] * k + depth[None, :], mask=(row < rows)[:, None] & real[None, :], other=0.0)
        b = tl.load(weight + r[None, :] * k + depth[:, None], mask=(r < rank)[None, :] & real[:, None], other=0.0)
        total = tl.dot(a, b, total)
    if EARLY:
        gdc_launch_dependents()
    place = out + (part * rows + row[:, None]) * R + r[None, :]
    tl.store(place, total, mask=(row < rows)[:, None])


def added(base: torch.Tensor, x: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """base [..., N] + factor x A^T B^T, rounded once. base: a linear layer's output for x [..., K]."""
    base, x = base.contiguous(), x.contiguous()
    n = base.shape[-1]
    rows = base.numel() // n
    arguments, constants = lowered(x, adapter)
    out = torch.empty_like(base)
    block = 16 if rows <= 16 else 32
    _up[(triton.cdiv(n, 128), triton.cdiv(rows, block))](
        base, *arguments, out, rows, n, BM=block, BN=128, **constants, num_warps=4, **early_launch(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _up(
    base, down, up, rank, factor, out, rows, n,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((BM, BN), dtype=tl.float32)
    finish(total, base, base, down, up, out, row, column, rows, n, rank, factor, False, True, 0, PARTS, R)
