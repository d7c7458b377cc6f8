"""The parity gate: are a rollout engine's answers, and the log-probabilities it reports, those of the policy it trains?

In bf16 a decode step and a scoring forward differ by rounding alone, by 0.03 nats in the mean and 0.4 at most, so no
fixed bound can judge. The gate asks whether the rollout is as near to the scores as `generate` is on the same tokens.

Right log-probabilities of tokens that are not drawn by them, as the greedy ones, would pass that. Both engines draw by
the same noise, so the gate also asks how far each token, with its noise, is behind the one that `generate` draws.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rlhfdsl.engines.rollout.interface import Rollout

# What may be exceeded whatever the ratio: two right paths in fp32 differ by 1e-6, and `generate` may be as exact.
FLOOR = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 3e-3}
MEAN_RATIO, P99_RATIO = 1.5, 2.0


@dataclass(frozen=True)
class Parity:
    """Mean and 99th percentile of |log p - score| in nats, of the rollout's and of eager's log-probabilities.

    behind_mean: how far the tokens are, with their noise, behind those that eager draws, in nats.
    """

    holds: bool
    rollout_mean: float
    rollout_p99: float
    eager_mean: float
    eager_p99: float
    behind_mean: float

    def __str__(self) -> str:
        return (
            f"log-probabilities of the rollout differ from the scores by {self.rollout_mean:.2e} in the mean and "
            f"{self.rollout_p99:.2e} at the 99th percentile; those of `generate` by {self.eager_mean:.2e} and "
            f"{self.eager_p99:.2e}; the rollout's tokens are {self.behind_mean:.2e} behind those that `generate` draws"
        )


def compare(
    rollout: torch.Tensor, eager: torch.Tensor, scored: torch.Tensor, behind: torch.Tensor, mask: torch.Tensor,
    dtype: str,
) -> Parity:  # fmt: skip
    """Judge log-probabilities of the same tokens from three paths, all fp32 [B, A], over `mask` [B, A].

    The rollout may be at most 1.5 times as far from the scores as eager in the mean and twice at the 99th percentile.
    behind [B, A]: as `EagerSampler.read` has it. Another token than eager's is drawn where two are nearer to each other
    than the logits of both engines, so on a right path its mean is far below that of the differences; it has the same
    bound.
    """
    mask = mask.bool()
    ours, theirs = (rollout - scored).abs()[mask].double(), (eager - scored).abs()[mask].double()
    means = ours.mean().item(), theirs.mean().item()
    p99s = ours.quantile(0.99).item(), theirs.quantile(0.99).item()
    short = behind[mask].double().mean().item()
    floor = FLOOR[dtype]
    # written so that NaN does not hold
    near = MEAN_RATIO * means[1] + floor
    holds = means[0] <= near and p99s[0] <= P99_RATIO * p99s[1] + 4 * floor and short <= near
    return Parity(holds, means[0], p99s[0], means[1], p99s[1], short)


def some_rows(rollout: Rollout, count: int) -> Rollout:
    """At most `count` rows spread over a rollout, the first and the last among them."""
    total = len(rollout.input_ids)
    chosen = torch.linspace(0, total - 1, min(count, total), device=rollout.input_ids.device).round().long()
    parts = {name: value[chosen] for name, value in vars(rollout).items() if isinstance(value, torch.Tensor)}
    return replace(rollout, **parts)


def first_tokens(rollout: Rollout, count: int) -> Rollout:
    """A rollout with at most `count` tokens of every answer."""
    start = int(rollout.response_start_idx[0])
    return replace(
        rollout,
        input_ids=rollout.input_ids[:, : start + count],
        attention_mask=rollout.attention_mask[:, : start + count],
        answer_lengths=rollout.answer_lengths.clamp(max=count),
        log_probs=rollout.log_probs[:, :count],
    )
