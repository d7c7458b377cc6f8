"""Frozen weights that lie in the host's memory while their engine is not in use."""

from __future__ import annotations

import torch
from torch import nn


class Resting:
    """Moves the parameters of a module that does not train to the host and back.

    They never change, so the copy on the host is made once, page-locked where the device is a GPU, and only coming
    back takes time. The module is whole on its device when this is made.
    """

    def __init__(self, module: nn.Module):
        self.parameters = list(module.parameters())
        self.away = False
        self.host = [self._copy(parameter.data) for parameter in self.parameters]

    @staticmethod
    def _copy(tensor: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return out.copy_(tensor)

    def rest(self) -> None:
        """Give the device's memory back to the allocator."""
        for parameter in self.parameters:
            parameter.data = parameter.data.new_empty(0)
        self.away = True

    def wake(self) -> None:
        """Be on the device again, as whatever is queued there next will find."""
        if not self.away:
            return
        for parameter, copy in zip(self.parameters, self.host, strict=True):
            parameter.data = copy.to(parameter.device, non_blocking=True, copy=True)
        self.away = False
