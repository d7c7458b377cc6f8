"""The hybrid engine: a policy that trains under DeepSpeed and samples from the same weights."""

from __future__ import annotations

from torch import nn

from rlhfdsl.engines.engine import PolicyEngine
from rlhfdsl.engines.rollout.eager import EagerSampler
from rlhfdsl.engines.rollout.graph import GraphSampler
from rlhfdsl.engines.rollout.interface import Prompts, Rollout, Sampler, Sampling


class HybridEngine(PolicyEngine):
    """A training engine paired with a rollout engine over the same weights.

    rollout_reason: why `sampler` is the one it is.
    """

    def __init__(self, name: str, spec: dict, module: nn.Module):
        super().__init__(name, spec, module)
        chosen = spec["rollout"]
        graph = chosen["engine"] == "graph"
        self.sampler: Sampler = GraphSampler(self, chosen["tensor"]) if graph else EagerSampler(self)
        self.rollout_reason: str = chosen["reason"]

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """Sample answers from the weights as they are now."""
        return self.sampler.generate(prompts, sampling)

    def fall_back(self, reason: str) -> None:
        """Sample with `generate` from now on."""
        self.sampler.release()
        self.sampler, self.rollout_reason = EagerSampler(self), reason
