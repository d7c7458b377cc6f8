"""Sampling whose noise is a function of the row and the step, not of a generator's state.

`argmax(logits / temperature + Gumbel noise)` is a draw from the softmax (the Gumbel-max trick; Gumbel 1954, Maddison
et al. 2014). The noise of a token comes from hashing (seed of the row, step, token). So a rollout does not depend on
which rank holds a row, on the other rows of the batch or on what was drawn before, and repeating it needs no state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# SplitMix64 (Steele, Lea, Flood 2014) as signed 64-bit integers, which wrap in torch as they must.
_GOLDEN = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function on int64, element by element."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def row_seeds(seed: int, rollout: int, rows: torch.Tensor) -> torch.Tensor:
    """One int64 seed for each global row number in `rows` [B] of rollout number `rollout`."""
    start = mix(torch.tensor(seed, dtype=torch.int64)) + rollout
    return mix(mix(start).to(rows.device) + rows)


def gumbel(seeds: torch.Tensor, step: int | torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise, fp32 [B, vocabulary], for `seeds` [B] at decoding step `step`.

    The exponential variable is -log1p(-u) with u in (0, 1) from 32 bits, so that the upper tail, which decides the
    argmax, keeps its resolution: the largest noise is about 22.9.
    """
    tokens = torch.arange(vocabulary, device=seeds.device, dtype=torch.int64)
    bits = mix(mix(seeds + step).unsqueeze(1) + tokens)
    uniform = (_shift(bits, 32).float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: torch's is arithmetic on signed integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Distribution:
    """How logits become the distribution that answers are drawn from.

    temperature divides them. Then `top_k` keeps the likeliest so many tokens (Fan et al. 2018), and `top_p` the
    likeliest of those whose probabilities first sum to it (Holtzman et al. 2020); None keeps all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    @property
    def cuts(self) -> bool:
        """Whether it leaves tokens out."""
        return self.top_k is not None or self.top_p is not None

    def kept(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [B, V], divided by the temperature already, with -inf for the tokens that are left out.

        Tokens as likely as the last one that is kept are kept too. Nothing waits for the device.
        """
        return logits.masked_fill(logits < self.lowest(logits), -torch.inf) if self.cuts else logits

    def lowest(self, logits: torch.Tensor) -> torch.Tensor:
        """The least of the logits [B, V] that are kept, [B, 1]."""
        lowest = logits.amin(-1, keepdim=True)
        if self.top_k is not None:
            lowest = logits.topk(min(self.top_k, logits.shape[-1]), -1).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -torch.inf)
        if self.top_p is not None:
            ordered = logits.sort(-1, descending=True).values
            shares = ordered.softmax(-1)
            likelier = shares.cumsum(-1) - shares  # 0 for the likeliest, which is always kept
            lowest = ordered.masked_fill(likelier >= self.top_p, torch.inf).amin(-1, keepdim=True)
        return lowest


def draw(
    logits: torch.Tensor, distribution: Distribution, seeds: torch.Tensor, step: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] drawn from logits [B, V] by the noise of (seed, step), and their log-probabilities [B].

    The log-probabilities are of the whole distribution, as the training forward gives them, also where the draw leaves
    tokens out.
    """
    logits = logits.float() / distribution.temperature
    noisy = distribution.kept(logits) + gumbel(seeds, step, logits.shape[1])
    chosen = noisy.argmax(-1, keepdim=True)
    return chosen.squeeze(1), (logits.gather(1, chosen) - logits.logsumexp(-1, keepdim=True)).squeeze(1)
