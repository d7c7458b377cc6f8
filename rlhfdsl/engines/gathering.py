"""Weights under ZeRO 3, gathered by decoder layers and not by modules, and the linear layers over them.

DeepSpeed hooks each module that has parameters: its weights are gathered before it runs and let go after, forwards and
backwards, and the host takes longer for that than the device takes for the products of all but the largest layers. A
layer's weights are needed together anyway, so here hooks of the layer gather them in one call; DeepSpeed calls such a
module a leaf.

Gradients keep the hook of each parameter. For a leaf that it knows when it makes them, DeepSpeed has one hook for all
of the module's gradients, which comes too early, and fails, where the module's input needs no gradient: in the first
layer behind frozen embeddings.

DeepSpeed also puts a linear layer of its own in place of torch's, in the whole process, since torch's keeps the
gathered weight for the backward pass. Its own adds the bias in a second kernel, rounded once more, and binds its
arguments by their signature in each call. `linear` below is torch's with the parameter kept and not what it holds.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

TORCH = torch._C._nn.linear  # what torch.nn.functional.linear is where nobody changed it


def by_layer(module: nn.Module, optimizer: Any) -> None:
    """Gather the layers of `module` as wholes. optimizer: DeepSpeed's of stage 3, or what it has in place of one."""
    names = {name for inner in module.modules() for name in getattr(inner, "_no_split_modules", None) or ()}
    layers = [inner for inner in module.modules() if type(inner).__name__ in names]
    offload = getattr(optimizer, "parameter_offload", optimizer)
    offload._remove_module_hooks()
    offload.forward_hooks.clear()
    offload.backward_hooks.clear()
    for layer in layers:
        set_z3_leaf_module(layer, True)
    offload.setup_zero_stage3_hooks()
    if nn.functional.linear is zero3_linear_wrap:
        nn.functional.linear = linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, whose backward pass reads the weight as it is gathered then: [..., K] -> [..., N]
    by [N, K] and [N]."""
    if torch.is_autocast_enabled(x.device.type):
        return zero3_linear_wrap(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else TORCH(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return TORCH(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        # a weight with a second place, as that of tied embeddings, may have been let go there
        gone = of_x and getattr(weight, "ds_status", None) is ZeroParamStatus.NOT_AVAILABLE
        if gone:
            weight.all_gather()
        found = [gradient.matmul(weight) if of_x else None, None, None]
        if gone:
            weight.partition()
        if of_weight or of_bias:
            rows = gradient.reshape(-1, gradient.shape[-1])
            found[1] = rows.t().matmul(x.reshape(-1, x.shape[-1])) if of_weight else None
            found[2] = rows.sum(0) if of_bias else None
        return tuple(found)
