"""The numbers of a model's shape, and parameter counts from them that are exact to the unit.

`models.json` holds the configuration numbers of models that recipes often name, so that a plan has them
without a network. A model from scratch and a model whose facts are locked bring their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlhfdsl.planning.families import FAMILIES


@dataclass(frozen=True, slots=True)
class Shape:
    """The configuration numbers that decide a decoder's size.

    `head_dim` is the width of a head, in some families not hidden / heads. `embed` is the width of the token
    embedding where it differs from `hidden` (OPT-350M projects between the two); `final_norm` is false for the
    one family member without a norm after its last layer (OPT-350M again).
    """

    type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    context: int
    tied: bool
    head_dim: int
    embed: int
    final_norm: bool

    @property
    def q_width(self) -> int:
        """Elements of one token's queries in one layer."""
        return self.head_dim * self.heads

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys (or values) in one layer."""
        return self.head_dim * self.kv_heads


def shape(numbers: Mapping[str, Any]) -> Shape | None:
    """A Shape from a from-scratch arch, MODELFACTS or a catalog entry; None when a number is missing."""
    names = ("type", "layers", "hidden", "heads", "kv_heads", "intermediate", "vocab", "context", "tied")
    if any(numbers.get(name) is None for name in names):
        return None
    return Shape(
        **{name: numbers[name] for name in names},
        head_dim=numbers.get("head_dim") or numbers["hidden"] // numbers["heads"],
        embed=numbers.get("embed") or numbers["hidden"],
        final_norm=numbers.get("final_norm", True),
    )


@cache
def _models() -> dict[str, dict[str, Any] | str]:
    text = Path(__file__).with_name("models.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def lookup(hub: str) -> dict[str, Any] | None:
    """The catalog's configuration numbers of a hub id, or None. An entry may name another of the same shape."""
    found = _models().get(hub)
    return lookup(found) if isinstance(found, str) else found


def names() -> tuple[str, ...]:
    """Every hub id of the catalog."""
    return tuple(_models())


def parameters(s: Shape, head: str = "none") -> int | None:
    """Parameters of the causal model (`head = none`) or of its backbone with a scalar head.

    Exact for the types of `FAMILIES` as transformers builds them (a test compares), None for others. A scalar
    head is one row over the backbone's output and takes the place of an untied output matrix.
    """
    family = FAMILIES.get(s.type)
    if family is None:
        return None
    h, i, q, kv = s.hidden, s.intermediate, s.q_width, s.kv_width
    norm = 2 * h if family.norm_bias else h
    layer = 2 * h * (q + kv) + (3 if family.gated else 2) * h * i + family.norms * norm
    if family.qkv_bias:
        layer += q + 2 * kv
    if family.biases:
        layer += i + 2 * h
    if family.head_norms:
        layer += 2 * s.head_dim
    total = s.vocab * s.embed + s.layers * layer + (norm if s.final_norm else 0)
    if family.learned is not None:
        total += (s.context + family.learned) * h
    if family.embed_norm:
        total += norm
    if s.embed != h:
        total += 2 * s.embed * h
    if head == "scalar":
        return total + s.embed
    return total + (0 if s.tied else s.vocab * s.embed)


def largest_layer(s: Shape) -> int:
    """Parameters of the largest single module, which ZeRO 3 gathers whole: an embedding or one MLP matrix."""
    family = FAMILIES.get(s.type)
    mlp = s.hidden * s.intermediate * (2 if s.type == "phi3" else 1)  # Phi 3 has gate and up in one
    if family is not None and family.biases:
        mlp += s.intermediate
    return max(s.vocab * s.embed, mlp)
