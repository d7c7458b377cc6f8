"""Triton kernels of the decode step: draw a token of each row, and note it in the slots.

Steps and seeds are read from memory, so that one captured CUDA graph serves all steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhfdsl.engines.rollout.slots import Slots

SAMPLE_BLOCK = 4096  # tokens of the vocabulary that one program reads

# SplitMix64's constants as in `sampling.py`
_GOLDEN = tl.constexpr(-0x61C8864680B583EB)
_MIX_1 = tl.constexpr(-0x40A7B892E31B1A47)
_MIX_2 = tl.constexpr(-0x6B2FB644ECCEEE15)


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
