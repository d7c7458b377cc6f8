"""A model's forward with fewer kernels: what follows a kernel goes into the kernel itself.

Models are unmodified. While a `Peephole` is open it sees every call of torch. Three things are not computed when they
are called but when their output is first used: a linear layer, into which an activation and the sum with the residual
may have gone by then; a sum, which a norm takes along; an activation, which is then multiplied (a gated MLP). Meant for
the capture of a decode step, where the time that Python takes does not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rlhfdsl.engines.rollout.operands import Adapter, Packed


class Kernels(Protocol):
    """What computes; `engines/rollout/kernels/dense.py` has it for CUDA."""

    def takes_product(self, x: torch.Tensor, weight: torch.Tensor | Packed, bias: torch.Tensor | None) -> bool: ...

    def takes_adapter(self, x: torch.Tensor, adapter: Adapter) -> bool: ...

    def takes_norm(self, x: torch.Tensor, weight: torch.Tensor) -> bool: ...

    def takes_rows(self, x: torch.Tensor) -> bool: ...

    def product(
        self, x: torch.Tensor, weight: torch.Tensor | Packed, bias: torch.Tensor | None, adapter: Adapter | None,
        activation: str | None, added: torch.Tensor | None, out: torch.Tensor,
    ) -> None: ...  # fmt: skip

    def adapted(self, base: torch.Tensor, x: torch.Tensor, adapter: Adapter) -> torch.Tensor: ...

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float,
        added: torch.Tensor | None = None, total: torch.Tensor | None = None,
    ) -> torch.Tensor: ...  # fmt: skip

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float,
        added: torch.Tensor | None = None, total: torch.Tensor | None = None,
    ) -> torch.Tensor: ...  # fmt: skip

    def activated(self, x: torch.Tensor, activation: str, factor: torch.Tensor | None, out: torch.Tensor) -> None: ...


class _Waiting:
    """What is not computed yet.

    last: the output that the model was given, empty so far. seen: whether through a view, so that it stays the last.
    """

    def __init__(self, last: torch.Tensor):
        self.last = last
        self.seen = False

    def compute(self, kernels: Kernels) -> None:
        raise NotImplementedError


class _Product(_Waiting):
    """A linear layer with its adapter, and what has become part of it.

    Besides the last one the model was given an output of each step before: of the product, and of its activation. One
    that somebody still holds when the product is computed is filled too.
    """

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor | Packed, bias: torch.Tensor | None, adapter: Adapter | None = None
    ):
        super().__init__(x.new_empty(*x.shape[:-1], len(weight)))
        self.x, self.layer = x, (weight, bias, adapter)
        self.activation: str | None = None
        self.added: torch.Tensor | None = None
        self.earlier: list[Callable[[], torch.Tensor | None]] = []
        self.steps: list[Callable[[torch.Tensor], torch.Tensor]] = []

    def then(self, step: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The output after one more step, which is the last one now."""
        self.earlier.append(weakref.ref(self.last))
        self.steps.append(step)
        self.last = torch.empty_like(self.last)
        return self.last

    def compute(self, kernels: Kernels) -> None:
        held = [out() for out in self.earlier]
        if all(out is None for out in held):
            kernels.product(self.x, *self.layer, self.activation, self.added, self.last)
            return
        value = torch.empty_like(self.last) if held[0] is None else held[0]
        kernels.product(self.x, *self.layer, None, None, value)
        for step, out in zip(self.steps, [*held[1:], self.last], strict=True):
            value = step(value) if out is None else out.copy_(step(value))


