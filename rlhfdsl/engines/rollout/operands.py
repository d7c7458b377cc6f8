"""What a linear layer of a decode step reads, where that is more than one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rlhfdsl.models import quantized
from rlhfdsl.models.lora import NAME, LoraLayer

SCALES = 256  # of one scale of scales


@dataclass(frozen=True)
class Adapter:
    """factor x B A beside a linear layer. down: A [rank, K]. up: B [N, rank]."""

    down: torch.Tensor
    up: torch.Tensor
    factor: float


@dataclass(frozen=True)
class Packed:
    """Weights [N, K] in NF4 with scales in 8 bits, as bitsandbytes holds them (models/quantized.py).

    codes: uint8, two codes each, the first in the upper half. scales: uint8, of each 64 codes; what one stands for is
    table [256] times the one of its 256 scales in `maxima`, plus `offset`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    maxima: torch.Tensor
    offset: torch.Tensor
    shape: torch.Size

    def __len__(self) -> int:
        return self.shape[0]


def adapter_of(layer: LoraLayer) -> Adapter | None:
    """The adapter that a layer adds as it is now; None where it adds none or another kind."""
    active = not layer.disable_adapters and not layer.merged and layer.active_adapters == [NAME]
    if not active or NAME not in layer.lora_A or NAME in layer.lora_variant or layer.lora_bias[NAME] or layer.training:
        return None
    return Adapter(layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME])


def packed_of(layer: nn.Module) -> Packed | None:
    """The weights of a layer in 4 bits; None for any other."""
    if not quantized.is_packed(layer):
        return None
    state = layer.weight.quant_state
    if state.quant_type != quantized.KIND or state.blocksize != quantized.BLOCK or not state.nested:
        return None
    if state.state2.blocksize != SCALES:
        return None
    return Packed(layer.weight, state.absmax, state.state2.code, state.state2.absmax, state.offset, state.shape)
