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

GATED = frozenset({"llama", "qwen2", "mistral"})  # a gated MLP: gate, up and down projections


@dataclass(frozen=True, slots=True)
class Shape:
    """The configuration numbers that decide a decoder's size.

    `embed` is the width of the token embedding where it differs from `hidden` (OPT-350M projects between the
    two); `final_norm` is false for the one family member without a norm after its last layer (OPT-350M
    again).
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
    embed: int
    final_norm: bool

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys (or values) in one layer."""
        return self.hidden // self.heads * self.kv_heads


SUPPORTED = frozenset({"llama", "qwen2", "mistral", "opt", "gpt2", "gpt_neox"})


def shape(numbers: Mapping[str, Any]) -> Shape | None:
    """A Shape from a from-scratch arch, MODELFACTS or a catalog entry; None when a number is missing."""
    names = ("type", "layers", "hidden", "heads", "kv_heads", "intermediate", "vocab", "context", "tied")
    if any(numbers.get(name) is None for name in names):
        return None
    return Shape(
        **{name: numbers[name] for name in names},
        embed=numbers.get("embed") or numbers["hidden"],
        final_norm=numbers.get("final_norm", True),
    )


@cache
def _models() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("models.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def lookup(hub: str) -> dict[str, Any] | None:
    """The catalog's configuration numbers of a hub id, or None."""
    return _models().get(hub)


def names() -> tuple[str, ...]:
    """Every hub id of the catalog."""
    return tuple(_models())


def parameters(s: Shape, head: str = "none") -> int | None:
    """Parameters of the causal model (`head = none`) or of its backbone with a scalar head.

    Exact for the types of `SUPPORTED` as transformers builds them (a test compares), None for others. A
    scalar head is one row over the backbone's output and takes the place of an untied output matrix.
    """
    if s.type not in SUPPORTED:
        return None
    h, i, kv = s.hidden, s.intermediate, s.kv_width
    norm = h if s.type in GATED else 2 * h  # RMSNorm has a weight, LayerNorm a weight and a bias
    if s.type in GATED:
        layer = 2 * h * h + 2 * h * kv + 3 * h * i + 2 * norm
        if s.type == "qwen2":
            layer += h + 2 * kv  # biases of q, k and v
    else:
        layer = 4 * h * h + 4 * h + 2 * h * i + i + h + 2 * norm
    total = s.vocab * s.embed + s.layers * layer + (norm if s.final_norm else 0)
    if s.type == "gpt2":
        total += s.context * h
    if s.type == "opt":
        total += (s.context + 2) * h  # its learned positions start at 2
        if s.embed != h:
            total += 2 * s.embed * h
    if head == "scalar":
        return total + s.embed
    return total + (0 if s.tied else s.vocab * s.embed)


def largest_layer(s: Shape) -> int:
    """Parameters of the largest single module, which ZeRO 3 gathers whole: an embedding or one MLP matrix."""
    mlp = s.hidden * s.intermediate + (0 if s.type in GATED else s.intermediate)
    return max(s.vocab * s.embed, mlp)
