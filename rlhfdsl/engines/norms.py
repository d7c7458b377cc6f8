"""RMS norms of forward and backward passes on a GPU: torch's one kernel where transformers' modules launch eight.

A decode step has kernels of its own for them (rollout/fusing.py).
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional


def in_one_kernel(module: nn.Module) -> None:
    """Let every norm in `module` that computes x / sqrt(mean(x^2) + eps) times its weight do so by `rms_norm`.

    torch has a kernel for it on CUDA, forwards and backwards, which keeps x alone and rounds once, at the end.
    """
    for norm in module.modules():
        eps = epsilon(norm)
        if eps is not None and is_plain(type(norm)):
            norm.forward = partial(_forward, norm, eps)


def epsilon(norm: nn.Module) -> float | None:
    """The number that an RMS norm of transformers adds to the mean of squares; None for any other module."""
    if not type(norm).__name__.endswith("RMSNorm") or list(norm.children()):
        return None
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if isinstance(eps, float) else None


@cache
def is_plain(kind: type[nn.Module]) -> bool:
    """Whether a class of norms has nothing beside its weight and its epsilon, such as a 1 that the weight is added to.

    Its forward is called with just these, in fp32 on the CPU: a weight that ZeRO 3 has cut cannot be computed with. One
    that may get something beside the input, as a gate, is not plain.
    """
    if len(inspect.signature(kind.forward).parameters) > 2:
        return False
    weight, eps = torch.linspace(-1.5, 2.0, 8), 0.1
    x = torch.linspace(-3.0, 5.0, 16).view(2, 8)
    try:
        found = kind.forward(SimpleNamespace(weight=weight, variance_epsilon=eps, eps=eps), x)
    except AttributeError:
        return False
    return torch.allclose(found, functional.rms_norm(x, (8,), weight, eps), rtol=1e-5)


def _forward(norm: nn.Module, eps: float, hidden_states: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(hidden_states, hidden_states.shape[-1:], norm.weight, eps)
