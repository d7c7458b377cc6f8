"""Group-relative policy optimisation: an answer is worth its lead over the other answers to its prompt.

Shao et al. 2024 (DeepSeekMath), section 4.1: no critic; every token of an answer has the advantage (score - mean of the
group) / deviation of the group, and the KL to the reference is in the loss (k3). `scale = off` leaves the deviation out
(Liu et al. 2025, "Dr. GRPO"), `clip_high` widens the upper clip (Yu et al. 2025, "DAPO").

Left out, on purpose: the paper's mean over each answer's own tokens. The loss is the mean over the tokens of the whole
minibatch, as in DAPO, since the other favours short right answers and long wrong ones. Left out: dropping and sampling
anew prompts whose answers all score the same (they have advantage 0 and only the KL acts on them).
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from rlhfdsl.training import loop
from rlhfdsl.training.advantages import group_advantages, token_rewards
from rlhfdsl.training.context import Context
from rlhfdsl.training.experience import Experience, Scored
from rlhfdsl.training.onpolicy import OnPolicy


class CriticFree(OnPolicy):
    """A policy whose baseline is made of the other answers to the same prompt."""

    def judged(self, scored: Scored) -> Experience:
        rewards = token_rewards(self.shaped(scored), self.penalty(scored), scored.mask, self.kl_coefficient)
        worth = self.advantages(rewards.sum(1).view(-1, self.settings["rollout"]["answers"]))
        advantages = worth.view(-1, 1) * scored.mask
        return Experience(**vars(scored), rewards=rewards, advantages=advantages)

    @abstractmethod
    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantages of whole answers from their rewards, both [prompts, answers]."""


class Trainer(CriticFree):
    """GRPO over actor, reference and reward."""

    def advantages(self, rewards: Tensor) -> Tensor:
        return group_advantages(rewards, scale=self.settings["update"]["scale"])


def run(context: Context) -> dict[str, float]:
    """Train the actor of a `grpo` stage, evaluate against the policy it started from, and save it."""
    return loop.run(context, Trainer)
