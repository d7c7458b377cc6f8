"""Effective FLOP/s: what the work of a phase takes by the plan's count of it, over the phase's seconds.

Counted is what the tokens need: no padding, no activations computed again for the backward pass, no optimizer. So what
is lost to them, to launches and to waiting lowers the rate, and two layouts of one recipe can be compared by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from rlhfdsl.engines import distributed
from rlhfdsl.engines.base import BasePolicy
from rlhfdsl.engines.engine import Engine


def sampling(engine: Engine, prompts: Tensor, lengths: Tensor) -> Tensor:
    """FLOPs of sampling answers [B] that end at `lengths` after `prompts` tokens, with a cache of keys and values.

    A token of an answer attends to what is before it; the last one is not read.
    """
    each, answers = engine.flops, lengths - prompts
    attended = prompts * prompts + (answers - 1) * (prompts + answers / 2)
    return (each.token * (lengths - 1) + each.said * answers + each.attended * attended).sum()


def reading(engine: Engine | BasePolicy, lengths: Tensor, said: Tensor | None = None) -> Tensor:
    """FLOPs of a forward pass over sequences [B] of `lengths`; said: how many of their tokens need logits, else all."""
    each = engine.flops
    said = lengths if said is None else said
    return (each.token * lengths + each.said * said + each.attended * lengths * lengths).sum()


def learning(engine: Engine, lengths: Tensor, said: Tensor | None = None) -> Tensor:
    """FLOPs of a forward and a backward pass: those of 3 forward passes, of 2 where weights are frozen (LoRA)."""
    return (3 if engine.spec["lora"] is None else 2) * reading(engine, lengths, said)


def tokens_of(lengths: Iterable[int]) -> Tensor:
    """Lengths of sequences as numbers that FLOPs are counted in."""
    return torch.tensor(list(lengths), dtype=torch.float64)


def speed(lengths: Tensor, flops: Tensor, seconds: float, device: torch.device) -> dict[str, float]:
    """What an update over sequences of `lengths` says of its time; flops: of this rank. Every rank calls it."""
    tokens = distributed.all_sum(lengths.sum().to(device)).item()
    return {"tokens_per_second": tokens / seconds, "seconds": seconds} | rate("train", flops, seconds, device)


def rate(phase: str, flops: Tensor, seconds: float, device: torch.device) -> dict[str, float]:
    """TFLOP/s of each device in a phase, from the FLOPs of this rank. Every rank calls it.

    Nothing where a count is unknown.
    """
    found = distributed.all_sum(flops.to(device)).item() / distributed.world() / seconds / 1e12
    return {} if math.isnan(found) else {f"tflop_per_second_{phase}": found}
