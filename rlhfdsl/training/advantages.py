"""Rewards, advantages and the KL controller of PPO, as pure functions over answers [B, T] with a bool mask [B, T].

An answer's tokens are the first entries of its row; the mask is false from its end on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """-coefficient x kl at every token, and the answer's score added at its last: scores [B], kl [B, T] -> [B, T].

    Ziegler et al. 2019, equation 2, spread over the tokens.
    """
    rewards = -coefficient * kl * mask
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last.clamp(min=0), (scores * mask.any(1)).unsqueeze(1))


def overlong_penalty(lengths: Tensor, longest: int, buffer: int, penalty: float) -> Tensor:
    """What a long answer costs, [B]: 0 up to longest - buffer tokens, then linearly more, `penalty` at `longest`.

    Yu et al. 2025 ("DAPO"), equation 13. lengths [B]: tokens of the answers.
    """
    return penalty * ((lengths - (longest - buffer)) / buffer).clamp(min=0)


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: Schulman et al. 2016, equations 11 to 16.

    rewards, values [B, T]: of token t, and of the state before it. The state after the last token is worth 0.
    Returns advantages and returns = advantages + values, [B, T], 0 outside the mask. No gradient flows.
    """
    with torch.no_grad():
        values, rewards = values * mask, rewards * mask
        following = torch.nn.functional.pad(values[:, 1:], (0, 1))
        # token by token on the CPU: on a GPU each token would be a few kernels that compute next to nothing
        deltas, here = ((rewards + gamma * following - values).T.cpu(), mask.T.cpu())
        advantages = torch.zeros_like(deltas)
        last = torch.zeros_like(deltas[0])
        for t in reversed(range(len(deltas))):
            last = (deltas[t] + gamma * lam * last) * here[t]
            advantages[t] = last
        advantages = advantages.T.to(values.device)
        return advantages, advantages + values


def group_advantages(rewards: Tensor, *, scale: bool) -> Tensor:
    """An answer's lead over the mean of its group, and with `scale` over the group's deviation: both [N, answers].

    Shao et al. 2024, section 4.1.2. The deviation is the biased one, so that a group's advantages have mean square 1;
    a group of equal rewards has advantage 0.
    """
    rewards = rewards.double()  # an fp32 mean of equal rewards is not quite them: by half the 1e-6 below, at 5
    lead = rewards - rewards.mean(1, keepdim=True)
    return (lead / (rewards.std(1, keepdim=True, correction=0) + 1e-6) if scale else lead).float()


def leave_one_out(rewards: Tensor) -> Tensor:
    """An answer's reward less the mean of the other answers' of its group: both [N, answers], at least 2 of them.

    Kool et al. 2019, equation 8: an unbiased baseline, since it does not depend on the answer.
    """
    count, rewards = rewards.shape[1], rewards.double()  # as in group_advantages
    others = (rewards.sum(1, keepdim=True) - rewards) / (count - 1)
    return (rewards - others).float()


def whiten(x: Tensor, mask: Tensor, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
    """x [B, T] with mean 0 and variance 1 over the masked entries of all ranks; 0 outside the mask.

    The variance is the biased one, as in OpenAI's code (Huang et al. 2023, "The N implementation details of RLHF").
    `all_sum` adds a tensor over the ranks.
    """
    x = x.double()
    count, total = all_sum(torch.stack([mask.sum().double(), (x * mask).sum()]))
    mean = total / count
    variance = all_sum(((x - mean).square() * mask).sum()) / count
    return ((x - mean) * torch.rsqrt(variance + 1e-8) * mask).float()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, all_sum: Callable[[Tensor], Tensor]) -> float:
    """1 - Var(returns - values) / Var(returns) over the masked entries of all ranks; nan when returns do not vary."""
    v, r, m = values.double(), returns.double(), mask.double()
    sums = all_sum(torch.stack([m.sum(), (r * m).sum(), ((r - v) * m).sum()]))
    count, mean, mean_error = sums[0], sums[1] / sums[0], sums[2] / sums[0]
    spread = all_sum(torch.stack([((r - mean).square() * m).sum(), ((r - v - mean_error).square() * m).sum()])) / count
    return float(1 - spread[1] / spread[0]) if spread[0] > 0 else float("nan")


def next_kl_coefficient(coefficient: float, kl: float, target: float, horizon: float, sequences: int) -> float:
    """The adaptive KL controller: Ziegler et al. 2019, section 2.2.

    kl: mean over the answers of the summed KL, in nats; sequences: answers since the last change.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * sequences / horizon)
