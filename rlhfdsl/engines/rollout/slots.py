"""The slots of the graph rollout: what a decode step reads and writes, and what it holds constant."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from rlhfdsl.engines.rollout.sampling import Distribution


@dataclass
class Slots:
    """What a decode step reads and writes, at fixed addresses.

    token, write [S]: the last token of a row and the column that it goes to. length [S, 1, 1, 1]: the columns that
    attention reads, 0 for an idle slot. step, seed [S]; idle [S] bool; answers, log_probs [S, answer columns].
    """

    token: torch.Tensor
    write: torch.Tensor
    length: torch.Tensor
    step: torch.Tensor
    seed: torch.Tensor
    idle: torch.Tensor
    answers: torch.Tensor
    log_probs: torch.Tensor

    @classmethod
    def empty(cls, count: int, columns: int, device: torch.device) -> Slots:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            token=zeros(count), write=zeros(count), length=zeros(count, 1, 1, 1), step=zeros(count),
            seed=zeros(count), idle=zeros(count, dtype=torch.bool), answers=zeros(count, columns),
            log_probs=zeros(count, columns, dtype=torch.float32),
        )  # fmt: skip

    def first(self, count: int) -> Slots:
        """Views of the first slots, at the same addresses."""
        return Slots(**{field.name: getattr(self, field.name)[:count] for field in fields(self)})

    def advance(self, chosen: torch.Tensor, log_probs: torch.Tensor, stops: torch.Tensor, longest: int) -> None:
        """Note a drawn token [S] and its log-probability [S]; an answer that ends leaves its slot idle.

        stops: ids that end an answer. An idle slot changes nothing.
        """
        busy = ~self.idle
        column = self.step.clamp(max=self.answers.shape[1] - 1).unsqueeze(1)
        for notes, new in ((self.answers, chosen), (self.log_probs, log_probs)):
            notes.scatter_(1, column, torch.where(busy, new, notes.gather(1, column)[:, 0]).unsqueeze(1))
        self.step.add_(busy)
        self.idle.logical_or_((chosen.unsqueeze(1) == stops).any(1) | (self.step >= longest))
        self.token.copy_(torch.where(busy, chosen, self.token))
        self.write.add_(~self.idle)
        self.length.copy_(((self.write + 1) * ~self.idle).view(-1, 1, 1, 1))

    def rest(self) -> None:
        """Make every slot idle."""
        for field in fields(self):
            getattr(self, field.name).zero_()
        self.idle.fill_(True)


@dataclass(frozen=True)
class Law:
    """The part of the sampling settings that a captured step holds as constants."""

    distribution: Distribution
    longest: int
    stop_ids: tuple[int, ...]
    pad_id: int
