"""How DeepSpeed's ZeRO 1 sums the gradients of micro batches in fp32."""

from __future__ import annotations

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer


def added_at_once(optimizer: object) -> None:
    """Let a `BF16_Optimizer` add a bf16 gradient to its fp32 sum in one pass over memory, and free it.

    That happens as soon as the backward pass has made the gradient (`immediate_grad_update`). DeepSpeed's own way
    writes and reads an fp32 copy of it first. The sums are the same bits. Other optimizers are left as they are.
    """
    if not isinstance(optimizer, BF16_Optimizer):
        return

    def accumulate(parameter: torch.nn.Parameter, group: int, index: int) -> None:
        total = optimizer.fp32_groups_gradients[group][index]
        total.add_(parameter.grad.view(total.shape))
        parameter.grad = None
        parameter._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True

    optimizer.accumulate_hp_grads_and_remove_lp = accumulate
