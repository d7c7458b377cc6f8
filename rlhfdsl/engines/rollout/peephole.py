"""A model's forward with fewer kernels: what follows a product goes into the product's own kernel.

Models are unmodified. While a `Peephole` is open it sees every call of torch. A linear layer is not computed when it is
called but when its output is first used, and by then an activation and the sum with the residual may have become
part of it. Meant for the capture of a decode step, where the time that Python takes does not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class Kernels(Protocol):
    """What computes; `engines/rollout/dense.py` has it for CUDA."""

    def takes_product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool: ...

    def takes_norm(self, x: torch.Tensor, weight: torch.Tensor) -> bool: ...

    def product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None,
        added: torch.Tensor | None, out: torch.Tensor,
    ) -> None: ...  # fmt: skip

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor: ...


class _Waiting:
    """A product that is not computed yet, and what has become part of it.

    outs: the outputs that the model was given so far, of the product, its activation and its sum; the last is the one
    to fill. An earlier one that somebody still holds when the product is computed is filled too.
    """

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        self.x, self.weight, self.bias = x, weight, bias
        self.activation: str | None = None
        self.added: torch.Tensor | None = None
        self.last = x.new_empty(*x.shape[:-1], len(weight))
        self.earlier: list[Callable[[], torch.Tensor | None]] = []
        self.steps: list[Callable[[torch.Tensor], torch.Tensor]] = []
        self.seen = False  # through a view, so that the last output stays the last

    def then(self, step: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The output after one more step, which is the last one now."""
        self.earlier.append(weakref.ref(self.last))
        self.steps.append(step)
        self.last = torch.empty_like(self.last)
        return self.last

    def compute(self, kernels: Kernels) -> None:
        held = [out() for out in self.earlier]
        if all(out is None for out in held):
            kernels.product(self.x, self.weight, self.bias, self.activation, self.added, self.last)
            return
        value = torch.empty_like(self.last) if held[0] is None else held[0]
        kernels.product(self.x, self.weight, self.bias, None, None, value)
        for step, out in zip(self.steps, [*held[1:], self.last], strict=True):
            value = step(value) if out is None else out.copy_(step(value))


class Peephole(TorchFunctionMode):
    """While open, products and layer norms that `kernels` take are computed by them."""

    def __init__(self, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.waiting: _Waiting | None = None

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.flush()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None:
            out = rule(self, *args, **kwargs)
            if out is not None:
                return out
        self.flush()
        return func(*args, **kwargs)

    def flush(self) -> None:
        """Compute what waits."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting.compute(self.kernels)

    # Each rule returns None where it does not apply; the call then goes its usual way.

    def linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        if not self.kernels.takes_product(input, weight, bias):
            return None
        self.flush()
        self.waiting = _Waiting(input, weight, bias)
        return self.waiting.last

    def activation(self, name: str, function: Callable[..., Any], input: torch.Tensor) -> torch.Tensor | None:
        waiting = self.waiting
        if waiting is None or waiting.seen or input is not waiting.last or waiting.steps:
            return None
        waiting.activation = name
        return waiting.then(function)

    def add(self, left: Any, right: Any, **scaled: Any) -> torch.Tensor | None:
        waiting = self.waiting
        if waiting is None or waiting.seen or waiting.added is not None or scaled:
            return None
        other = right if left is waiting.last else left if right is waiting.last else None
        if not isinstance(other, torch.Tensor) or other is waiting.last:
            return None
        if other.shape != waiting.last.shape or other.dtype != waiting.last.dtype:
            return None
        waiting.added = other
        return waiting.then(lambda value: value + other)

    def view(self, function: Callable[..., torch.Tensor], input: Any, *shape: Any, **named: Any) -> torch.Tensor | None:
        if self.waiting is None or input is not self.waiting.last:
            return None
        self.waiting.seen = True
        return function(input, *shape, **named)

    def dropout(
        self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor | None:
        return None if training and p > 0 else input

    def layer_norm(
        self,
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor | None:
        if weight is None or tuple(normalized_shape) != input.shape[-1:] or not self.kernels.takes_norm(input, weight):
            return None
        self.flush()
        return self.kernels.layer_norm(input, weight, bias, eps)


def _relu(mode: Peephole, input: torch.Tensor, inplace: bool = False) -> torch.Tensor | None:
    return None if inplace else mode.activation("relu", torch.relu, input)


def _silu(mode: Peephole, input: torch.Tensor, inplace: bool = False) -> torch.Tensor | None:
    return None if inplace else mode.activation("silu", functional.silu, input)


def _gelu(mode: Peephole, input: torch.Tensor, *, approximate: str = "none") -> torch.Tensor | None:
    name = "gelu_tanh" if approximate == "tanh" else "gelu"
    return mode.activation(name, lambda value: functional.gelu(value, approximate=approximate), input)


_RULES: dict[Any, Callable[..., torch.Tensor | None]] = {
    torch._C._nn.linear: Peephole.linear,  # `functional.linear` may be DeepSpeed's by now
    functional.dropout: Peephole.dropout,
    functional.layer_norm: Peephole.layer_norm,
    functional.relu: _relu,
    torch.relu: _relu,
    functional.silu: _silu,
    functional.gelu: _gelu,
    torch.add: Peephole.add,
    torch.Tensor.add: Peephole.add,
    torch.Tensor.__add__: Peephole.add,
    torch.Tensor.__radd__: Peephole.add,
    torch.Tensor.view: lambda mode, *args, **named: mode.view(torch.Tensor.view, *args, **named),
    torch.Tensor.reshape: lambda mode, *args, **named: mode.view(torch.Tensor.reshape, *args, **named),
}
