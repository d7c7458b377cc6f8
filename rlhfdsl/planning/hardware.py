"""What a plan is made for: devices, their number and memory, from flags, the recipe's cluster, or the
machine.

The catalog (`gpus.json`) gives memory as `nvidia-smi` reports it (MiB), dense rates (TFLOP/s, without sparsity) and
memory bandwidth (GB/s) from the vendors' data sheets, links each way (GB/s: to the other GPUs of a node, to the host,
to other nodes in an installation usual for that GPU) and a typical price on demand (USD for a GPU and hour). Detection
asks `nvidia-smi` and never imports torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from rlhfdsl.language.suggest import listed
from rlhfdsl.planning import rates
from rlhfdsl.planning.rates import Rates

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Target:
    """The devices of a plan. `gpus` counts those of one node; `memory` is bytes of one device, None on a
    CPU. `profile`: what `rlhf bench` measured, by name; `price` in place of the catalog's. `host`: bytes of the memory
    of each node, for what is offloaded from GPUs; None where unknown, and on a CPU."""

    device: str  # "cpu" | "cuda"
    gpu: str | None
    memory: int | None
    nodes: int
    gpus: int
    origin: str  # "--gpu", "cluster.node" or "detected"
    profile: tuple[str, Mapping[str, Any]] | None = None
    price: float | None = None
    host: int | None = None

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    @property
    def has_bf16(self) -> bool:
        """False only for a catalog GPU that computes in no bf16; unknown devices are taken to have it."""
        entry = catalog().get(self.gpu or "")
        return entry is None or entry["bf16_tflops"] is not None

    def rates(self, dtype: str) -> Rates | None:
        """Achieved rates for a model's type: measured, else from the catalog; None where neither tells.

        The processes of a CPU share what was measured of it.
        """
        found = None
        if self.profile is not None:
            found = rates.of_profile(self.profile[1], self.profile[0], dtype)
        elif self.gpu in catalog():
            found = rates.of_catalog(catalog()[self.gpu], self.gpu, dtype)
        if found is None:
            return None
        if self.device == "cpu":
            found = replace(found, matmul=found.matmul / self.gpus, copy=found.copy / self.gpus)
        return found if self.price is None else replace(found, price=self.price)

    @property
    def devices(self) -> str:
        """The word for its workers: GPU or GPUs, process or processes."""
        one, many = ("process", "processes") if self.device == "cpu" else ("GPU", "GPUs")
        return one if self.world == 1 else many

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device, "gpu": self.gpu, "memory": self.memory, "nodes": self.nodes,
            "gpus": self.gpus, "world": self.world, "host": self.host, "origin": self.origin,
        }  # fmt: skip


@cache
def catalog() -> dict[str, dict[str, Any]]:
    """GPU name -> memory_mib, rates, links, price, names (as the driver reports them)."""
    return dict(json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8")))


def known(name: str) -> bool:
    """Whether `name` is a GPU of the catalog, or `cpu`."""
    return name == "cpu" or name in catalog()


def meant(name: str) -> str:
    """What to write for a name that the catalog does not have."""
    near = [known for known in catalog() if known.startswith(name.lower())]
    return f"did you mean {listed(near)}?" if near else f"one of {', '.join(catalog())}, cpu"


def detect() -> Target:
    """The GPUs of this machine by `nvidia-smi`, with its memory in whole GiB; the CPU without the program or a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return CPU
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return CPU
    found = parse_smi(done.stdout)
    host = host_memory() if found.device == "cuda" else None
    return found if host is None else replace(found, host=(host >> 30 << 30) or None)


CPU = Target("cpu", None, None, 1, 1, "detected")
CGROUP = Path("/sys/fs/cgroup/memory.max")  # of a container: a number of bytes, or `max`


def host_memory() -> int | None:
    """Bytes of this machine's memory, or of what its container may use; None where the system does not say."""
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
    try:
        return min(whole, int(CGROUP.read_text()))
    except (OSError, ValueError):
        return whole


def parse_smi(text: str) -> Target:
    """`name, MiB` lines of nvidia-smi as a Target; the first line names the kind, by the catalog where
    listed."""
    rows = [line.rsplit(",", 1) for line in text.splitlines() if "," in line]
    if not rows:
        return CPU
    name, mib = rows[0][0].strip(), int(rows[0][1])
    listed = next((key for key, entry in catalog().items() if name in entry["names"]), None)
    return Target("cuda", listed or name, mib * MIB, 1, len(rows), "detected")


def resolve(flags: Mapping[str, Any], cluster: Mapping[str, Any] | None, machine: Target) -> Target:
    """The target of a plan: each of gpu, gpus and nodes from the flags, else the cluster, else the machine. The memory
    of a node is the machine's where its GPU is.

    flags, cluster: {"gpu", "gpus", "nodes"}, None where not given; flags also have "price" and "host_memory" (bytes),
    a cluster "address". Raises
    KeyError for a GPU name that the catalog does not list, UserError for a profile that is none. `gpu` may be a
    profile (`PATH.json`), which stands for the devices that were measured.
    """
    price, host = flags.get("price"), flags.get("host_memory")
    given = [f"--{key}" for key in ("gpu", "gpus", "nodes") if flags.get(key) is not None]
    cluster = cluster or {}
    gpu = flags.get("gpu") or cluster.get("gpu")
    origin = given[0] if given else cluster.get("address", "detected")
    gpus = flags.get("gpus") or cluster.get("gpus")
    nodes = flags.get("nodes") or cluster.get("nodes") or 1
    if gpu is None:
        here = machine
        memory = None if here.device == "cpu" else host or here.host
        return Target(here.device, here.gpu, here.memory, nodes, gpus or here.gpus, origin, None, price, memory)
    if gpu == "cpu":
        return Target("cpu", None, None, nodes, gpus or 1, origin, price=price)
    if is_profile(gpu):
        measured, name = rates.read_profile(Path(gpu)), Path(gpu).name
        return Target(
            measured["device"], measured["gpu"], measured["memory"], nodes, gpus or 1, origin, (name, measured), price,
            None if measured["device"] == "cpu" else host,
        )  # fmt: skip
    return Target("cuda", gpu, catalog()[gpu]["memory_mib"] * MIB, nodes, gpus or 1, origin, None, price, host)


def is_profile(name: str) -> bool:
    """Whether a `--gpu` names a file that `rlhf bench` wrote."""
    return name.endswith(".json")
