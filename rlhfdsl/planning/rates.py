"""How fast a device is: achieved rates, from the catalog's data sheets or from a profile that `rlhf bench` measured.

A data sheet's figure is never reached, so the catalog's are multiplied by the shares below. MATMUL and COPY were
measured on one H100 (780 of 989 TFLOP/s, 2.99 of 3.35 TB/s); they are taken for every GPU of the catalog. TRAIN is the
share of the matmul rate that the products of a stage's passes reach, with the gaps between kernels and micro batches:
it was set from rows of `rlhf bench truth` on one H100 (docs/measurements.md says which). The rest are assumptions. A
plan prints the rates it used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import catalog, traffic

MATMUL, COPY, TRAIN = 0.79, 0.89, 0.72
LINK, HOST = 0.75, 0.75
LAYER_DECODE = 0.65e-3  # seconds: a layer's kernels launched one by one in `generate` (an H100: 16.8 ms for 24)
LAYER_FORWARD = 0.7e-3  # seconds: the same in a forward of a whole sequence that trains (OPT-125M on an H100's hosts)
# Forward passes of launches that a backward pass takes: 2.6 to 3 by the CPU time of small layers of Llama and OPT.
BACKWARD_LAUNCHES = 3
HOST_MEMORY = 100e9  # bytes/s of a node's memory, where an offloaded optimizer works
KIND = "rlhfdsl hardware profile"


@dataclass(frozen=True, slots=True)
class Rates:
    """Achieved rates of one device, in FLOP/s, bytes/s and seconds.

    train: the share of `matmul` that the matrix products of forward and backward passes reach. link: to the other
    devices of its node, and network: to those of other nodes, each way. host: to the node's memory. decode, forward:
    seconds that one layer takes at least. price: USD for a device and hour, None when unknown.
    """

    matmul: float
    train: float
    copy: float
    link: float
    network: float
    host: float
    decode: float
    forward: float
    price: float | None
    origin: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def of_catalog(entry: Mapping[str, Any], name: str, dtype: str) -> Rates | None:
    """The rates of a GPU of gpus.json for a model's type; None when it does not compute in it."""
    peak = entry[f"{dtype}_tflops"]
    if peak is None:
        return None
    return Rates(
        matmul=peak * 1e12 * MATMUL, train=TRAIN, copy=entry["bandwidth_gb"] * 1e9 * COPY,
        link=entry["link_gb"] * 1e9 * LINK, network=entry["network_gb"] * 1e9 * LINK,
        host=entry["host_gb"] * 1e9 * HOST, decode=LAYER_DECODE, forward=LAYER_FORWARD, price=entry["price"],
        origin=f"data sheet of {name}",
    )  # fmt: skip


def read_profile(path: Path) -> dict[str, Any]:
    """A profile of `rlhf bench`. Raises UserError when the file is none."""
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unusable(path, f"cannot be read: {error}") from error
    if not isinstance(profile, dict) or profile.get("kind") != KIND or profile.get("version") != 1:
        raise _unusable(path, "is not a hardware profile that this program can read")
    return profile


def _unusable(path: Path, why: str) -> UserError:
    return UserError("E0720", f"`{path.name}` {why}", place=str(path), help=f"rlhf bench -o {path.name}")


def of_profile(profile: Mapping[str, Any], name: str, dtype: str) -> Rates | None:
    """The rates of a measured machine for a model's type; None when the type was not measured."""
    measured = profile["types"].get(dtype)
    if measured is None:
        return None
    link = profile["link_gb"] or profile["copy_gb"]
    return Rates(
        matmul=measured["matmul_tflops"] * 1e12, train=TRAIN * _products(profile, dtype), copy=profile["copy_gb"] * 1e9,
        link=link * 1e9, network=link * 1e9, host=profile["host_gb"] * 1e9,
        decode=profile["layer_decode_ms"] / 1e3, forward=profile["layer_forward_ms"] / 1e3, price=None,
        origin=f"measured, {name}",
    )  # fmt: skip


def trained(device: str) -> dict[str, Any]:
    """The numbers of the Llama whose training step `rlhf bench` times."""
    hidden = 2048 if device == "cuda" else 256
    return {
        "type": "llama", "layers": 4, "hidden": hidden, "heads": hidden // 64, "kv_heads": hidden // 64,
        "intermediate": 4 * hidden, "vocab": 1024, "context": 1024, "tied": False,
    }  # fmt: skip


def _products(profile: Mapping[str, Any], dtype: str) -> float:
    """The share of the matmul rate that the products of the bench's training step reached, what it moves apart."""
    measured, shape = profile["types"][dtype], catalog.shape(trained(profile["device"]))
    assert shape is not None
    flops = 6 * (catalog.parameters(shape) or 0)  # of a token, as the bench counts
    whole = flops / (measured["train_tflops"] * 1e12)
    moved = shape.layers * (1 + traffic.BACKWARD) * traffic.layer(shape, 0, dtype, False, profile["device"])
    least = flops / (measured["matmul_tflops"] * 1e12)
    return float(min(1.0, least / max(whole - moved / (profile["copy_gb"] * 1e9), least)))
