"""REINFORCE leave-one-out: the baseline of an answer is the mean reward of the other answers to its prompt.

Kool et al. 2019; for language models Ahmadian et al. 2024. No critic; a whole answer is one action whose reward is its
score less coefficient x its summed KL. With one epoch and one minibatch in a rollout the ratio is 1 and the update is
REINFORCE; with more the clipped surrogate of PPO keeps it near the policy that sampled.

Left out: a second whitening of the advantages over the batch.
"""

from __future__ import annotations

from torch import Tensor

from rlhfdsl.training import loop
from rlhfdsl.training.advantages import leave_one_out
from rlhfdsl.training.context import Context
from rlhfdsl.training.grpo import CriticFree


class Trainer(CriticFree):
    """RLOO over actor, reference and reward."""

    def advantages(self, rewards: Tensor) -> Tensor:
        return leave_one_out(rewards)


def run(context: Context) -> dict[str, float]:
    """Train the actor of an `rloo` stage, evaluate against the policy it started from, and save it."""
    return loop.run(context, Trainer)
