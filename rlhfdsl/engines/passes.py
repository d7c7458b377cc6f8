"""Attention of the forward and backward passes: causal, over right-padded rows, without padding masks.

Rows are padded on the right, so no real token sees padding. Without a mask the attention kernels of CUDA take rows of
any lengths, and nothing waits for the device to look at one. Where all decoders of a model attend so, a pass can be
over the real tokens alone (models/packing.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhfdsl.models.inputs import takes_positions
from rlhfdsl.models.packing import Packing

ROWS = "rlhfdsl_rows"  # the attribute under which the modules of a model find what a pass reads
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

    sliding_window: how many columns a token sees, itself counted. Returns [B, T, H, D]. In a packed pass all of them
    are [1, ., N, D] and [1, N, H, D].
    """
    rows: Rows | None = getattr(module, ROWS, None)
    packing = rows.packing if rows is not None else None
    if packing is not None:
        query, key, value = (packing.spread(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
    width = query.shape[2]
    if sliding_window is not None and sliding_window < width:
        attention_mask = torch.ones(width, width, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output if packing is None else packing.gathered(output), weights


AttentionInterface.register(CAUSAL, causal)


@dataclass
class Rows:
    """What a pass of a model reads: right-padded rows, or where there is a packing their real tokens alone."""

    packing: Packing | None = None


def without_masks(module: nn.Module) -> Rows | None:
    """Let every decoder in `module` that attends with `sdpa` do so without padding masks, where its class allows it.

    Where all of them do and take positions, they can also read rows without padding: as the `Rows` say that are
    returned. It holds for the backward pass too, in which a layer may be computed anew.
    """
    decoders = [model for model in module.modules() if isinstance(model, PreTrainedModel)]
    for model in decoders:
        if getattr(model, "_supports_attention_backend", False) and model.config._attn_implementation == "sdpa":
            model.config._attn_implementation = CAUSAL
    if not all(model.config._attn_implementation == CAUSAL and takes_positions(type(model)) for model in decoders):
        return None
    rows = Rows()
    for inner in module.modules():
        setattr(inner, ROWS, rows)
    return rows


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
