"""What must hold before the first PPO update. Fatal: a run that breaks one would learn from wrong numbers."""

from __future__ import annotations

import math

import torch

from rlhfdsl.language.diagnostics import UserError

# Two forwards of one micro batch at equal shapes differ by rounding only.
RATIO_TOLERANCE = {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.02}
KL_TOLERANCE = {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.02}
REWARD_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.05}


def ratio_is_one(first: torch.Tensor, second: torch.Tensor, mask: torch.Tensor, dtype: str) -> float:
    """Two training forwards of the same answers give the same log-probabilities: dropout is off, masks agree.

    first, second, mask [B, A]. Returns the mean |log ratio| over the mask.
    """
    drift = ((first - second).abs() * mask).sum().item() / max(int(mask.sum()), 1)
    _require(
        drift,
        RATIO_TOLERANCE[dtype],
        "E0780",
        f"before the first update the policy's ratio to itself is not 1: mean |log ratio| is {drift:.2e}",
        "dropout of the actor must be 0 in PPO; anything else is a fault of the model's implementation",
    )
    return drift


def reference_agrees(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, mask: torch.Tensor, dtype: str) -> float:
    """The KL to a reference of the same weights is 0. Returns the mean |log ratio| over the mask."""
    drift = ((log_probs - ref_log_probs).abs() * mask).sum().item() / max(int(mask.sum()), 1)
    _require(
        drift,
        KL_TOLERANCE[dtype],
        "E0781",
        f"actor and reference start from the same weights but differ by {drift:.2e} nats a token before any update",
        "the weights on the disk changed while the stage was loading, or one of the two was loaded in another dtype",
    )
    return drift


def padding_is_ignored(score: torch.Tensor, padded_score: torch.Tensor, dtype: str) -> float:
    """Rewards [B] of the same answers with and without extra padding are equal. Returns the largest difference."""
    drift = (score - padded_score).abs().max().item()
    bound = REWARD_TOLERANCE[dtype] * max(1.0, score.abs().max().item())
    _require(
        drift,
        bound,
        "E0782",
        f"extra padding changes the reward by {drift:.2e}",
        "the reward model does not respect its attention mask; `attention = eager` may help",
    )
    return drift


def _require(drift: float, bound: float, code: str, message: str, help: str) -> None:
    if not math.isfinite(drift):  # no sign of two forwards that differ: the numbers of both are spoilt
        raise UserError(
            "E0794", "what a model computes before any update is not finite",
            help="weights that it starts from are nan or inf, or they overflow in fp16: dtype = bf16 or fp32",
        )  # fmt: skip
    if drift > bound:
        raise UserError(code, message, help=help)
