"""Triton kernels of the decode step: store a token's keys and values, attend over the live columns, draw a token.

Each reads its sizes that change during a rollout (row lengths, steps, seeds) from memory, so that one captured CUDA
graph serves all steps. Where a row is idle (length 0) nothing is read for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

SAMPLE_BLOCK = 4096  # tokens of the vocabulary that one program reads
_PROGRAMS = 1024  # programs that keep a GPU busy: a row's columns are split until there are about as many
_MAX_SPLITS = 16
_BLOCK = 4096  # cache elements that one program reads at a time
_WARPS = 2

# SplitMix64's constants as in `sampling.py`
_GOLDEN = tl.constexpr(-0x61C8864680B583EB)
_MIX_1 = tl.constexpr(-0x40A7B892E31B1A47)
_MIX_2 = tl.constexpr(-0x6B2FB644ECCEEE15)


# -- the cache ---------------------------------------------------------------------------------------------------------


def store(
    new_keys: torch.Tensor, new_values: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, write: torch.Tensor
) -> None:
    """Put [B, H, 1, D] keys and values in column `write` [B] of the first B rows of a cache [rows, H, columns, D]."""
    batch, heads, _, size = new_keys.shape
    if new_keys.stride(3) != 1 or new_values.stride(3) != 1:
        new_keys, new_values = new_keys.contiguous(), new_values.contiguous()
    _store[(batch, heads)](
        new_keys, new_values, keys, values, write,
        new_keys.stride(0), new_keys.stride(1), new_values.stride(0), new_values.stride(1),
        keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        new_values.shape[3], D=size, DP=triton.next_power_of_2(max(size, new_values.shape[3])), num_warps=1,
    )  # fmt: skip


@triton.jit
def _store(
    new_keys, new_values, keys, values, write,
    nk_row, nk_head, nv_row, nv_head, k_row, k_head, k_column, v_row, v_head, v_column,
    value_size, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.load(write + row)
    d = tl.arange(0, DP)
    key = tl.load(new_keys + row * nk_row + head * nk_head + d, mask=d < D)
    value = tl.load(new_values + row * nv_row + head * nv_head + d, mask=d < value_size)
    tl.store(keys + row * k_row + head * k_head + column * k_column + d, key, mask=d < D)
    tl.store(values + row * v_row + head * v_head + column * v_column + d, value, mask=d < value_size)


# -- attention ---------------------------------------------------------------------------------------------------------


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of one query a row, [B, H, 1, D], over the first `lengths` [B] columns of its row's cache.

    keys, values [B, Hkv, columns, D]; H is a multiple of Hkv. window: only the last so many columns count. softcap:
    scores become c tanh(score / c). bias [H, at least columns]: added to a head's scores by their column, and the sum
    is rounded to its dtype. A row of length 0 gives zeros. Flash decoding (Dao et al. 2023): the columns of a
    row are split over programs, whose partial sums a second kernel joins.
    """
    batch, heads, _, size = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    splits = triton.next_power_of_2(triton.cdiv(_PROGRAMS, batch * kv_heads))
    splits = min(splits, _MAX_SPLITS)
    padded = triton.next_power_of_2(size)
    block = max(16, min(128, _BLOCK // padded))
    if query.stride(3) != 1:
        query = query.contiguous()
    out = torch.empty(batch, heads, 1, size, dtype=query.dtype, device=query.device)
    group_padded = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    if splits == 1:
        partial, sums = out, out
    else:
        partial = torch.empty(batch, heads, splits, padded, dtype=torch.float32, device=query.device)
        sums = torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=query.device)
    _attend[(batch * kv_heads, splits)](
        query, keys, values, lengths, query if bias is None else bias, out, partial, sums,
        scale, window or 0, softcap or 0.0, 0 if bias is None else bias.stride(0),
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
        values.stride(0), values.stride(1), values.stride(2),
        KV_HEADS=kv_heads, G=group, GP=group_padded, D=size, DP=padded, BLOCK=block, SPLITS=splits,
        WINDOW=window is not None, SOFTCAP=softcap is not None, BIAS=bias is not None, num_warps=_WARPS,
    )  # fmt: skip
    if splits > 1:
        _join[(batch * heads,)](partial, sums, out, D=size, DP=padded, SPLITS=splits, num_warps=2)
    return out


@triton.jit
def _attend(
    query, keys, values, lengths, bias, out, partial, sums,
    scale, window, softcap, bias_head,
    q_row, q_head, k_row, k_head, k_column, v_row, v_head, v_column,
    KV_HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK) * BLOCK
    low = first + split * share
    high = tl.minimum(low + share, length)

    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    n = tl.arange(0, BLOCK)
    heads = kv_head * G + g
    real = (g < G)[:, None] & (d < D)[None, :]
    q = tl.load(query + row * q_row + heads[:, None] * q_head + d[None, :], mask=real, other=0.0)
    key_base = keys + row * k_row + kv_head * k_head
    value_base = values + row * v_row + kv_head * v_head
    top = tl.full([GP], -float("inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    for start in range(low, high, BLOCK):
        column = start + n
        here = (column < high)[:, None] & (d < D)[None, :]
        k = tl.load(key_base + column[:, None] * k_column + d[None, :], mask=here, other=0.0)
        v = tl.load(value_base + column[:, None] * v_column + d[None, :], mask=here, other=0.0)
        if GP == 1:
            score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
        else:
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
        score = score * scale
        if SOFTCAP:
            score = softcap * libdevice.tanh(score / softcap)
        if BIAS:
            counted = (g < G)[:, None] & (column < high)[None, :]
            added = tl.load(bias + heads[:, None] * bias_head + column[None, :], mask=counted, other=0.0)
            score = (score + added.to(tl.float32)).to(added.dtype).to(tl.float32)
        score = tl.where((column < high)[None, :], score * LOG2E, -float("inf"))
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
    if SPLITS == 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        place = (row * KV_HEADS * G + heads)[:, None] * D + d[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=real)
    else:
        place = (row * KV_HEADS * G + heads) * SPLITS + split
        tl.store(partial + place[:, None] * DP + d[None, :], acc, mask=(g < G)[:, None] & (d < DP)[None, :])
        tl.store(sums + place * 2, top, mask=g < G)
        tl.store(sums + place * 2 + 1, total, mask=g < G)


@triton.jit
def _join(partial, sums, out, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, DP)
    top = tl.load(sums + (head * SPLITS + s) * 2)
    total = tl.load(sums + (head * SPLITS + s) * 2 + 1)
    highest = tl.max(top, 0)
    # a row of length 0 has no top anywhere
    weight = tl.where(top == -float("inf"), 0.0, tl.exp2(top - highest))
    acc = tl.load(partial + (head * SPLITS + s)[:, None] * DP + d[None, :])
    whole = tl.sum(total * weight, 0)
    joined = tl.sum(acc * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + head * D + d, joined.to(out.dtype.element_ty), mask=d < D)


# -- drawing a token ---------------------------------------------------------------------------------------------------


def draw(
    logits: torch.Tensor, temperature: float, seeds: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [B] drawn from softmax(logits [B, V] / temperature), and their log-probabilities fp32 [B].

    The same noise as `sampling.gumbel(seeds, step, V)`; logits are read once, in their own dtype.
    """
    batch, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, SAMPLE_BLOCK)
    parts = torch.empty(4, batch, blocks, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(batch, blocks, dtype=torch.int64, device=logits.device)
    chosen = torch.empty(batch, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(batch, dtype=torch.float32, device=logits.device)
    _draw_block[(batch, blocks)](
        logits, seeds, step, parts, tokens, temperature, logits.stride(0), vocabulary, batch * blocks,
        BLOCK=SAMPLE_BLOCK, num_warps=8,
    )  # fmt: skip
    _draw_join[(batch,)](
        parts, tokens, chosen, log_probs, blocks, batch * blocks, PADDED=triton.next_power_of_2(blocks), num_warps=1
    )
    return chosen, log_probs


@triton.jit
def _mix(x):
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _draw_block(logits, seeds, step, parts, tokens, temperature, stride, vocabulary, plane, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    real = token < vocabulary
    x = tl.load(logits + row * stride + token, mask=real, other=-float("inf")).to(tl.float32) / temperature
    start = _mix(tl.load(seeds + row) + tl.load(step + row))
    bits = _mix(start + token.to(tl.int64))
    uniform = (((bits >> 32) & 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    uniform = tl.minimum(uniform, 1.0 - 5.9604644775390625e-08)
    noise = -tl.log(-libdevice.log1p(-uniform))
    noisy = tl.where(real, x + noise, -float("inf"))
    best = tl.argmax(noisy, 0)
    top = tl.max(x, 0)
    place = row * tl.num_programs(1) + block
    tl.store(parts + place, tl.max(noisy, 0))
    tl.store(parts + plane + place, tl.max(tl.where(tl.arange(0, BLOCK) == best, x, -float("inf")), 0))
    tl.store(parts + 2 * plane + place, top)
    tl.store(parts + 3 * plane + place, tl.sum(tl.exp(x - top), 0))
    tl.store(tokens + place, (block * BLOCK + best).to(tl.int64))


@triton.jit
def _draw_join(parts, tokens, chosen, log_probs, blocks, plane, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, PADDED)
    real = b < blocks
    place = row * blocks + b
    noisy = tl.load(parts + place, mask=real, other=-float("inf"))
    x = tl.load(parts + plane + place, mask=real, other=-float("inf"))
    top = tl.load(parts + 2 * plane + place, mask=real, other=-float("inf"))
    total = tl.load(parts + 3 * plane + place, mask=real, other=0.0)
    best = tl.argmax(noisy, 0)
    highest = tl.max(top, 0)
    normalizer = highest + tl.log(tl.sum(tl.where(real, total * tl.exp(top - highest), 0.0), 0))
    tl.store(chosen + row, tl.load(tokens + row * blocks + best))
    tl.store(log_probs + row, tl.max(tl.where(b == best, x, -float("inf")), 0) - normalizer)
