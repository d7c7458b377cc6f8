"""The policy's part of an update, the same in PPO, GRPO and RLOO: gradients of one minibatch, before its one step.

The loss is the clipped surrogate, plus coefficient x KL where the recipe puts the KL in the loss, minus an entropy
bonus, as a mean over the answer tokens of the whole minibatch on all ranks; and, where the recipe mixes pretraining in,
weight x the token-mean loss of its rows. Both gradients are summed before the optimizer steps once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhfdsl.data.collate import collate
from rlhfdsl.data.edge import Example
from rlhfdsl.engines import distributed
from rlhfdsl.engines.distributed import all_sum
from rlhfdsl.engines.engine import PolicyEngine
from rlhfdsl.training.experience import Experience
from rlhfdsl.training.losses import kl_estimate, policy_loss, token_mean
from rlhfdsl.training.micro import Passes, micro_parts
from rlhfdsl.training.rollouts import answer_statistics, answer_targets
from rlhfdsl.training.sft import supervised_tokens, token_loss


def policy_gradients(
    engine: PolicyEngine,
    experience: Experience,
    parts: Iterable[Tensor],
    settings: dict[str, Any],
    kl_coefficient: float,
) -> Passes:
    """Accumulate the gradients of one minibatch, whose micro batches are the row numbers `parts`.

    settings: `update`, `kl` and `rollout` of the stage's settings. The metrics are means over the minibatch's tokens.
    """
    update, kl, temperature = settings["update"], settings["kl"], settings["rollout"]["temperature"]
    taken = [experience.take(rows) for rows in parts]
    targets = [answer_targets(part) for part in taken]  # before the first pass: both wait for the device
    tokens = all_sum(sum(part.mask.sum() for part in taken).float())
    sums = torch.zeros(6, device=engine.device, dtype=torch.float64)
    engine.train()
    for part, marked in zip(taken, targets, strict=True):
        mask = part.mask
        log_probs, entropy = answer_statistics(engine, part, temperature, marked)
        losses, clipped = policy_loss(
            log_probs, part.log_probs, part.advantages, update["clip"], update["dual_clip"], update["clip_high"]
        )
        surrogate = losses.detach()
        if kl["apply"] == "loss":
            losses = losses + kl_coefficient * kl_estimate(log_probs, part.ref_log_probs, kl["estimator"])
        if update["entropy"]:
            losses = losses - update["entropy"] * entropy
        engine.backward(token_mean(losses, mask, tokens, distributed.world()))
        log_ratio = (log_probs - part.log_probs).detach()
        sums += torch.stack([
            (surrogate * mask).sum(), (clipped & mask).sum(), (entropy.detach() * mask).sum(),
            (kl_estimate(part.log_probs, log_probs.detach(), "k3") * mask).sum(),
            (log_ratio.exp() * mask).sum(), mask.sum(),
        ]).double()  # fmt: skip
        yield
    loss, clips, entropy_sum, approximate_kl, ratio, count = all_sum(sums).tolist()
    return {
        "policy_loss": loss / count,
        "clipped": clips / count,
        "entropy": entropy_sum / count,
        "approximate_kl": approximate_kl / count,
        "ratio": ratio / count,
    }


def pretraining_gradients(
    engine: PolicyEngine, rows: Sequence[Example], weight: float, pad_id: int, longest: int
) -> Passes:
    """Add weight x the token-mean loss of pretraining rows to the gradients; the metric is that loss.

    longest: tokens of a row at which the engine's micro batch was sized.
    """
    tokens = supervised_tokens(rows, engine.device)
    total = torch.zeros((), device=engine.device)
    (parts,) = micro_parts([len(row.ids) for row in rows], engine, longest)
    for part in parts:
        loss = token_loss(engine, collate([rows[i] for i in part], pad_id).to(engine.device), tokens)
        engine.backward(weight * loss)
        total += loss.detach()
        yield
    return {"ptx_loss": all_sum(total).item() / distributed.world()}
