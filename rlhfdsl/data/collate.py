"""From examples to padded tensors. The lengths say what is real: no id is special."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhfdsl.data.edge import Example


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows: ids int64 [B, T], lengths int64 [B], loss bool [B, T] (false on padding).

    `loss[b, t]` says that token t is a target, to be predicted from the tokens before it. total: tokens of all rows.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    loss: torch.Tensor
    total: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.lengths.to(device), self.loss.to(device), self.total)


def collate(rows: Sequence[Example], pad_id: int = 0) -> Batch:
    """Pad examples on the right to the longest of them. `pad_id` only has to be an id that the model has."""
    lengths = torch.tensor([len(row.ids) for row in rows], dtype=torch.int64)
    width = int(lengths.max())
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    loss = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.int64)
        loss[i, : len(row.ids)] = torch.tensor(row.loss, dtype=torch.bool)
    return Batch(ids, lengths, loss, int(lengths.sum()))
