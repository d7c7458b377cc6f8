"""Rows without their padding: the real tokens of a right-padded batch, one after the other.

All of a decoder but its attention computes each token by itself, so a pass over the N real tokens [1, N] gives what one
over the rows [B, T] does, without computing the padding. For attention alone they are spread over their rows again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the N real tokens of right-padded rows [B, T] lie.

    places int64 [N]: in the flattened rows [B x T]. positions int64 [1, N]: in their own rows. starts int64 [B]: where
    each row begins among the N.
    """

    batch: int
    width: int
    places: Tensor
    positions: Tensor
    starts: Tensor

    @classmethod
    def of(cls, lengths: Tensor, width: int, total: int) -> Self:
        """The packing of rows of `lengths` [B], padded to `width`; total: their sum. Nothing waits for the device."""
        device = lengths.device
        starts = lengths.cumsum(0) - lengths
        row = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=total)
        positions = torch.arange(total, device=device) - starts[row]
        return cls(len(lengths), width, row * width + positions, positions.unsqueeze(0), starts)

    def gathered(self, x: Tensor) -> Tensor:
        """[B, T, …] -> [1, N, …]."""
        return _Gathered.apply(x.flatten(0, 1), self.places).unsqueeze(0)

    def spread(self, x: Tensor) -> Tensor:
        """[1, N, …] -> [B, T, …], 0 on the padding: what attends from there and to there is finite, and not used."""
        return _Spread.apply(x[0], self.places, self.batch * self.width).unflatten(0, (self.batch, self.width))

    def indices(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[M], which of the N the tokens at rows and columns [M] are."""
        return self.starts[rows] + columns


class _Gathered(torch.autograd.Function):
    """Rows [N] of a tensor, each at most once: so its gradient is written, and not summed as an index's would be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(gradient, *ctx.saved_tensors, ctx.size), None


class _Spread(torch.autograd.Function):
    """The other way round: rows [N] to their places in a tensor of `size` rows, the others 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Gathered.apply(gradient, *ctx.saved_tensors), None, None
