"""Packages that a recipe needs and that may be absent, found out before a run does. Nothing of them is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from rlhfdsl.language import Diagnostic, Recipe
from rlhfdsl.language.advice import nested

_LOGS = ("tensorboard", "wandb")  # parts of DeepSpeed's configuration that import the package of their name


def absent(recipe: Recipe) -> Iterator[Diagnostic]:
    """An error for each package that is needed and not installed, where the recipe first needs it."""
    missing: dict[str, Diagnostic] = {}
    for block in (inner for top in recipe.blocks.values() for inner in nested(top)):
        log = block.type.removeprefix("deepspeed.")
        if block.type == "lora" and block["base"] == "nf4":
            package, error = "bitsandbytes", Diagnostic(
                "E0823", "error", "a base in 4 bits needs the package bitsandbytes, which is not installed",
                recipe.span_of(f"{block.address}.base"), help="pip install 'rlhfdsl[qlora]'",
            )  # fmt: skip
        elif log in _LOGS and block["enabled"]:
            package, error = log, Diagnostic(
                "E0825", "error", f"a log of DeepSpeed needs the package {log}, which is not installed",
                recipe.span_of(f"{block.address}.enabled"), help=f"pip install {log}",
            )  # fmt: skip
        else:
            continue
        if importlib.util.find_spec(package) is None:
            missing.setdefault(package, error)
    yield from missing.values()
