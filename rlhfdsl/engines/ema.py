"""An exponential moving average of a policy's weights, in fp32 from the master weights."""

from __future__ import annotations

import torch
from deepspeed.utils import safe_get_full_fp32_param

from rlhfdsl.engines import distributed
from rlhfdsl.engines.engine import Engine
from rlhfdsl.models.loading import gathered


class MovingAverage:
    """ema <- decay x ema + (1 - decay) x weights, after every optimizer update of the engine.

    The average is of what trains: with LoRA of the adapters, whose frozen base has no need of one. It
    is kept in fp32 (in bf16 a step of 0.8 % of a small change rounds to nothing). Each rank keeps the
    parameters whose number modulo the world size is its rank, so the memory is 4 bytes x parameters / world.
    """

    def __init__(self, engine: Engine, decay: float):
        self.engine = engine
        self.decay = decay
        self.shard = {name: master.clone() for name, master in self._mine()}

    def update(self) -> None:
        for name, master in self._mine():
            self.shard[name].lerp_(master, 1.0 - self.decay)

    @torch.no_grad()
    def write(self) -> None:
        """Overwrite the engine's weights with the average. The engine cannot be trained further."""
        for number, (name, parameter) in self._trained():
            with gathered([parameter]):
                whole = torch.zeros_like(parameter.data, dtype=torch.float32)
                if number % distributed.world() == distributed.rank():
                    whole.copy_(self.shard[name])
                parameter.data.copy_(distributed.all_sum(whole))

    def _mine(self):
        """(name, master weight) of this rank's share; every rank walks all parameters, since reading one gathers it."""
        for number, (name, parameter) in self._trained():
            master = master_weight(parameter)
            if number % distributed.world() == distributed.rank():
                yield name, master

    def _trained(self):
        """(number, (name, parameter)) of what trains."""
        return enumerate((name, p) for name, p in self.engine.module.named_parameters() if p.requires_grad)


def master_weight(parameter: torch.Tensor) -> torch.Tensor:
    """The whole fp32 weight behind a parameter at any ZeRO stage; a collective call above stage 0."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master
    return parameter.data.float()
