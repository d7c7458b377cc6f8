"""Fewer kernels for a decode step, over the same weights and for the time of a capture only.

A decode step is a few hundred small kernels. Projections of one input whose weights lie side by side in memory (as
ZeRO's flat buffers lay them: queries, keys and values; gate and up) are one product over a view of all of them. A
product of few rows takes its activation and the sum with the residual along; of more rows the norm takes the sum, and
the product of a gated MLP its activation. Norms are one kernel each, of our own or compiled by torch, as rotary
embeddings are.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rlhfdsl.engines import norms
from rlhfdsl.engines.rollout.operands import Adapter, Packed, adapter_of, packed_of
from rlhfdsl.engines.rollout.peephole import Peephole
from rlhfdsl.models.lora import LoraLayer

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ROTARY = "apply_rotary_pos_emb"  # the name that every rotary family of transformers gives it


class Product:
    """The product of one input with several linear layers, computed when the first of them is called.

    layers: in the order of their memory. Each call with the same input object takes its part.
    """

    def __init__(self, layers: list[nn.Linear], weight: torch.Tensor, bias: torch.Tensor | None):
        self.layers, self.weight, self.bias = layers, weight, bias
        self.input: torch.Tensor | None = None
        self.parts: dict[int, torch.Tensor] = {}

    def part(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self.input is not x:
            whole = functional.linear(x, self.weight, self.bias)
            split = whole.split([layer.out_features for layer in self.layers], -1)
            self.input = x
            self.parts = {id(layer): part for layer, part in zip(self.layers, split, strict=True)}
        return self.parts[id(layer)]


@contextlib.contextmanager
def fused(model: nn.Module, compiled: bool) -> Iterator[None]:
    """While open, the model's forward launches fewer kernels. compiled: also those that need a compiler."""
    restore: list[Callable[[], None]] = []

    def patch(holder: object, name: str, value: object) -> None:
        own, before = name in vars(holder), getattr(holder, name)
        setattr(holder, name, value)
        restore.append(partial(setattr, holder, name, before) if own else partial(delattr, holder, name))

    try:
        # DeepSpeed leaves a `linear` of its own in torch after an engine at ZeRO 3: more kernels, and gradients
        patch(functional, "linear", torch._C._nn.linear)
        for product in products(model):
            for layer in product.layers:
                patch(layer, "forward", partial(product.part, layer))
        if not compiled:
            yield
            return
        from rlhfdsl.engines.rollout.kernels import dense

        mode = Peephole(dense)
        for module, forward in forwards(model, mode):
            patch(module, "forward", forward)
        for place in {sys.modules[type(module).__module__] for module in model.modules()}:
            if hasattr(place, ROTARY):
                patch(place, ROTARY, partial(_call, mode, _compiled(getattr(place, ROTARY))))
        with mode:
            yield
    finally:
        for undo in reversed(restore):
            undo()


def forwards(model: nn.Module, mode: Peephole) -> Iterator[tuple[nn.Module, Callable[..., torch.Tensor]]]:
    """The modules of which another forward is better, and that: it computes with `mode` and gives the same."""
    for module in model.modules():
        forward = _layer(module, mode)
        if type(module).__name__.endswith("Norm") and not list(module.children()):
            forward = _norm(module, mode)
        if forward is not None:
            yield module, forward


def _layer(module: nn.Module, mode: Peephole) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Another forward of a linear layer that has an adapter or lies in 4 bits; None for any other module."""
    if isinstance(module, LoraLayer):
        adapter = adapter_of(module)
        if adapter is None or not mode.kernels.takes_adapter(adapter.up, adapter):
            return None
        base = module.get_base_layer()
        weight = packed_of(base) or (base.weight if type(base) is nn.Linear else None)
        return partial(_forward, mode, weight, base.bias, adapter, base)
    weight = packed_of(module)
    if weight is None:
        return None
    return partial(_forward, mode, weight, module.bias, None, partial(type(module).forward, module))


def _forward(
    mode: Peephole, weight: torch.Tensor | Packed | None, bias: torch.Tensor | None, adapter: Adapter | None,
    otherwise: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """otherwise: what computes the layer without its adapter where the kernels do not take its weight."""
    out = None if weight is None else mode.layer(x, weight, bias, adapter)
    if out is not None:
        return out
    out = otherwise(x)
    return out if adapter is None else mode.adapted(out, x, adapter)


def _norm(module: nn.Module, mode: Peephole) -> Callable[..., torch.Tensor] | None:
    """Another forward of a norm: a kernel where it gives the same, else its own compiled. None: the mode has it."""
    weight = getattr(module, "weight", None)
    if weight is not None and mode.kernels.takes_norm(weight, weight):
        if type(module) is nn.LayerNorm:
            return None
        eps = norms.epsilon(module)
        if eps is not None and norms.is_plain(type(module)):
            return partial(mode.rms_norm, weight=weight, eps=eps)
    return partial(_call, mode, partial(_compiled(type(module).forward), module))


def _call(mode: Peephole, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call what is no business of the mode, with arguments that are computed."""
    mode.flush()
    with torch._C.DisableTorchFunction():
        return function(*args, **kwargs)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def products(model: nn.Module) -> list[Product]:
    """The groups of sibling projections whose weights, and biases, are adjacent."""
    found = []
    for module in model.modules():
        for names in SIBLINGS:
            layers = [getattr(module, name, None) for name in names]
            if all(type(layer) is nn.Linear for layer in layers):
                found.append(_product(layers))
    return [product for product in found if product is not None]


def _product(layers: list[nn.Linear]) -> Product | None:
    layers = sorted(layers, key=lambda layer: layer.weight.data_ptr())
    weight = _side_by_side([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    if weight is None:
        return None
    if all(bias is None for bias in biases):
        return Product(layers, weight, None)
    if any(bias is None for bias in biases):
        return None
    bias = _side_by_side(biases)
    return None if bias is None else Product(layers, weight, bias)


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """One view of tensors that follow one another in one storage, joined in their first dimension; None if not so."""
    first = parts[0].data
    end = first.data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.data_ptr() != end or not part.is_contiguous() or part.shape[1:] != first.shape[1:]:
            return None
        end += part.numel() * part.element_size()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
