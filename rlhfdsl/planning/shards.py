"""How the layers of a model type are cut for a rollout with tensor-parallel shards: shards.json, read without torch.

Column and row, as in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053): attention and the MLP of a layer each begin
with matrices whose outputs are cut and end with one whose inputs are, so that a layer needs two sums over the ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any


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
