"""Offload to NVMe (ZeRO-Infinity, Rajbhandari et al. 2021): what lives on the drive, what of it the host still holds.

DeepSpeed 0.19.8: master weights and moments lie on the drive and come in groups of `sub_group_size` elements through
`buffer_count` pinned buffers (`swap_tensor/optimizer_utils.py`); the fp32 sums of gradients stay in the host's memory
(`zero/stage3.py`, `__param_id_to_grad_partition`). Parameters come through buffers that must hold the largest one's
shard (`swap_tensor/partitioned_param_swapper.py`), and `max_in_cpu` of them stay in the host's memory. Only stage 3 has
it. The closed forms follow that code; no run of this program has held them against a drive yet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhfdsl.planning.memory import BYTES, States

SUB_GROUP = 100_000_000  # elements of the optimizer that are in the host's memory at once
STATES = 4  # a group's tensors, each with a buffer: master weights, gradients, two moments
BUFFERS, BUFFER = 5, 100_000_000  # of parameters, and the elements of one
IN_CPU = 1_000_000_000  # parameters of a device that stay in the host's memory
BANDWIDTH = 3e9  # bytes/s of a node's drive, each way: an assumption


def moved(
    states: States, *, dtype: str, offload: str, learns: int, largest: int, gpus: int, nodes: int
) -> States:
    """The states of an engine at stage 3 whose offload goes to NVMe, from those with offload to the host.

    learns: parameters that train. largest: of one module. Bytes of a node: host memory, and the drive.
    """
    world, width = gpus * nodes, BYTES[dtype]
    host = disk = 0
    if offload in ("optimizer", "both"):
        group = min(SUB_GROUP, learns // world)
        host += 4 * learns // nodes + gpus * STATES * 4 * group
        disk += 16 * learns // nodes
    if offload in ("params", "both"):
        kept = min(IN_CPU, states.parameters // world)
        host += gpus * width * (kept + BUFFERS * buffer(largest, world))
        disk += width * states.parameters // nodes
    return replace(states, host=host, disk=disk)


def buffer(largest: int, world: int) -> int:
    """Elements of a parameter buffer: the shard of the largest parameter fits in."""
    return max(BUFFER, -(-largest // world))


def config(whole: dict[str, Any], path: str, largest: int | None, world: int) -> dict[str, Any]:
    """An engine's configuration with offload to the host, with the same offload to a folder of a drive.

    The optimizer is DeepSpeed's own for the CPU, compiled at the first start: swapped states are of one length, and
    torch's AdamW has a tensor of its steps among them.
    """
    out, zero = dict(whole), dict(whole["zero_optimization"])
    place = {"device": "nvme", "nvme_path": path}
    if "offload_optimizer" in zero:
        parameters = {k: v for k, v in out["optimizer"]["params"].items() if k != "fused"} | {"torch_adam": False}
        out["optimizer"] = {**out["optimizer"], "params": parameters}
        zero["sub_group_size"] = SUB_GROUP
        zero["offload_optimizer"] = {**zero["offload_optimizer"], **place, "buffer_count": STATES}
    if "offload_param" in zero:
        sizes = {"buffer_count": BUFFERS, "buffer_size": buffer(largest or 0, world), "max_in_cpu": IN_CPU}
        zero["offload_param"] = {**zero["offload_param"], **place, **sizes}
    return out | {"zero_optimization": zero}


def step_seconds(learns: int, nodes: int) -> float:
    """Seconds in which one optimizer step reads its states from the drive and writes them back."""
    return 2 * 16 * learns / nodes / BANDWIDTH


def pass_seconds(parameters: int, dtype: str, nodes: int) -> float:
    """Seconds in which one pass reads the parameters that a node's drive holds."""
    return BYTES[dtype] * parameters / nodes / BANDWIDTH
