"""What a policy says of given tokens: one forward pass, and no more of the output matrix than the tokens need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rlhfdsl.engines.base import BasePolicy, BesideBase
from rlhfdsl.engines.engine import PolicyEngine
from rlhfdsl.training.losses import token_statistics


@dataclass(frozen=True)
class Targets:
    """The N tokens of a batch [B, T] that are to be predicted.

    rows, columns [N]: where they are; first: the first column whose logits they need. To find them waits for the
    device, to read with them does not.
    """

    rows: Tensor
    columns: Tensor
    first: int

    @classmethod
    def of(cls, marked: Tensor) -> Self:
        """The tokens marked in a bool [B, T], but for those in column 0, which nothing predicts."""
        rows, columns = marked[:, 1:].nonzero(as_tuple=True)
        return cls(rows, columns + 1, int(columns.min()) if len(columns) else 0)


def target_statistics(
    engine: PolicyEngine | BasePolicy | BesideBase,
    ids: Tensor,
    lengths: Tensor,
    targets: Targets,
    temperature: float = 1.0,
    total: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the target tokens, and entropies of their distributions: fp32 [B, T] each.

    ids [B, T] right-padded; total: their tokens, where it is known without a look at the device. Entries that are not
    targets are 0.
    """
    rows, columns = targets.rows, targets.columns
    logits, places = engine.logits_at(ids, lengths, rows, columns - 1, targets.first, total)
    found = token_statistics(logits, ids[rows, columns], temperature, places)
    whole = torch.zeros(ids.shape, device=ids.device)
    log_probs, entropies = (whole.index_put((rows, columns), part) for part in found)
    return log_probs, entropies
