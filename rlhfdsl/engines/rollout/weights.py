"""Weights for a rollout that lie elsewhere than training has them: whole under ZeRO 3, or cut over several ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from deepspeed import zero
from torch import nn

from rlhfdsl.engines.engine import PolicyEngine
from rlhfdsl.engines.rollout.group import TensorGroup
from rlhfdsl.engines.rollout.shards import Cut, adjust, cuts
from rlhfdsl.models.lora import add_adapters
from rlhfdsl.planning.shards import rules

GATHER_ELEMENTS = 1 << 28  # parameters gathered at a time: half a GiB in bf16


class CopiedWeights:
    """A second model of the same architecture whose parameters lie in one buffer, filled from the training weights.

    The buffer takes the whole model in the training dtype, or this rank's shard of it in a group, and stays where it
    is, so that a captured graph sees each refresh. The model has none of DeepSpeed's hooks. At ZeRO 3 every rank must
    call `refresh` at the same time.
    """

    def __init__(self, engine: PolicyEngine, group: TensorGroup | None):
        self.engine, self.group = engine, group
        self._model: nn.Module | None = None
        self._places: list[_Place] = []

    @property
    def model(self) -> nn.Module:
        if self._model is None:
            self._build()
        return self._model

    def release(self) -> None:
        self._model, self._places = None, []

    def refresh(self) -> None:
        """Copy the weights as they are now."""
        assert self.model is not None
        part: list[_Place] = []
        elements = 0
        for place in [*self._places, None]:
            if part and (place is None or elements + _shape(place.parameter).numel() > GATHER_ELEMENTS):
                with zero.GatheredParameters([one.parameter for one in part]):
                    for one in part:
                        one.fill()
                part, elements = [], 0
            if place is not None:
                part.append(place)
                elements += _shape(place.parameter).numel()

    def _build(self) -> None:
        source = self.engine.module
        with torch.device("meta"):
            model = type(source)(source.config)
            if self.engine.spec["lora"] is not None:
                add_adapters(model, self.engine.spec["lora"], seed=0, scalar=False)
        rule = None if self.group is None else rules(source.config.get_text_config().model_type)
        cut = {} if rule is None else cuts(model, rule, self.group.size, self.group.rank)
        views = self._lay_out(cut)
        # not deduplicated: a tied weight is put in each of its places
        for name, parameter in source.named_parameters(remove_duplicate=False):
            place, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(place), leaf, views[id(parameter)])
        for name, tensor in source.named_buffers():
            place, _, leaf = name.rpartition(".")
            persistent = leaf not in model.get_submodule(place)._non_persistent_buffers_set
            model.get_submodule(place).register_buffer(leaf, tensor, persistent=persistent)
        if rule is not None:
            adjust(model, rule, self.group.size, self.group.total)
        self._model = model.eval()

    def _lay_out(self, cut: dict[str, Cut]) -> dict[int, nn.Parameter]:
        """Places in one new buffer for all parameters, by the id of the training parameter."""
        own = dict(self.engine.module.named_parameters())
        # matrices first, so that those of one layer lie side by side
        ordered = sorted(own.items(), key=lambda named: len(_shape(named[1])) < 2)
        shapes = [cut[name].shape(_shape(p)) if name in cut else _shape(p) for name, p in ordered]
        dtype = next(iter(own.values())).dtype
        buffer = torch.empty(sum(shape.numel() for shape in shapes), dtype=dtype, device=self.engine.device)
        views, start = {}, 0
        for (name, parameter), shape in zip(ordered, shapes, strict=True):
            view = buffer[start : start + shape.numel()].view(shape)
            start += shape.numel()
            views[id(parameter)] = nn.Parameter(view, requires_grad=False)
            self._places.append(_Place(parameter, view, cut.get(name)))
        return views


@dataclass(frozen=True)
class _Place:
    """A training parameter, where its copy goes, and which part of it that is; None for the whole."""

    parameter: nn.Parameter
    view: torch.Tensor
    cut: Cut | None

    def fill(self) -> None:
        if self.cut is None:
            self.view.copy_(self.parameter.data)
        else:
            self.cut.take(self.parameter.data, self.view)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, of which ZeRO 3 holds a part."""
    return getattr(parameter, "ds_shape", parameter.shape)
