"""What a policy says of given tokens: one forward pass, and no more of the output matrix than the tokens need."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhfdsl.engines.engine import BasePolicy, PolicyEngine
from rlhfdsl.training.losses import token_statistics


def target_statistics(
    engine: PolicyEngine | BasePolicy, ids: Tensor, lengths: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens marked in `targets`, and entropies of their distributions: fp32 [B, T] each.

    ids [B, T] right-padded; targets bool [B, T]: column 0, which nothing predicts, counts as false. Entries that are
    not targets are 0.
    """
    targets = targets.clone()
    targets[:, 0] = False
    rows, columns = targets.nonzero(as_tuple=True)
    first = int(columns.min()) - 1 if len(columns) else 0
    logits = engine.logits(ids, lengths, first)
    width = ids.shape[1] - first
    found = token_statistics(logits.flatten(0, 1), ids[rows, columns], temperature, rows * width + columns - 1 - first)
    whole = torch.zeros(targets.shape, device=ids.device)
    log_probs, entropies = (whole.masked_scatter(targets, part) for part in found)
    return log_probs, entropies
