"""Packages that a recipe needs and that may be absent, found out before a run does. Nothing of them is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from rlhfdsl.language import Diagnostic, Recipe
from rlhfdsl.language.advice import nested


def absent(recipe: Recipe) -> Iterator[Diagnostic]:
    """An error for each package that is needed and not installed, where the recipe first needs it."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return
    for block in (inner for top in recipe.blocks.values() for inner in nested(top)):
        if block.type == "lora" and block["base"] == "nf4":
            yield Diagnostic(
                "E0823", "error", "a base in 4 bits needs the package bitsandbytes, which is not installed",
                recipe.span_of(f"{block.address}.base"), help="pip install 'rlhfdsl[qlora]'",
            )  # fmt: skip
            return