class _Sum(_Waiting):
    """The sum of two tensors of one shape and type, with the residual most likely."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor):
        super().__init__(torch.empty_like(left))
        self.left, self.right = left, right

    def compute(self, kernels: Kernels) -> None:
        torch.add(self.left, self.right, out=self.last)


class _Activation(_Waiting):
    """An activation of what no product waits for, and what it is multiplied with.

    Its own output is filled too if somebody holds it when the product with `factor` is computed.
    """

    def __init__(self, x: torch.Tensor, name: str):
        super().__init__(torch.empty(x.shape, dtype=x.dtype, device=x.device))
        self.x, self.name = x, name
        self.factor: torch.Tensor | None = None
        self.alone: Callable[[], torch.Tensor | None] = lambda: None

    def times(self, factor: torch.Tensor) -> torch.Tensor:
        """The output of the product, which is the last one now."""
        self.factor, self.alone = factor, weakref.ref(self.last)
        self.last = torch.empty_like(self.last)
        return self.last

    def compute(self, kernels: Kernels) -> None:
        alone = self.alone()
        if alone is not None:
            kernels.activated(self.x, self.name, None, alone)
        kernels.activated(self.x, self.name, self.factor, self.last)


class Peephole(TorchFunctionMode):
    """While open, what `kernels` take is computed by them."""

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
        if func not in _READ_NOTHING:
            self.flush()
        return func(*args, **kwargs)

    def flush(self) -> None:
        """Compute what waits."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting.compute(self.kernels)

    def wait(self, waiting: _Waiting) -> torch.Tensor:
        """Let this wait, in the place of what does."""
        self.flush()
        self.waiting = waiting
        return waiting.last

    # Each rule returns None where it does not apply; the call then goes its usual way.

    def linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        if not self.kernels.takes_product(input, weight, bias):
            return None
        return self.wait(_Product(input, weight, bias))

    def activation(self, name: str, function: Callable[..., Any], input: torch.Tensor) -> torch.Tensor | None:
        waiting = self.waiting
        if isinstance(waiting, _Product) and input is waiting.last and not waiting.seen and not waiting.steps:
            waiting.activation = name
            return waiting.then(function)
        return self.wait(_Activation(input, name)) if self.kernels.takes_rows(input) else None

    def add(self, left: Any, right: Any, **scaled: Any) -> torch.Tensor | None:
        if scaled or not _alike(left, right):
            return None
        waiting = self.waiting
        if isinstance(waiting, _Product) and not waiting.seen and waiting.added is None and left is not right:
            other = right if left is waiting.last else left if right is waiting.last else None
            if other is not None:
                waiting.added = other
                return waiting.then(lambda value: value + other)
        flat = left.is_contiguous() and right.is_contiguous()
        return self.wait(_Sum(left, right)) if flat and self.kernels.takes_rows(left) else None

    def multiply(self, left: Any, right: Any) -> torch.Tensor | None:
        waiting = self.waiting
        if not isinstance(waiting, _Activation) or waiting.seen or waiting.factor is not None:
            return None
        other = right if left is waiting.last else left if right is waiting.last else None
        if left is right or not _alike(left, right) or not self.kernels.takes_rows(other):
            return None
        return waiting.times(other)

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
        x, along = self._with_sum(input)
        return self.kernels.layer_norm(x, weight, bias, eps, **along)

    def rms_norm(self, input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """A norm whose module has this in place of its forward (fusing.py)."""
        with torch._C.DisableTorchFunction():
            x, along = self._with_sum(input)
            return self.kernels.rms_norm(x, weight, eps, **along)

    def layer(
        self, input: torch.Tensor, weight: torch.Tensor | Packed, bias: torch.Tensor | None, adapter: Adapter | None
    ) -> torch.Tensor | None:
        """The forward of a layer that is more than `linear`, in a module's forward (fusing.py); None if not taken."""
        with torch._C.DisableTorchFunction():
            if not self.kernels.takes_product(input, weight, bias):
                self.flush()
                return None
            return self.wait(_Product(input, weight, bias, adapter))

    def adapted(self, base: torch.Tensor, input: torch.Tensor, adapter: Adapter) -> torch.Tensor:
        """What a layer makes of `input` with its adapter, where `base` is what it makes without."""
        with torch._C.DisableTorchFunction():
            self.flush()
            return self.kernels.adapted(base, input, adapter)

    def _with_sum(self, input: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What a norm of `input` reads: that, computed, or the parts of the sum that it is and where that goes."""
        waiting = self.waiting
        if not isinstance(waiting, _Sum) or not _same_memory(input, waiting.last):
            self.flush()
            return input, {}
        self.waiting = None
        left, right, total = (x.view(input.shape) for x in (waiting.left, waiting.right, waiting.last))
        return left, {"added": right, "total": total}


def _same_memory(view: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether a view of a contiguous tensor has all its rows."""
    same = view.data_ptr() == whole.data_ptr() and view.numel() == whole.numel()
    return same and view.shape[-1] == whole.shape[-1] and view.is_contiguous()


def _alike(left: Any, right: Any) -> bool:
    """Whether both are tensors of one shape and type."""
    tensors = isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    return tensors and left.shape == right.shape and left.dtype == right.dtype


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
    torch.mul: Peephole.multiply,
    torch.Tensor.mul: Peephole.multiply,
    torch.Tensor.__mul__: Peephole.multiply,
    torch.Tensor.__rmul__: Peephole.multiply,
    torch.Tensor.view: lambda mode, *args, **named: mode.view(torch.Tensor.view, *args, **named),
    torch.Tensor.reshape: lambda mode, *args, **named: mode.view(torch.Tensor.reshape, *args, **named),
}
_READ_NOTHING = {
    torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__, torch.Tensor.ndim.__get__,
    torch.Tensor.is_cuda.__get__, torch.Tensor.requires_grad.__get__, torch.Tensor.size, torch.Tensor.dim,
}  # fmt: skip
