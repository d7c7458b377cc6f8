"""The rollout interface: DeepSpeed's dataclasses, with what a policy-gradient trainer needs beside them.

DeepSpeed's own (`deepspeed.runtime.rollout`) name prompts, masks and sampling; they lack seeds, stop ids, an ended
flag and log-probabilities. This is the one module that knows both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig

from rlhfdsl.engines.rollout.sampling import Distribution
from rlhfdsl.models.inputs import length_mask


@dataclass
class Sampling(SamplingConfig):
    """DeepSpeed's settings, `top_k <= 0` and `top_p = 1` for all tokens, and the ids that end an answer.

    at_once: answers sampled at a time, what the KV cache has room for; None is all of them.
    """

    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0
    at_once: int | None = None

    @property
    def distribution(self) -> Distribution:
        """What a token is drawn from."""
        return Distribution(
            self.temperature, self.top_k if self.top_k > 0 else None, self.top_p if self.top_p < 1 else None
        )


@dataclass
class Prompts(RolloutRequest):
    """Left-padded prompts [B, Tp] with their mask, and an int64 seed for each answer [B x n_samples_per_prompt]."""

    seeds: torch.Tensor | None = None


@dataclass
class Rollout(RolloutBatch):
    """Prompts with sampled answers, n_samples_per_prompt adjacent rows for each prompt.

    input_ids, attention_mask [B', Tp + Ta]: left-padded prompt, then the answer, right-padded.
    answer_lengths [B']: tokens of the answer, the stop token included.
    ended [B']: whether the answer closed with a stop token.
    log_probs [B', Ta]: of the sampled tokens as the rollout computed them, at its temperature; 0 beyond.
    seeds [B']: of each answer's noise.
    """

    answer_lengths: torch.Tensor | None = None
    ended: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    seeds: torch.Tensor | None = None

    def right_padded(self, pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids [B', T], prompt lengths [B'], lengths [B']) with every row starting in column 0."""
        start = int(self.response_start_idx[0])
        prompt_lengths = self.attention_mask[:, :start].sum(1)
        lengths = prompt_lengths + self.answer_lengths
        width = int(lengths.max())
        columns = torch.arange(width, device=self.input_ids.device) + (start - prompt_lengths).unsqueeze(1)
        ids = self.input_ids.gather(1, columns.clamp(max=self.seq_len - 1))
        return ids.masked_fill(~length_mask(lengths, width), pad_id), prompt_lengths, lengths


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, Tp] with every prompt at the right edge, and their mask (1 on real tokens)."""
    width = max(len(ids) for ids in prompts)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def right_padded(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Left-padded ids [B, T] with every row moved to column 0; what follows a row is a real token, seen by none."""
    width = ids.shape[1]
    columns = torch.arange(width, device=ids.device) + (width - lengths).unsqueeze(1)
    return ids.gather(1, columns.clamp(max=width - 1))


class Sampler(RolloutEngine):
    """A rollout engine that fills `Rollout` and can give its memory back between rollouts."""

    @abstractmethod
    def generate(self, request: Prompts, sampling: Sampling) -> Rollout:
        """Sample `n_samples_per_prompt` answers for each prompt."""

    def sync_weights(self, step: int) -> None:
        """Nothing to push: the sampler reads the weights that are trained."""

    def release(self) -> None:
        """Give memory back until the next `generate`."""
