"""One model of a stage on a DeepSpeed engine: forward, accumulate, step, save."""

from __future__ import annotations

import copy

import deepspeed
import torch
from torch import nn

from rlhfdsl.engines.schedule import learning_rate
from rlhfdsl.models.inputs import forward_inputs
from rlhfdsl.models.scalar import at_last


class Engine:
    """A DeepSpeed engine with the bookkeeping of updates.

    A minibatch is any number of `backward` calls and then one `step`. Each backward takes
    `sum of its losses / tokens of the whole minibatch over all ranks x world`; DeepSpeed averages over the ranks, so
    the step sees the exact gradient of the global mean, however the minibatch was cut into micro batches.
    """

    def __init__(self, name: str, spec: dict, module: nn.Module):
        self.name = name
        self.spec = spec
        self.micro: int = spec["micro"]
        self.updates = 0
        parameters = _decay_groups(module, spec["deepspeed"]) if spec["trains"] else None
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, model_parameters=parameters, config=copy.deepcopy(spec["deepspeed"])
        )
        self.device = self.deepspeed.device
        if spec["trains"] and spec["zero"] == 0:
            self.deepspeed.clip_fp32_gradients = self._clip
        if not spec["trains"]:
            self.deepspeed.eval()

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def partitioned(self) -> bool:
        """Whether the parameters lie in shards on the ranks (ZeRO 3)."""
        return self.spec["deepspeed"]["zero_optimization"]["stage"] == 3

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of a scalar loss, unscaled."""
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self) -> dict[str, float]:
        """Apply the accumulated gradients; returns the learning rate used and the gradient norm before clipping."""
        rate = learning_rate(self.spec["schedule"], self.updates)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate
        self.deepspeed.step()
        self.updates += 1
        norm = self.deepspeed.get_global_grad_norm()
        return {"lr": rate, "grad_norm": float(norm) if norm is not None else float("nan")}

    def _clip(self) -> None:
        """Clip at stage 0, where DeepSpeed keeps no norm; left on the optimizer, it is reported as at other stages."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.deepspeed.gradient_clipping())
        self.deepspeed.optimizer._global_grad_norm = norm


class PolicyEngine(Engine):
    """A causal language model: log-probabilities of given tokens."""

    def logits(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] in the model's dtype for right-padded `ids` [B, T]."""
        return self.deepspeed(**forward_inputs(self.module, ids, lengths)).logits


class ScalarEngine(Engine):
    """A reward or value model: one number for each position."""

    def scalars(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """fp32 [B, T] for right-padded `ids` [B, T]; entry t has read tokens 0 to t."""
        return self.deepspeed(ids, lengths)

    def scores(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """fp32 [B]: the scalar at the last real token of each row."""
        return at_last(self.scalars(ids, lengths), lengths)


def _decay_groups(module: nn.Module, config: dict) -> list[dict]:
    """Weight decay for matrices only: biases, norms and other vectors keep their scale."""
    decay = config["optimizer"]["params"]["weight_decay"]
    trained = [p for p in module.parameters() if p.requires_grad]
    if not decay:
        return [{"params": trained}]
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
