"""FLOPs of a forward pass: for each token 2 for each parameter of the matrices (the input embedding is a lookup), and
4 x layers x width for each token that it attends to. A plan's seconds rest on them, and so does what a run says of its
rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhfdsl.planning import shards
from rlhfdsl.planning.catalog import Shape, shape
from rlhfdsl.planning.entries import numbers


@dataclass(frozen=True, slots=True)
class Forward:
    """FLOPs of one model's forward pass.

    token: for each token, the output matrix apart; said: for each token whose logits are computed; attended: for each
    token and each token that it attends to.
    """

    token: float
    said: float
    attended: float


UNKNOWN = Forward(*3 * (float("nan"),))


def forward(model: Shape, count: int, *, causal: bool, tensor: int = 1) -> Forward:
    """Of a model with `count` parameters, on one device of the `tensor` that share it."""
    table = model.vocab * model.embed
    lookup = 0 if causal and model.tied else table
    said = table if causal else 0
    held = shards.held(model, count, tensor)
    return Forward(2.0 * (held - lookup - said), 2.0 * said, 4.0 * model.layers * model.q_width / tensor)


def of_engine(plan: Mapping[str, Any], stage: Mapping[str, Any], name: str) -> Forward:
    """Of an engine of a plan; `UNKNOWN` where the plan does not know the numbers of its model."""
    engine, count = stage["engines"][name], stage["memory"]["engines"][name]["parameters"]
    entry = plan["models"][engine["base"]]
    found = numbers(entry, entry["facts"], None)
    model = shape(found) if found is not None else None
    return UNKNOWN if model is None or count is None else forward(model, count, causal=engine["head"] == "none")
