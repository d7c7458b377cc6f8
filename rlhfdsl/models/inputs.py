"""What a decoder's forward is given: masks and positions made from lengths, never from pad ids."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn
from torch.nn import functional

from rlhfdsl.models.packing import Packing


def length_mask(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Bool [B, width], true on the first `lengths[b]` columns of each row."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)


def joined(parts: Sequence[torch.Tensor], fill: float) -> torch.Tensor:
    """Stack [Bi, Ti] tensors into [sum of Bi, longest Ti], the shorter ones filled on the right."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])


def forward_inputs(model: nn.Module, ids: torch.Tensor, lengths: torch.Tensor) -> dict:
    """Keyword arguments of `model.forward` for right-padded `ids` [B, T] with `lengths` [B].

    Positions count real tokens from 0 in every row; they are left out for classes that take none (BLOOM, MPT).
    """
    batch, width = ids.shape
    arguments = {
        "input_ids": ids,
        "attention_mask": length_mask(lengths, width).long(),
        "use_cache": False,
    }
    if takes_positions(type(model)):
        arguments["position_ids"] = torch.arange(width, device=ids.device).expand(batch, width)
    return arguments


def packed_inputs(ids: torch.Tensor, packing: Packing) -> dict:
    """Keyword arguments of a model's forward for the real tokens of right-padded `ids` [B, T], as one row [1, N]."""
    return {"input_ids": packing.gathered(ids), "position_ids": packing.positions, "use_cache": False}


def takes_positions(model_class: type) -> bool:
    """Whether the class's forward has a `position_ids` parameter."""
    return takes(model_class, "position_ids")


@cache
def takes(model_class: type, parameter: str) -> bool:
    """Whether the class's forward has the parameter."""
    return parameter in inspect.signature(model_class.forward).parameters
