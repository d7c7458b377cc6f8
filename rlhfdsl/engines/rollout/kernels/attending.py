"""A Triton kernel of the decode step: keep a token's keys and values, and attend over the live columns.

It reads its sizes that change during a rollout (row lengths) from memory, so that one captured CUDA graph serves all
steps. Where a row is idle (length 0) nothing is read for it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rlhfdsl.engines.rollout.kernels.launch import early_launch

_PROGRAMS = 1024  # programs that keep a GPU busy: a row's columns are split until there are about as many
_MAX_SPLITS = 16
_TILE = 2048  # elements that a warp holds of the keys that it reads at a time, and of the sums of its heads
_MOST_WARPS = 8


def attend(
    query: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of one query a row, [B, H, 1, D], over the first `lengths` [B] columns of its row's cache.

    new_keys, new_values [B, Hkv, 1, D]: of the last of these columns, where they are put. keys, values
    [B, Hkv, columns, D]; H is a multiple of Hkv. window: only the last so many columns count. softcap: scores become
    c tanh(score / c). bias [H, at least columns]: added to a head's scores by their column, and the sum is rounded to
    its dtype. A row of length 0 gives zeros and keeps its cache. Flash decoding (Dao et al. 2023): the columns of a row
    are split over programs, and the last of them to end joins their sums.
    """
    batch, heads, _, size = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    splits = triton.next_power_of_2(triton.cdiv(_PROGRAMS, batch * kv_heads))
    splits = min(splits, _MAX_SPLITS)
    padded = triton.next_power_of_2(size)
    group_padded = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    block = max(16, min(128, _TILE // padded))
    warps = min(max(block, group_padded) * padded // _TILE, _MOST_WARPS)
    query, new_keys, new_values = (x if x.stride(3) == 1 else x.contiguous() for x in (query, new_keys, new_values))
    out = torch.empty(batch, heads, 1, size, dtype=query.dtype, device=query.device)
    partial = sums = arrived = out
    if splits > 1:
        partial = torch.empty(batch, heads, splits, padded, dtype=torch.float32, device=query.device)
        sums = torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=query.device)
        arrived = _counters(batch * kv_heads, query.device)
    _attend[(batch * kv_heads, splits)](
        query, new_keys, new_values, keys, values, lengths, query if bias is None else bias,
        out, partial, sums, arrived, scale, window or 0, softcap or 0.0, 0 if bias is None else bias.stride(0),
        query.stride(0), query.stride(1), new_keys.stride(0), new_keys.stride(1),
        new_values.stride(0), new_values.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
        values.stride(0), values.stride(1), values.stride(2),
        KV_HEADS=kv_heads, G=group, GP=group_padded,
        D=size, DP=padded, BLOCK=block, SPLITS=splits, WINDOW=window is not None, SOFTCAP=softcap is not None,
        BIAS=bias is not None, num_warps=max(warps, 1), **early_launch(query.device),
    )  # fmt: skip
    return out


@cache
def _counters(count: int, device: torch.device) -> torch.Tensor:
    """Zeros that every call leaves as zeros: calls follow one another on a device."""
    return torch.zeros(count, dtype=torch.int32, device=device)


@triton.jit
def _scores(
    score, heads, column, counted, bias, bias_head, scale, softcap, SOFTCAP: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Scores [GP, N] in powers of 2, from products of queries and keys."""
    LOG2E: tl.constexpr = 1.4426950408889634
    score = score * scale
    if SOFTCAP:
        score = softcap * libdevice.tanh(score / softcap)
    if BIAS:
        added = tl.load(bias + heads[:, None] * bias_head + column[None, :], mask=counted, other=0.0)
        score = (score + added.to(tl.float32)).to(added.dtype).to(tl.float32)
    return score * LOG2E


@triton.jit
def _attend(
    query, new_keys, new_values, keys, values, lengths, bias, out, partial, sums, arrived,
    scale, window, softcap, bias_head,
    q_row, q_head, nk_row, nk_head, nv_row, nv_head, k_row, k_head, k_column, v_row, v_head, v_column,
    KV_HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row = (pair // KV_HEADS).to(tl.int64)
    kv_head = pair % KV_HEADS
    split = tl.program_id(1)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    n = tl.arange(0, BLOCK)
    heads = kv_head * G + g
    real = (g < G)[:, None] & (d < D)[None, :]
    key_base = keys + row * k_row + kv_head * k_head
    value_base = values + row * v_row + kv_head * v_head
    if EARLY:
        gdc_wait()
    length = tl.load(lengths + row).to(tl.int32)
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK) * BLOCK
    low = first + split * share
    high = tl.minimum(low + share, length)

    # the program whose columns end with the row's begins with the new one
    q = tl.load(query + row * q_row + heads[:, None] * q_head + d[None, :], mask=real, other=0.0)
    newest = length - 1
    mine = (newest >= low) & (newest < high)
    kept = (d < D) & mine
    key = tl.load(new_keys + row * nk_row + kv_head * nk_head + d, mask=kept, other=0.0)
    value = tl.load(new_values + row * nv_row + kv_head * nv_head + d, mask=kept, other=0.0)
    tl.store(key_base + newest * k_column + d, key, mask=kept)
    tl.store(value_base + newest * v_column + d, value, mask=kept)
    begun = tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], 1)[:, None]
    at, there = newest + tl.arange(0, 1), (g < G)[:, None] & mine
    begun = _scores(begun, heads, at, there, bias, bias_head, scale, softcap, SOFTCAP, BIAS)
    top = tl.where(mine, tl.max(begun, 1), -float("inf"))
    total = tl.where(mine, tl.full([GP], 1.0, tl.float32), 0.0)
    acc = tl.zeros([GP, DP], tl.float32) + value.to(tl.float32)[None, :]
    high = tl.minimum(high, newest)
    for start in range(low, high, BLOCK):
        column = start + n
        here = (column < high)[:, None] & (d < D)[None, :]
        k = tl.load(key_base + column[:, None] * k_column + d[None, :], mask=here, other=0.0)
        v = tl.load(value_base + column[:, None] * v_column + d[None, :], mask=here, other=0.0)
        if GP == 1:
            score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
        else:
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
        counted = (g < G)[:, None] & (column < high)[None, :]
        score = _scores(score, heads, column, counted, bias, bias_head, scale, softcap, SOFTCAP, BIAS)
        score = tl.where((column < high)[None, :], score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        if GP == 1:
            add = tl.sum(tl.trans(weight) * v.to(tl.float32), 0)[None, :]
        else:
            add = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        acc = acc * shrink[:, None] + add
        top = new_top
    if EARLY:
        gdc_launch_dependents()
    head = row * KV_HEADS * G + heads
    if SPLITS > 1:
        place = head * SPLITS + split
        tl.store(partial + place[:, None] * DP + d[None, :], acc, mask=(g < G)[:, None] & (d < DP)[None, :])
        tl.store(sums + place * 2, top, mask=g < G)
        tl.store(sums + place * 2 + 1, total, mask=g < G)
        tl.debug_barrier()
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.store(arrived + pair, 0)
            top = tl.full([GP], -float("inf"), tl.float32)
            total = tl.zeros([GP], tl.float32)
            acc = tl.zeros([GP, DP], tl.float32)
            for other in range(SPLITS):
                place = head * SPLITS + other
                its_top = tl.load(sums + place * 2, mask=g < G, other=0.0, cache_modifier=".cg")
                its_total = tl.load(sums + place * 2 + 1, mask=g < G, other=0.0, cache_modifier=".cg")
                its = (g < G)[:, None] & (d < DP)[None, :]
                its_acc = tl.load(partial + place[:, None] * DP + d[None, :], mask=its, other=0.0, cache_modifier=".cg")
                new_top = tl.maximum(top, its_top)
                # a program without columns has no top, and a row of length 0 has none anywhere
                shrink = tl.where(top == -float("inf"), 0.0, tl.exp2(top - new_top))
                grow = tl.where(its_top == -float("inf"), 0.0, tl.exp2(its_top - new_top))
                total = total * shrink + its_total * grow
                acc = acc * shrink[:, None] + its_acc * grow[:, None]
                top = new_top
            acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out + head[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=real)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + head[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=real)


