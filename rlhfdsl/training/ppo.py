"""PPO from human feedback: sample answers, score them, update actor and critic.

Ouyang et al. 2022, step 3, with the details of Huang et al. (2023, 2024). The reward of a token is a KL penalty, at the
last one the score of the whole answer is added; advantages come from a critic by generalised advantage estimation and
are whitened over all ranks; then each minibatch is one optimizer step of the actor (PPO and ptx gradients together) and
one of the critic. What it shares with GRPO and RLOO is in onpolicy.py, policy.py and loop.py.

Left out: a critic that shares the actor's weights, and separate lambdas for actor and critic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhfdsl.data.edge import Example
from rlhfdsl.engines import distributed
from rlhfdsl.engines.distributed import all_sum
from rlhfdsl.engines.engine import Engine, ScalarEngine
from rlhfdsl.training import loop
from rlhfdsl.training.advantages import advantages_and_returns, explained_variance, token_rewards, whiten
from rlhfdsl.training.context import Context
from rlhfdsl.training.experience import Experience, Scored
from rlhfdsl.training.losses import token_mean, value_loss
from rlhfdsl.training.micro import Passes
from rlhfdsl.training.onpolicy import OnPolicy
from rlhfdsl.training.rollouts import answer_values, read


class Trainer(OnPolicy):
    """PPO over actor, critic, reference and reward."""

    def judged(self, scored: Scored) -> Experience:
        critic, update = self.engines.critic, self.settings["update"]
        critic.eval()
        parts = [rows for minibatch in self.parts(scored, critic) for rows in minibatch]
        values = read(scored, parts, lambda part: answer_values(critic, part))
        rewards = token_rewards(self.shaped(scored), self.penalty(scored), scored.mask, self.kl_coefficient)
        advantages, returns = advantages_and_returns(rewards, values, scored.mask, update["gamma"], update["lambda"])
        if update["whiten"]:
            advantages = whiten(advantages, scored.mask, all_sum)
        return Experience(**vars(scored), rewards=rewards, advantages=advantages, values=values, returns=returns)

    def rollout_metrics(self, experience: Experience) -> dict[str, float]:
        explained = explained_variance(experience.values, experience.returns, experience.mask, all_sum)
        return super().rollout_metrics(experience) | {"explained_variance": explained}

    def trained(self, actor: bool) -> list[Engine]:
        return [self.engines.critic, *super().trained(actor)]

    def gradients(
        self, experience: Experience, number: int, pretraining: Sequence[Example], actor: bool
    ) -> list[Passes]:
        critic = self.engines.critic
        passes = value_gradients(critic, experience, self.parts(experience, critic)[number], self.settings["update"])
        return [passes, *super().gradients(experience, number, pretraining, actor)]


def value_gradients(
    engine: ScalarEngine, experience: Experience, parts: Iterable[Tensor], update: dict[str, Any]
) -> Passes:
    """Accumulate the critic's gradients of one minibatch, whose micro batches are the row numbers `parts`."""
    taken = [experience.take(rows) for rows in parts]  # before the first pass: it waits for the device
    tokens = all_sum(sum(part.mask.sum() for part in taken).float())
    sums = torch.zeros(2, device=engine.device, dtype=torch.float64)
    engine.train()
    for part in taken:
        losses, clipped = value_loss(answer_values(engine, part), part.values, part.returns, update["value_clip"])
        engine.backward(update["value_weight"] * token_mean(losses, part.mask, tokens, distributed.world()))
        sums += torch.stack([(losses.detach() * part.mask).sum(), (clipped & part.mask).sum()]).double()
        yield
    loss, clips = (all_sum(sums) / tokens).tolist()
    return {"value_loss": loss, "value_clipped": clips}


def run(context: Context) -> dict[str, float]:
    """Train actor and critic of a `ppo` stage, evaluate against the policy it started from, and save both."""
    return loop.run(context, Trainer)
