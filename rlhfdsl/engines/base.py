"""The frozen base below an engine's adapters, read in the place of a reference without weights of its own."""

from __future__ import annotations

import torch
from torch import nn

from rlhfdsl.engines.engine import PolicyEngine
from rlhfdsl.models.lora import adapters_off, adapters_on_half, lora_layers
from rlhfdsl.planning.flops import UNKNOWN, Forward


class BasePolicy:
    """The policy that an engine with adapters started from: the same weights with the adapters off.

    A view in the place of a `PolicyEngine` that does not train. It has no weights and no DeepSpeed engine of its own,
    and its log-probabilities are bit for bit those of the frozen base.
    """

    def __init__(self, spec: dict, engine: PolicyEngine):
        self.spec = spec
        self.engine = engine
        self.micro: int = spec["micro"]
        self.cost = engine.cost
        self.flops: Forward = UNKNOWN
        self.layers = lora_layers(engine.module)

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def module(self) -> nn.Module:
        """The engine's module, with its adapters: to be read only."""
        return self.engine.module

    @property
    def joins(self) -> bool:
        """Whether it is read in one forward with the engine's policy: where a forward gathers the weights (ZeRO 3).

        Elsewhere a second forward costs no more than twice the rows do, and leaves micro batches the shape of training.
        """
        return self.engine.partitioned

    def eval(self) -> None:
        self.engine.eval()

    def rest(self) -> None:
        """Nothing: its weights are the engine's."""

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, lengths: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Logits [B, T - first, V] of the base for right-padded `ids` [B, T], of the columns from `first` on."""
        with adapters_off(self.layers):
            return self.engine.logits(ids, lengths, first)

    @torch.no_grad()
    def logits_at(
        self, ids: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, first: int = 0,
        total: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """As the engine's, of the base."""
        with adapters_off(self.layers):
            return self.engine.logits_at(ids, lengths, rows, columns, first, total)


class BesideBase:
    """The policy of an engine with adapters for the first half of a batch's rows, and its base for the second half.

    A view in the place of a `PolicyEngine` that does not train.
    """

    def __init__(self, base: BasePolicy):
        self.base = base

    @torch.no_grad()
    def logits_at(
        self, ids: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, first: int = 0,
        total: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """As an engine's, for `ids` [2 B, T]; both halves have the same rows."""
        engine = self.base.engine
        packed = len(rows) and engine.packing(lengths, ids.shape[1], total) is not None
        with adapters_on_half(self.base.layers, total if packed else ids.numel()):
            return engine.logits_at(ids, lengths, rows, columns, first, total)
