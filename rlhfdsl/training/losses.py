"""Losses as pure functions.

Every token loss comes back unreduced, [B, T] beside a bool mask [B, T]: the caller divides the masked sum by the token
count of the whole global minibatch (`token_mean`), never a micro batch's own mean, since a mean of means weighs the
tokens of short micro batches more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 1 << 24  # fp32 logits held at once: 64 MiB
_LEAST = -1e4  # a log-probability whose p is 0 in fp32


def token_mean(losses: Tensor, mask: Tensor, tokens: Tensor | float, world: int) -> Tensor:
    """Masked sum of `losses` [B, T] over the `tokens` of the global minibatch, times the ranks (DeepSpeed averages)."""
    return (losses * mask).sum() / tokens * world


def token_statistics(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at `targets`, and the entropy of that distribution in nats: fp32 [N] each.

    logits [M, V] in any type; targets [N]; rows [N]: the row of each target (left out: row n is that of target n).
    No fp32 copy of all logits exists, forwards or backwards: on a GPU a kernel reads them once (kernels.py), elsewhere
    the tokens come in chunks. What stays for the backward pass is the logits themselves and two numbers for each token.
    """
    return _TokenStatistics.apply(logits, targets, temperature, rows)


def selected_log_probs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `targets`, in fp32: [B, T, V], [B, T] -> [B, T]."""
    return token_statistics(logits.flatten(0, 1), targets.flatten(), temperature)[0].view(targets.shape)


class _TokenStatistics(torch.autograd.Function):
    """With p = softmax(x): d log p_t / dx = onehot(t) - p, and d H / dx = -p (log p + H)."""

    @staticmethod
    def forward(ctx, logits, targets, temperature, rows):
        statistics = _kernels().statistics if logits.is_cuda else _statistics
        log_probs, entropy, norm = statistics(logits, targets, temperature, rows)
        ctx.save_for_backward(logits, targets, rows, norm, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, *of):
        logits, targets, rows, norm, entropy = ctx.saved_tensors
        gradient = _kernels().gradient if logits.is_cuda else _gradient
        return gradient(logits, targets, ctx.temperature, rows, norm, entropy, *of), None, None, None


def _kernels():
    from rlhfdsl.training import kernels

    return kernels


def _statistics(
    logits: Tensor, targets: Tensor, temperature: float, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the targets, entropies, and log sum exp of the scaled logits: fp32 [N] each; as in kernels.py."""
    log_probs = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    entropy, norm = torch.empty_like(log_probs), torch.empty_like(log_probs)
    for part in _chunks(len(targets), logits.shape[-1]):
        chosen = _rows(logits, rows, part)
        if temperature != 1:
            chosen = chosen.float() / temperature
        every = chosen.log_softmax(-1, dtype=torch.float32)
        target = targets[part].unsqueeze(1)
        log_probs[part] = every.gather(1, target).squeeze(1)
        norm[part] = chosen.gather(1, target).squeeze(1).float() - log_probs[part]
        # 0 for tokens that a mask put at -inf: in the limit p log p is 0 there.
        entropy[part] = -torch.linalg.vecdot(every.exp(), every.clamp_(min=_LEAST))
    return log_probs, entropy, norm


def _gradient(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    rows: Tensor | None,
    norm: Tensor,
    entropy: Tensor,
    of_log_probs: Tensor | None,
    of_entropy: Tensor | None,
) -> Tensor:
    """The gradient of the logits from those of the two statistics, None for one that was not used; as in kernels.py."""
    gradient = torch.empty_like(logits) if rows is None else torch.zeros_like(logits)
    for part in _chunks(len(targets), logits.shape[-1]):
        x = _rows(logits, rows, part).to(torch.float32, copy=True)
        if temperature != 1:
            x /= temperature
        x -= norm[part].unsqueeze(1)
        if of_entropy is None:
            d = x.exp_().mul_(-of_log_probs[part].unsqueeze(1))
        else:
            d = -of_entropy[part].unsqueeze(1) * (x.clamp(min=_LEAST) + entropy[part].unsqueeze(1))
            if of_log_probs is not None:
                d -= of_log_probs[part].unsqueeze(1)
            d *= x.exp_()
        if of_log_probs is not None:
            d.scatter_add_(1, targets[part].unsqueeze(1), of_log_probs[part].unsqueeze(1))
        if temperature != 1:
            d /= temperature
        if rows is None:
            gradient[part] = d
        else:
            gradient.index_copy_(0, rows[part], d.to(logits.dtype))
    return gradient


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, _CHUNK // vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))


def _rows(logits: Tensor, rows: Tensor | None, part: slice) -> Tensor:
    """The logits of a chunk of targets."""
    return logits[part] if rows is None else logits.index_select(0, rows[part])


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
    Returns the losses and the bool mask of the tokens where a clip decides, which have no gradient, both [B, T].
    """
    ratio = (log_probs - old_log_probs).exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip, 1.0 + (clip if clip_high is None else clip_high))
    losses, decides = torch.maximum(free, clipped), clipped > free
    if dual_clip is not None:
        least = -advantages * dual_clip
        bounded = (advantages < 0) & (losses > least)
        losses, decides = torch.where(bounded, least, losses), decides | bounded
    return losses, decides


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
