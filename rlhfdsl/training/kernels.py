"""Triton kernels of the token statistics in losses.py: each reads the logits once, in their own type."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # logits that a program reads at a time
_WARPS = 8
_LEAST = tl.constexpr(-1e4)  # as in losses.py: a log-probability whose p is 0 in fp32


def statistics(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log softmax(x) at `targets`, the entropy of softmax(x) and log sum exp(x): fp32 [N] each.

    x: logits / temperature. logits [M, V], rows [N] as in `losses.token_statistics`. Online softmax: Milakov and
    Gimelshein 2018, algorithm 3.
    """
    found = torch.empty(3, len(targets), dtype=torch.float32, device=logits.device)
    log_probs, entropy, norm = found
    if len(targets):
        _statistics[(len(targets),)](
            logits, targets, targets if rows is None else rows, log_probs, entropy, norm, temperature,
            logits.stride(0), logits.shape[1], ROWS=rows is not None, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return log_probs, entropy, norm


def gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    rows: torch.Tensor | None,
    norm: torch.Tensor,
    entropy: torch.Tensor,
    of_log_probs: torch.Tensor | None,
    of_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of the logits [M, V], in their type, from those of the two statistics [N]."""
    found = torch.empty_like(logits) if rows is None else torch.zeros_like(logits)
    of_log_probs, of_entropy = (None if of is None else of.contiguous() for of in (of_log_probs, of_entropy))
    if len(targets):
        _gradient[(len(targets), triton.cdiv(logits.shape[1], _BLOCK))](
            logits, found, targets, targets if rows is None else rows, norm, entropy,
            norm if of_log_probs is None else of_log_probs, norm if of_entropy is None else of_entropy, temperature,
            logits.stride(0), found.stride(0), logits.shape[1], ROWS=rows is not None,
            OF_LOG_PROBS=of_log_probs is not None, OF_ENTROPY=of_entropy is not None, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return found


@triton.jit
def _statistics(
    logits, targets, rows, log_probs, entropy, norm, temperature, stride, vocabulary,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = n
    if ROWS:
        row = tl.load(rows + n)
    base = logits + row * stride
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)  # sum of exp(x - top) (x - top), from which the mean of x follows
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(base + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32) / temperature
        higher = tl.maximum(top, x)
        moved = tl.where(top == -float("inf"), 0.0, top - higher)
        here = tl.where(x == -float("inf"), 0.0, tl.exp(x - higher))
        away = tl.where(x == -float("inf"), 0.0, x - higher)
        shrink = tl.exp(moved)
        weighted = (weighted + total * moved) * shrink + here * away
        total = total * shrink + here
        top = higher
    highest = tl.max(top, 0)
    moved = tl.where(top == -float("inf"), 0.0, top - highest)
    shrink = tl.exp(moved)
    weighted = (weighted + total * moved) * shrink
    whole = tl.sum(total * shrink, 0)
    log_whole = tl.log(whole)
    chosen = tl.load(base + tl.load(targets + n)).to(tl.float32) / temperature
    tl.store(norm + n, highest + log_whole)
    tl.store(log_probs + n, chosen - highest - log_whole)
    tl.store(entropy + n, log_whole - tl.sum(weighted, 0) / whole)


@triton.jit
def _gradient(
    logits, found, targets, rows, norm, entropy, of_log_probs, of_entropy, temperature,
    stride, found_stride, vocabulary,
    ROWS: tl.constexpr, OF_LOG_PROBS: tl.constexpr, OF_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = n
    if ROWS:
        row = tl.load(rows + n)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < vocabulary
    x = tl.load(logits + row * stride + column, mask=real, other=-float("inf")).to(tl.float32) / temperature
    log_p = x - tl.load(norm + n)
    p = tl.exp(log_p)
    d = tl.zeros([BLOCK], tl.float32)
    if OF_ENTROPY:
        d -= tl.load(of_entropy + n) * p * (tl.maximum(log_p, _LEAST) + tl.load(entropy + n))
    if OF_LOG_PROBS:
        g = tl.load(of_log_probs + n)
        d += tl.where(column == tl.load(targets + n), g, 0.0) - g * p
    tl.store(found + row * found_stride + column, (d / temperature).to(found.dtype.element_ty), mask=real)
