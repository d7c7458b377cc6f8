"""The ranks of a stage: one process for each device, joined by DeepSpeed's communication."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from rlhfdsl.engines.ports import alone


def join(
    device_kind: str, timeout: float = 1800.0, building: Callable[[], None] | None = None
) -> torch.device:
    """Join the ranks that the environment announces; return this rank's device.

    device_kind: "cpu" (gloo) or "cuda" (NCCL). timeout: seconds that a collective call waits for the other ranks.
    building: called where an operator has to be built first, which takes a minute and more.
    Where it announces none this process is the only rank.
    """
    if "RANK" not in os.environ:
        os.environ.update(alone())
    device = torch.device("cpu")
    if device_kind == "cpu":
        build_operator(building)
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # From torch 2.11 on Hopper attends by cuDNN, which plans anew for each shape: a tenth of a second and more at
        # every update of rows of other lengths. Flash attention takes any shape as it comes.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device_kind == "cuda" else "gloo", verbose=False,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
        if device_kind == "cpu":
            _unname_buffer()
    return device


def _unname_buffer() -> None:
    """Take the name off the 66 MiB of shared memory in which DeepSpeed's operator reduces.

    The ranks that have joined keep it mapped; it goes with the last of them, however they end. DeepSpeed never takes
    the name away, so each run would leave as much of the machine's memory behind.
    """
    comm.barrier()  # a rank that is through has mapped the buffers of all
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{comm.get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def build_operator(building: Callable[[], None] | None = None) -> None:
    """Build DeepSpeed's shared-memory operator for the CPU, a minute once for each environment, before the ranks meet.

    torch marks a build by a file named `lock` and waits for as long as it exists, so a build that was killed makes
    every later start wait without end. Whoever holds the lock here, which the system drops when its holder dies,
    knows that no other rank is building, and takes a left-over mark away.
    building: called before, where nothing is built yet.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        return
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own_builds()))
    own_ninja_first()
    folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    if building is not None and not (folder / f"{builder.name}.so").exists():
        building()
    with (folder.parent / f"{builder.name}.flock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def own_builds() -> Path:
    """The folder of what this environment builds.

    torch has one for each user: a second environment would find the first one's paths there and build again, and so
    would the first after it.
    """
    environment = f"{sys.prefix} {torch.__version__} {deepspeed.__version__}"
    name = f"rlhfdsl-{hashlib.sha256(environment.encode()).hexdigest()[:12]}"
    return Path(cpp_extension.get_default_build_root(), name)


def own_ninja_first() -> None:
    """Put the environment's ninja, which DeepSpeed requires, before any other on PATH, also where it is not activated.

    Ninja's releases hash a command differently, and each holds what another one built to be out of date: an environment
    that is used now activated and now by its path would build again at each change, where the system has one as well.
    """
    scripts, path = sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)
    if Path(scripts, "ninja").is_file() and path.split(os.pathsep)[0] != scripts:
        os.environ["PATH"] = f"{scripts}{os.pathsep}{path}"


def rank() -> int:
    return comm.get_rank()


def world() -> int:
    return comm.get_world_size()


def barrier() -> None:
    comm.barrier()


@cache
def neighbours(size: int) -> torch.distributed.ProcessGroup:
    """The group of `size` consecutive ranks that this rank is in.

    The first call for a size makes the groups of all ranks, so every rank must make it at the same time.
    """
    own, _ = torch.distributed.new_subgroups(size)
    return own


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise sum of `tensor` over all ranks, in place."""
    if world() > 1:
        comm.all_reduce(tensor)
    return tensor


def all_max(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise largest of `tensor` over all ranks, on the device where it came from."""
    if world() == 1:
        return tensor
    shared = tensor.to(get_accelerator().current_device_name())
    comm.all_reduce(shared, op=comm.ReduceOp.MAX)
    return shared.to(tensor.device)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of the ranks, on every rank. For small plain values."""
    if world() == 1:
        return [value]
    everyone: list[Any] = [None] * world()
    torch.distributed.all_gather_object(everyone, value)
    return everyone


def from_first(value: Any) -> Any:
    """The `value` of rank 0 on every rank. For small plain values."""
    if world() == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held)
    return held[0]


def my_rows(count: int) -> tuple[list[int], int]:
    """The rows of this rank out of `count`, dealt like cards: rank r takes r, r + world, …

    Returns the row numbers and how many of them are its own. Every rank gets equally many (the last row stands in
    where the deal does not come out even), since under ZeRO 3 a rank that runs fewer forwards hangs the others.
    """
    size, me = world(), rank()
    own = list(range(me, count, size))
    dealt = -(-count // size)
    return own + [count - 1] * (dealt - len(own)), len(own)


def spread(values: torch.Tensor, rows: list[int], count: int) -> torch.Tensor:
    """Put each rank's `values` [len(rows), …] at its `rows` and share the whole [count, …] with every rank."""
    whole = torch.zeros(count, *values.shape[1:], dtype=values.dtype, device=values.device)
    whole[rows] = values
    return all_sum(whole)
