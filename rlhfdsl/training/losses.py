"""Losses as pure functions.

Every token loss comes back unreduced, [B, T] beside a bool mask [B, T]: the caller divides the masked sum by the token
count of the whole global minibatch (`token_mean`), never a micro batch's own mean, since a mean of means weighs the
tokens of short micro batches more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_CHUNK = 1 << 24  # fp32 logits held at once: 64 MiB


def token_mean(losses: Tensor, mask: Tensor, tokens: Tensor | float, world: int) -> Tensor:
    """Masked sum of `losses` [B, T] over the `tokens` of the global minibatch, times the ranks (DeepSpeed averages)."""
    return (losses * mask).sum() / tokens * world


def selected_log_probs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `targets`, in fp32: [B, T, V], [B, T] -> [B, T].

    Works through the tokens in chunks and recomputes each in the backward pass, so that no fp32 copy of all logits
    exists.
    """

    def chunk(part: Tensor, wanted: Tensor) -> Tensor:
        return -functional.cross_entropy(part.float() / temperature, wanted, reduction="none")

    return _by_chunk(chunk, logits, targets)


def entropies(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats, fp32: [B, T, V] -> [B, T]. Chunked as `selected_log_probs`."""

    def chunk(part: Tensor) -> Tensor:
        log_probs = (part.float() / temperature).log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)

    return _by_chunk(chunk, logits)


def _by_chunk(function: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    size = max(1, _CHUNK // logits.shape[-1])
    parts = zip(logits.flatten(0, 1).split(size), *(other.flatten().split(size) for other in others), strict=True)
    if torch.is_grad_enabled() and logits.requires_grad:
        done = [checkpoint(function, *part, use_reentrant=False) for part in parts]
    else:
        done = [function(*part) for part in parts]
    return torch.cat(done).view(logits.shape[:2])


def pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected) for rewards [B] of a pair: Bradley-Terry; Ouyang et al. 2022, equation 1."""
    return -functional.logsigmoid(chosen - rejected)


def preference_loss(margin: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(margin) for the margins [B] of DPO: Rafailov et al. 2023, equation 7.

    margin: beta x (log-ratio of the chosen answer - log-ratio of the rejected one), each to the reference. With
    `smoothing` e the pair is taken to be the other way round with probability e (Mitchell 2023).
    """
    return -(1 - smoothing) * functional.logsigmoid(margin) - smoothing * functional.logsigmoid(-margin)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip: float,
    dual_clip: float | None = None,
    clip_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of PPO, per token: Schulman et al. 2017, equation 7.

    All inputs [B, T]. The ratio is clipped to 1 - clip and 1 + clip_high (left out: clip; Yu et al. 2025, section 3.1).
    With `dual_clip` c > 1 the loss of a negative advantage is at most -c x advantage (Ye et al. 2020, equation 5).
    Returns the losses and the bool mask of the tokens where the clip decides, both [B, T].
    """
    ratio = (log_probs - old_log_probs).exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip, 1.0 + (clip if clip_high is None else clip_high))
    losses = torch.maximum(free, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    return losses, clipped > free


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Squared error of the critic, per token, the larger of free and clipped around the old values.

    All inputs [B, T]. As in OpenAI's PPO (Huang et al. 2022, detail 9), without its factor 1/2: that is the
    recipe's `value_weight`. Returns the losses and the mask of the tokens where the clip decides.
    """
    free = (values - returns).square()
    if clip is None:
        return free, torch.zeros_like(free, dtype=torch.bool)
    near = old_values + (values - old_values).clamp(-clip, clip)
    clipped = (near - returns).square()
    return torch.maximum(free, clipped), clipped > free


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from sampled tokens, [B, T].

    Schulman 2020 ("Approximating KL divergence"), r = ref/policy: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r.
    """
    log_ratio = ref_log_probs - log_probs
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return log_ratio.exp() - 1 - log_ratio
    raise ValueError(f"unknown estimator {estimator!r}")
