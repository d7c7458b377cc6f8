"""The hybrid engine: one set of weights that trains under ZeRO and samples answers."""

from __future__ import annotations

from torch import nn

from rlhfdsl.engines.engine import PolicyEngine
from rlhfdsl.engines.rollout.eager import EagerSampler
from rlhfdsl.engines.rollout.interface import Prompts, Rollout, Sampling


class HybridEngine(PolicyEngine):
    """A training engine paired with a rollout engine over the same weights."""

    def __init__(self, name: str, spec: dict, module: nn.Module):
        super().__init__(name, spec, module)
        self.sampler = EagerSampler(self)

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """Sample answers from the weights as they are now."""
        return self.sampler.generate(prompts, sampling)
