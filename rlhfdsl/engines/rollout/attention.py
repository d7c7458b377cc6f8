"""Attention over a row cache, under transformers' attention interface.

Registered as `NAME` and switched on for the time of a rollout only. transformers makes no mask for an implementation
that it does not know and hands a 4-D mask through as it is; that is how a decode step brings the row lengths here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

NAME = "rlhfdsl_rows"
SCORES = 1 << 26  # scores of prompts computed at a time where torch's fused attention cannot be: 256 MiB in fp32


def attend(
    module: nn.Module | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Prompts without a mask, or one token of each row with `attention_mask` = the row lengths [B, 1, 1, 1].

    query [B, H, T, D]; key, value [B, Hkv, T, D] of the prompts, or [B, Hkv, columns, D] of the cache. A length of 0
    is an idle row, whose output nobody reads. bias [H, at least columns]: added to a head's scores by their column
    (alibi), and the sum is rounded to its dtype. Returns [B, T, H, D].
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None:
        out = _causal(query, key, value, scale, sliding_window, softcap, bias)
    elif query.is_cuda:
        from rlhfdsl.engines.rollout.kernels import attending

        lengths = attention_mask.view(-1)
        out = attending.attend(query, *key.newest, key, value, lengths, scale, sliding_window, softcap, bias)
    else:
        out = decode(query, key, value, attention_mask.view(-1), scale, sliding_window, softcap, bias)
    return out.transpose(1, 2), None


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query a row over the first `lengths` [B] columns of the cache: [B, H, 1, D], in torch."""
    live = max(int(lengths.max()), 1)
    columns = torch.arange(live, device=query.device)
    end = lengths.clamp(min=1).unsqueeze(1)
    seen = columns < end
    if window is not None:
        seen &= columns >= end - window
    mask = seen[:, None, None]
    return _masked(query, key[:, :, :live], value[:, :, :live], mask, scale, softcap, bias)


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Right-padded prompts over themselves: a real token never sees the padding to its right."""
    width = query.shape[2]
    if softcap is None and bias is None and (window is None or window >= width):
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    mask = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()
    if window is not None:
        mask &= ~mask.tril(-window)
    rows = max(SCORES // (query.shape[1] * width * width), 1)
    parts = zip(query.split(rows), key.split(rows), value.split(rows), strict=True)
    return torch.cat([_masked(q, k, v, mask, scale, softcap, bias) for q, k, v in parts])


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    if softcap is None and bias is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
        )
    if grouped:
        copies = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = (scores + bias[:, None, : scores.shape[-1]]).to(bias.dtype).float()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype) @ value


AttentionInterface.register(NAME, attend)


@contextlib.contextmanager
def over_rows(model: nn.Module) -> Iterator[None]:
    """While open, every configuration in `model` names this attention."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
