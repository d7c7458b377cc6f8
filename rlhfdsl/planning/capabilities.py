"""Which rollout engine an actor gets, and why: capabilities.json, read without torch."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def table() -> dict[str, Any]:
    """The capability table: an engine for each model type, and what it is when the device is a CPU."""
    data: dict[str, Any] = json.loads(files(__package__).joinpath("capabilities.json").read_text(encoding="utf-8"))
    return data


def choose(model_type: str, zero: int, device: str, asked: str = "auto") -> tuple[str, str]:
    """(engine, reason) for an actor.

    model_type: transformers' name of the architecture. device: "cpu" or "cuda". asked: the recipe's `engine`: auto,
    eager or graph; a graph that the type cannot have is not given.
    """
    rules = table()
    by_type = rules["types"].get(model_type, rules["other"])
    if asked == "eager":
        return "eager", rules["reasons"]["asked"]
    if by_type["engine"] == "eager":
        return "eager", by_type["reason"]
    if device == "cpu" and asked == "auto":
        return rules["cpu"]["engine"], rules["cpu"]["reason"]
    return "graph", rules["reasons"]["gathered" if zero == 3 else "in_place"]
