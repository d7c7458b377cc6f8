"""The ranks that sample together, each with its shard of the weights (tensor parallel).

Every rank of a group goes through the same decode steps over the same slots, with its part of the heads. What depends
on a sum may differ between ranks in the last bit, so tokens are drawn by the first rank alone.
"""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.nn import functional

from rlhfdsl.engines import distributed
from rlhfdsl.engines.rollout.interface import Prompts


class TensorGroup:
    """This rank's group of `size` consecutive ranks. rank: its place among them.

    Its methods are collective calls of the group. `total` and `agreed` also run inside a captured CUDA graph.
    """

    def __init__(self, size: int):
        self.size = size
        self._handle = distributed.neighbours(size)
        self.rank = dist.get_rank(self._handle)

    def total(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        dist.all_reduce(tensor, group=self._handle)

    def agreed(self, tokens: torch.Tensor, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [B] and their log-probabilities fp32 [B] as the first rank drew them."""
        # one message; fp64 holds both exactly
        drawn = torch.stack([tokens.double(), log_probs.double()])
        dist.broadcast(drawn, group=self._handle, group_src=0)
        return drawn[0].long(), drawn[1].float()

    def gathered(self, request: Prompts, copies: int) -> tuple[Prompts, slice]:
        """The prompts of all ranks, and where the answers to this rank's are, `copies` for each prompt, among all."""
        device = request.prompt_ids.device
        mine = [part.cpu() for part in (request.prompt_ids, request.prompt_attention_mask, request.seeds)]
        everyone: list[list[torch.Tensor]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, mine, group=self._handle)
        width = max(ids.shape[1] for ids, _, _ in everyone)
        ids, masks, seeds = zip(*everyone, strict=True)
        first = copies * sum(len(part) for part in ids[: self.rank])
        return (
            Prompts(
                torch.cat([_left_padded(part, width) for part in ids]).to(device),
                torch.cat([_left_padded(part, width) for part in masks]).to(device),
                seeds=torch.cat(seeds).to(device),
            ),
            slice(first, first + copies * len(request.prompt_ids)),
        )


def _left_padded(rows: torch.Tensor, width: int) -> torch.Tensor:
    return functional.pad(rows, (width - rows.shape[1], 0))
