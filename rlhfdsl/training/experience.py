"""What a rollout leaves for the update: sequences, and per-token quantities aligned to their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from rlhfdsl.models.inputs import length_mask


@dataclass(frozen=True)
class Experience:
    """B answers of one rollout on one rank. T: longest prompt + answer; A: longest answer.

    ids [B, T] right-padded; prompt_lengths, lengths [B]; ended [B]: whether the answer closed with a stop token;
    mask [B, A]: true on the answer's tokens; everything else [B, A] is 0 outside it, but for scores [B].
    """

    ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    ended: Tensor
    mask: Tensor
    rollout_log_probs: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    scores: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def rows(self, start: int, stop: int) -> Experience:
        """Rows `start` to `stop`, with the columns that only padding fills cut off."""
        part = {field.name: getattr(self, field.name)[start:stop] for field in fields(self)}
        width, answer = int(part["lengths"].max()), int(part["mask"].sum(1).max())
        part["ids"] = part["ids"][:, :width]
        for name, tensor in part.items():
            if name != "ids" and tensor.dim() == 2:
                part[name] = tensor[:, :answer]
        return Experience(**part)


def answer_mask(prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """Bool [B, A], true on the tokens of each answer; A is the longest."""
    answers = lengths - prompt_lengths
    return length_mask(answers, int(answers.max()))


def at_answers(per_token: Tensor, prompt_lengths: Tensor, mask: Tensor) -> Tensor:
    """Read [B, T] quantities of the states before each answer token: column p - 1 + t of a row with prompt length p.

    Column t of a log-probability tensor made from logits[:, :-1] speaks of token t + 1, and column t of a value
    tensor of the state after token t, so one index serves both. Returns [B, A], 0 outside `mask`.
    """
    columns = prompt_lengths.unsqueeze(1) - 1 + torch.arange(mask.shape[1], device=mask.device)
    return per_token.gather(1, columns.clamp(max=per_token.shape[1] - 1)).masked_fill(~mask, 0.0)


def joined(parts: Sequence[Tensor], fill: float) -> Tensor:
    """Stack [Bi, Ti] tensors into [sum of Bi, longest Ti], the shorter ones filled on the right."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])
