"""How DeepSpeed's ZeRO 1 sums the gradients of micro batches in fp32."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer


def in_few_passes(optimizer: object) -> None:
    """Let a `BF16_Optimizer` read and write its gradients less often. Other optimizers are left as they are.

    A bf16 gradient is added to its fp32 sum and freed as soon as the backward pass has made it
    (`immediate_grad_update`); DeepSpeed's own way writes and reads an fp32 copy of it first. The sums are the same
    bits. The norm and the clipping of a step are of the flat buffers that hold the sums, not of each tensor in turn.
    """
    if not isinstance(optimizer, BF16_Optimizer):
        return

    def accumulate(parameter: torch.nn.Parameter, group: int, index: int) -> None:
        total = optimizer.fp32_groups_gradients[group][index]
        total.add_(parameter.grad.view(total.shape))
        parameter.grad = None
        parameter._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True

    def whole(for_clipping: bool = False) -> Any:
        flat = optimizer.fp32_groups_gradients_flat
        return flat if for_clipping else (flat, {})

    optimizer.accumulate_hp_grads_and_remove_lp = accumulate
    optimizer.get_grads_for_norm = whole
