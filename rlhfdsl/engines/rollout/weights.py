"""Whole weights for a rollout where training keeps them in shards (ZeRO 3)."""

from __future__ import annotations

import torch
from deepspeed import zero
from torch import nn

from rlhfdsl.engines.engine import PolicyEngine
from rlhfdsl.models.lora import add_adapters

GATHER_ELEMENTS = 1 << 28  # parameters gathered at a time: half a GiB in bf16


class WholeWeights:
    """A second model of the same architecture whose parameters lie in one buffer, filled from the shards.

    The buffer takes the whole model in the training dtype, and stays where it is, so that a captured graph sees each
    refresh. The model has none of DeepSpeed's hooks. Every rank must call `refresh` at the same time.
    """

    def __init__(self, engine: PolicyEngine):
        self.engine = engine
        self._model: nn.Module | None = None
        self._pairs: list[tuple[nn.Parameter, torch.Tensor]] = []

    @property
    def model(self) -> nn.Module:
        if self._model is None:
            self._build()
        return self._model

    def release(self) -> None:
        self._model, self._pairs = None, []

    def refresh(self) -> None:
        """Copy the weights as they are now."""
        assert self.model is not None
        part: list[tuple[nn.Parameter, torch.Tensor]] = []
        elements = 0
        for pair in [*self._pairs, None]:
            if part and (pair is None or elements + pair[1].numel() > GATHER_ELEMENTS):
                with zero.GatheredParameters([parameter for parameter, _ in part]):
                    for parameter, view in part:
                        view.copy_(parameter.data)
                part, elements = [], 0
            if pair is not None:
                part.append(pair)
                elements += pair[1].numel()

    def _build(self) -> None:
        source = self.engine.module
        with torch.device("meta"):
            model = type(source)(source.config)
            if self.engine.spec["lora"] is not None:
                add_adapters(model, self.engine.spec["lora"], seed=0, scalar=False)
        own = dict(source.named_parameters())
        dtype = next(iter(own.values())).dtype
        buffer = torch.empty(
            sum(parameter.ds_numel for parameter in own.values()), dtype=dtype, device=self.engine.device
        )
        views: dict[int, nn.Parameter] = {}
        start = 0
        # matrices first, so that those of one layer lie side by side
        for parameter in sorted(own.values(), key=lambda parameter: len(parameter.ds_shape) < 2):
            view = buffer[start : start + parameter.ds_numel].view(parameter.ds_shape)
            start += parameter.ds_numel
            views[id(parameter)] = nn.Parameter(view, requires_grad=False)
            self._pairs.append((parameter, view))
        # not deduplicated: a tied weight is put in each of its places
        for name, parameter in source.named_parameters(remove_duplicate=False):
            place, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(place), leaf, views[id(parameter)])
        for name, tensor in source.named_buffers():
            place, _, leaf = name.rpartition(".")
            persistent = leaf not in model.get_submodule(place)._non_persistent_buffers_set
            model.get_submodule(place).register_buffer(leaf, tensor, persistent=persistent)
        self._model = model.eval()
