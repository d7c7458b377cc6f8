"""How the layers of a model type are cut for a rollout with tensor-parallel shards: shards.json, read without torch.

Column and row, as in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053): attention and the MLP of a layer each begin
with matrices whose outputs are cut and end with one whose inputs are, so that a layer needs two sums over the ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

from rlhfdsl.planning.catalog import Shape
from rlhfdsl.planning.families import GATED

SIZES = (1, 2, 4, 8)  # shards that `tensor = auto` considers


@dataclass(frozen=True, slots=True)
class Rules:
    """The cuts of one model type. column, row: layers, by the end of their path from a dot on.

    pieces: shares of the outputs of a column layer that holds several projections: numbers, or `heads` and `kv_heads`.
    divide: attributes that count heads, by their path in a decoder layer.
    """

    column: tuple[str, ...]
    row: tuple[str, ...]
    pieces: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    divide: tuple[str, ...] = ()


@cache
def _table() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(files(__package__).joinpath("shards.json").read_text(encoding="utf-8"))
    return data


def types() -> tuple[str, ...]:
    """The model types that have rules."""
    return tuple(_table()["types"])


def rules(model_type: str) -> Rules | None:
    """The rules of a type, by transformers' name of the architecture; None for a type that is not cut."""
    found = _table()["types"].get(model_type)
    if found is None:
        return None
    if isinstance(found, str):
        return rules(found)
    return Rules(
        tuple(found["column"]), tuple(found["row"]),
        {name: tuple(shares) for name, shares in found.get("pieces", {}).items()}, tuple(found.get("divide", ())),
    )  # fmt: skip


def why_not(model_type: str) -> str:
    """Why a type has no rules."""
    return str(_table()["reasons"].get(model_type, _table()["other"]))


def misfit(s: Shape, size: int, gpus: int) -> str | None:
    """Why layers of a shape are not cut into `size` shards on nodes of `gpus` devices; None where they are."""
    if size == 1:
        return None
    if rules(s.type) is None:
        return f"{s.type}: {why_not(s.type)}"
    parts = {
        f"the {gpus} GPUs of a node" if gpus > 1 else "the one GPU of a node": gpus,
        f"the {s.heads} heads of a layer": s.heads,
        f"the {s.kv_heads} heads of keys and values": s.kv_heads,
        f"the MLP's width of {s.intermediate}": s.intermediate,
    }
    return next((f"{size} does not divide {what}" for what, count in parts.items() if count % size), None)


def part(s: Shape, size: int) -> Shape:
    """The shape of one shard's layers: the residual width whole, heads and the MLP's width divided."""
    return replace(
        s, heads=s.heads // size, kv_heads=s.kv_heads // size, intermediate=s.intermediate // size
    )


def held(s: Shape, parameters: int, size: int) -> int:
    """Of `parameters` those that a rank holds: its share of the matrices of all layers, and the rest whole.

    Vectors and adapters, of which a rank may hold a part, are counted whole.
    """
    matrices = 2 * s.hidden * (s.q_width + s.kv_width) + (3 if s.type in GATED else 2) * s.hidden * s.intermediate
    return parameters - s.layers * (matrices - matrices // size)
