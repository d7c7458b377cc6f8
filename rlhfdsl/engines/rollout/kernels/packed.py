"""A Triton kernel for products with weights in 4 bits (models/quantized.py), of the rows of a decode step.

bitsandbytes reads such weights back into the engine's type first, which moves nine times what they take. Here a tile
is read as it lies, and its codes become values in registers. A value is one of sixteen, in bf16, times the scale of
its block, in fp32. Multiplied by `STRETCH` before they are rounded, the sixteen are as near to NF4's as bf16 has them:
such weights are nearer to the exact ones than those read back, whose every product is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rlhfdsl.engines.rollout.kernels import lowrank
from rlhfdsl.engines.rollout.kernels.epilogue import ACTIVATIONS, finish
from rlhfdsl.engines.rollout.kernels.launch import early_launch
from rlhfdsl.engines.rollout.operands import Adapter, Packed

ROWS = 32
DEPTH = 256  # weights of a row that a warp reads in one turn: four blocks of one scale each
WARPS = 4
# NF4 (Dettmers et al. 2023, arXiv 2305.14314, appendix E)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
STRETCH = 1.437


def takes(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> bool:
    """Whether `product` is meant for these."""
    k = weight.shape[1]
    here = x.is_cuda and torch.version.hip is None and x.dtype == torch.bfloat16
    return here and (bias is None or bias.dtype == x.dtype) and 0 < x.numel() <= ROWS * k and k % DEPTH == 0


def product(
    x: torch.Tensor, weight: Packed, bias: torch.Tensor | None, adapter: Adapter | None,
    activation: str | None, added: torch.Tensor | None, out: torch.Tensor,
) -> None:  # fmt: skip
    """As `dense.product`."""
    n, k = weight.shape
    rows = x.numel() // k
    arguments, constants = lowrank.lowered(x, adapter)
    # of those tried on an H100; the warps of a program share out the depth
    block_n = 16 if rows <= 16 and n <= 12_288 else 32
    _product[(triton.cdiv(n, block_n),)](
        x.view(torch.int32), weight.codes, weight.scales.view(torch.int32), weight.table, weight.maxima, weight.offset,
        x if bias is None else bias, x if added is None else added, *arguments, out, rows, n, k,
        BM=max(16, triton.next_power_of_2(rows)), BN=block_n, SPLIT=WARPS, BIAS=bias is not None,
        ADDED=added is not None, ACTIVATION=ACTIVATIONS[activation], **constants, UNSTRETCHED=1 / STRETCH,
        num_warps=WARPS, **early_launch(x.device),
    )  # fmt: skip


def _tables() -> tuple[list[int], list[int]]:
    """The upper and the lower bytes of the sixteen values, four to a word."""
    bits = (torch.tensor(NF4, dtype=torch.float64) * STRETCH).to(torch.bfloat16).view(torch.int16)
    words = []
    for shift in (8, 0):
        of = [(int(value) >> shift) & 0xFF for value in bits]
        words.append([sum(byte << (8 * i) for i, byte in enumerate(of[at : at + 4])) for at in range(0, 16, 4)])
    return words[0], words[1]


def _unpacking() -> str:
    """PTX that makes of four bytes of codes ($4) the four values of their upper and the four of their lower halves.

    `prmt` looks four codes up at once in eight bytes of a table: upper and lower bytes of the values for codes below 8
    and from there on, between which each code's highest bit decides, made a mask by `prmt` too.
    """
    upper, lower = ([f"0x{word:08x}" for word in words] for words in _tables())
    lines = [".reg .b32 w, s, a, b, m, h, l;", "shl.b32 w, $4, 4;", "and.b32 s, $4, 0x77777777;"]
    for half, masks in enumerate(("0xd9c8", "0xfbea")):
        lines += [f"prmt.b32 m, w, $4, {masks};"]
        for byte, words in (("h", upper), ("l", lower)):
            lines += [f"prmt.b32 a, {words[0]}, {words[1]}, s;", f"prmt.b32 b, {words[2]}, {words[3]}, s;"]
            lines += [f"lop3.b32 {byte}, a, b, m, 0xd8;"]  # b where m, else a
        lines += [f"prmt.b32 ${half}, l, h, 0x7351;", f"prmt.b32 ${2 + half}, l, h, 0x6240;"]
        lines += ["shr.b32 s, s, 16;"] * (1 - half)
    return "{\n" + "\n".join(lines) + "\n}"


_UNPACKING = tl.constexpr(_unpacking())


@triton.jit
def _product(
    x, codes, scales, table, maxima, offset, bias, added, down, up, rank, factor, out, rows, n, k,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    ADDED: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, UNSTRETCHED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.arange(0, BM)
    pair = tl.arange(0, 32)  # a byte, or two of x's
    part = tl.arange(0, SPLIT)
    real = column < n
    at = column.to(tl.int64)
    if EARLY:
        gdc_wait()
    shift = tl.load(offset)
    left = x + part[:, None, None] * 128 + row[None, :, None] * (k // 2) + pair[None, None, :]
    right = codes + part[:, None, None] * 128 + at[None, None, :] * (k // 2) + pair[None, :, None]
    fours = scales + part[:, None] + at[None, :] * (k // 256)
    group = part[:, None] * 4 + at[None, :] * (k // 64)
    total = tl.zeros((SPLIT, BM, BN), dtype=tl.float32)
    for start in tl.range(0, k, 256 * SPLIT, num_stages=2):
        within = start + part * 256 < k
        there = within[:, None] & real[None, :]
        four = tl.load(fours + start // 256, mask=there, other=0)
        top = tl.load(maxima + ((group + start // 64) >> 8), mask=there, other=0.0)
        for block in tl.static_range(4):
            here = start // 2 + 32 * block
            a = tl.load(left + here, mask=within[:, None, None] & (row < rows)[None, :, None], other=0)
            b = tl.load(right + here, mask=there[:, None, :], other=0, eviction_policy="evict_first")
            even, odd = tl.inline_asm_elementwise(
                _UNPACKING, "=&r,=&r,=&r,=&r,r", [b], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
            sums = tl.dot((a & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True), even)
            sums = tl.dot((a >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), odd, sums)
            # in assembly, so that it is not read ahead with what comes from memory
            scale = tl.inline_asm_elementwise(
                "ld.global.nc.f32 $0, [$1];", "=f,l", [table + ((four >> (8 * block)) & 0xFF)], dtype=tl.float32,
                is_pure=True, pack=1,
            )  # fmt: skip
            total += sums * (scale * top + shift)[:, None, :]
    if EARLY:
        gdc_launch_dependents()
    finish(
        tl.sum(total, 0) * UNSTRETCHED, bias, added, down, up, out, row, column, rows, n, rank, factor,
        BIAS, ADDED, ACTIVATION, PARTS, R,
    )  # fmt: skip
