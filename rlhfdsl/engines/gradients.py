"""How DeepSpeed's ZeRO 1 sums the gradients of micro batches in fp32."""

from __future__ import annotations

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer


def added_at_once(optimizer: object) -> None:
    """Let a `BF16_Optimizer` add a bf16 gradient to its fp32 sum in one pass over memory.

    DeepSpeed's own way writes and reads an fp32 copy of every gradient first. The sums are the same bits. Other
    optimizers are left as they are.
    """
    if not isinstance(optimizer, BF16_Optimizer):
        return

    @torch.no_grad()
    def update(parameter: torch.nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total = optimizer.fp32_groups_gradients[group][index]
        total.add_(parameter.grad.view(total.shape))
        parameter._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True
        if clear_lp_grads:
            parameter.grad.zero_()

    optimizer._update_hp_grad = update
