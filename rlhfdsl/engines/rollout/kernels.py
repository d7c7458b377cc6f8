"""Triton kernels of the decode step: keep a token's keys and values and attend over the live columns, draw a token
and note it.

Each reads its sizes that change during a rollout (row lengths, steps, seeds) from memory, so that one captured CUDA
graph serves all steps. Where a row is idle (length 0) nothing is read for it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rlhfdsl.engines.rollout.launch import early_launch
from rlhfdsl.engines.rollout.slots import Slots

SAMPLE_BLOCK = 4096  # tokens of the vocabulary that one program reads
_PROGRAMS = 1024  # programs that keep a GPU busy: a row's columns are split until there are about as many
_MAX_SPLITS = 16
_BLOCK = 2048  # keys' elements that one warp reads at a time, of heads of up to 128

# SplitMix64's constants as in `sampling.py`
_GOLDEN = tl.constexpr(-0x61C8864680B583EB)
_MIX_1 = tl.constexpr(-0x40A7B892E31B1A47)
_MIX_2 = tl.constexpr(-0x6B2FB644ECCEEE15)


# -- attention ---------------------------------------------------------------------------------------------------------


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
    block = max(16, min(128, _BLOCK // padded))
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
        KV_HEADS=kv_heads, G=group, GP=1 if group == 1 else max(16, triton.next_power_of_2(group)),
        D=size, DP=padded, BLOCK=block, SPLITS=splits, WINDOW=window is not None, SOFTCAP=softcap is not None,
        BIAS=bias is not None, num_warps=max(1, padded // 128), **early_launch(query.device),
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


# -- drawing a token ---------------------------------------------------------------------------------------------------


def draw(
    logits: torch.Tensor, temperature: float, seeds: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [B] drawn from softmax(logits [B, V] / temperature), and their log-probabilities fp32 [B].

    The same noise as `sampling.gumbel(seeds, step, V)`; logits are read once, in their own dtype.
    """
    parts, tokens = _drawn(logits, temperature, seeds, step)
    _, batch, blocks = parts.shape
    chosen = torch.empty(batch, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(batch, dtype=torch.float32, device=logits.device)
    _draw_join[(batch,)](
        parts, tokens, chosen, log_probs, blocks, batch * blocks, PADDED=triton.next_power_of_2(blocks), num_warps=1
    )
    return chosen, log_probs


def advance(logits: torch.Tensor, temperature: float, slots: Slots, stops: torch.Tensor, longest: int) -> None:
    """`draw` for each slot and `slots.advance` with what was drawn, in two kernels."""
    parts, tokens = _drawn(logits, temperature, slots.seed, slots.step)
    _, batch, blocks = parts.shape
    _advance[(batch,)](
        parts, tokens, slots.token, slots.write, slots.length, slots.step, slots.idle, slots.answers, slots.log_probs,
        stops, blocks, batch * blocks, longest, slots.answers.shape[1], slots.answers.stride(0), len(stops),
        PADDED=triton.next_power_of_2(blocks), STOPS=triton.next_power_of_2(len(stops)), num_warps=1,
    )  # fmt: skip


def _drawn(
    logits: torch.Tensor, temperature: float, seeds: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best token of each block of the vocabulary, int64 [B, blocks], and fp32 [4, B, blocks]: its logit with and
    without noise, the block's largest logit, and the sum of exponentials below that."""
    batch, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, SAMPLE_BLOCK)
    parts = torch.empty(4, batch, blocks, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(batch, blocks, dtype=torch.int64, device=logits.device)
    _draw_block[(batch, blocks)](
        logits, seeds, step, parts, tokens, temperature, logits.stride(0), vocabulary, batch * blocks,
        BLOCK=SAMPLE_BLOCK, num_warps=8,
    )  # fmt: skip
    return parts, tokens


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
    # -log(1 - u): near 0, where noise is largest, by its series
    small = uniform * (1.0 + uniform * (0.5 + uniform * (0.3333333333 + 0.25 * uniform)))
    noise = -tl.log(tl.where(uniform < 0.015625, small, -tl.log(1.0 - uniform)))
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
def _joined(parts, tokens, row, blocks, plane, PADDED: tl.constexpr):
    """A row's token and its log-probability."""
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
    token = tl.load(tokens + row * blocks + best)
    return token, tl.max(tl.where(b == best, x, -float("inf")), 0) - normalizer


@triton.jit
def _draw_join(parts, tokens, chosen, log_probs, blocks, plane, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token, log_prob = _joined(parts, tokens, row, blocks, plane, PADDED)
    tl.store(chosen + row, token)
    tl.store(log_probs + row, log_prob)


@triton.jit
def _advance(
    parts, tokens, token, write, length, step, idle, answers, log_probs, stops,
    blocks, plane, longest, columns, answer_row, stop_count, PADDED: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    drawn, log_prob = _joined(parts, tokens, row, blocks, plane, PADDED)
    busy = tl.load(idle + row) == 0
    made = tl.load(step + row)
    column = tl.minimum(made, columns - 1)
    tl.store(answers + row * answer_row + column, drawn, mask=busy)
    tl.store(log_probs + row * answer_row + column, log_prob, mask=busy)
    tl.store(token + row, drawn, mask=busy)
    made += busy.to(tl.int64)
    tl.store(step + row, made)
    s = tl.arange(0, STOPS)
    ends = tl.sum((tl.load(stops + s, mask=s < stop_count, other=-1) == drawn).to(tl.int32), 0) > 0
    goes_on = busy & ~ends & (made < longest)
    tl.store(idle + row, (~goes_on).to(tl.int8))
    at = tl.load(write + row) + goes_on.to(tl.int64)
    tl.store(write + row, at)
    tl.store(length + row, tl.where(goes_on, at + 1, 0))
