"""`determinism = strict`: every operation of a run gives the same bits each time, or the run ends and names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def environment(plan: Mapping[str, Any]) -> dict[str, str]:
    """What the ranks need in their environment before CUDA starts: fixed workspaces of cuBLAS, one order of NCCL."""
    if plan["recipe"]["determinism"] != "strict":
        return {}
    return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def enforce(plan: Mapping[str, Any]) -> None:
    """Forbid this process the operations of torch whose bits depend on timing."""
    if plan["recipe"]["determinism"] != "strict":
        return
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # What is read before it is written would differ as well; filling it costs more than it finds here.
    torch.utils.deterministic.fill_uninitialized_memory = False
