"""Attention of the forward and backward passes: causal, over right-padded rows, without padding masks.

Rows are padded on the right, so no real token sees padding. Without a mask the attention kernels of CUDA take rows of
any lengths, and nothing waits for the device to look at one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL = "rlhfdsl_causal"  # transformers makes no mask for an attention that it does not know


def causal(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention of right-padded rows over themselves: query [B, H, T, D], key and value [B, Hkv, T, D].

    sliding_window: how many columns a token sees, itself counted. Returns [B, T, H, D].
    """
    width = query.shape[2]
    if sliding_window is not None and sliding_window < width:
        attention_mask = torch.ones(width, width, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(CAUSAL, causal)


def without_masks(module: nn.Module) -> None:
    """Let every decoder in `module` that attends with `sdpa` do so without padding masks, where its class allows it."""
    for model in module.modules():
        if getattr(model, "_supports_attention_backend", False) and model.config._attn_implementation == "sdpa":
            model.config._attn_implementation = CAUSAL


@contextlib.contextmanager
def with_masks(module: nn.Module) -> Iterator[None]:
    """While open, `module` attends with masks, as left-padded rows and a cache need it."""
    configs = {id(c): c for model in module.modules() if (c := getattr(model, "config", None)) is not None}
    changed = [config for config in configs.values() if getattr(config, "_attn_implementation", None) == CAUSAL]
    for config in changed:
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation = CAUSAL
