"""What a rollout leaves for the update: sequences, and per-token quantities aligned to their answers.

Three steps, each with more fields: `Answers` are sampled, `Scored` are read by policy, reference and reward, an
`Experience` knows what each token is worth.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from rlhfdsl.engines.rollout.interface import Rollout
from rlhfdsl.models.inputs import length_mask


@dataclass(frozen=True, kw_only=True)
class Answers:
    """B answers of one rollout on one rank; the answers to one prompt are adjacent rows.

    T: longest prompt + answer; A: longest answer. ids [B, T] right-padded; prompt_lengths, lengths [B]; ended [B]:
    whether the answer closed with a stop token; mask [B, A]: true on the answer's tokens; rollout_log_probs [B, A]: of
    the sampled tokens as the rollout engine computed them. Everything [B, A] is 0 outside the mask. total: tokens of
    all rows, known of rows that were taken.
    """

    ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    ended: Tensor
    mask: Tensor
    rollout_log_probs: Tensor
    total: int | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def rows(self, start: int, stop: int) -> Self:
        """Rows `start` to `stop`, with the columns that only padding fills cut off."""
        return self.take(slice(start, stop))

    def take(self, rows: slice | Tensor) -> Self:
        """The given rows, with the columns that only padding fills cut off."""
        rows = rows.to(self.ids.device) if isinstance(rows, Tensor) else rows
        every = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        part = {name: value[rows] for name, value in every.items()}
        lengths = part["lengths"]
        known = torch.stack([lengths.max(), part["mask"].sum(1).max(), lengths.sum()])
        width, answer, total = known.tolist()  # one look at the device
        for name, tensor in part.items():
            if tensor.dim() == 2 and name != "score_terms":
                part[name] = tensor[:, : width if name == "ids" else answer]
        return type(self)(**part, total=total)


@dataclass(frozen=True, kw_only=True)
class Scored(Answers):
    """Answers as the training forwards and the reward read them: log-probabilities [B, A] of the sampled tokens under
    policy and reference, and the reward's raw scores [B], with those of each term [B, terms] of a weighted sum."""

    log_probs: Tensor
    ref_log_probs: Tensor
    scores: Tensor
    score_terms: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Experience(Scored):
    """Scored answers with what an update learns from, [B, A]; values and returns only where there is a critic."""

    rewards: Tensor
    advantages: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None


def as_answers(rollout: Rollout, pad_id: int) -> Answers:
    """What a rollout engine returned, right-padded."""
    ids, prompt_lengths, lengths = rollout.right_padded(pad_id)
    mask = answer_mask(prompt_lengths, lengths)
    return Answers(
        ids=ids, prompt_lengths=prompt_lengths, lengths=lengths, ended=rollout.ended, mask=mask,
        rollout_log_probs=rollout.log_probs[:, : mask.shape[1]],
    )  # fmt: skip


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
