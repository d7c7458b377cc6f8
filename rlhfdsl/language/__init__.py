"""The recipe language: text to a checked recipe. README.md tells the order of the passes.

What is named here is imported when it is first used: `rlhf fmt` needs no checker.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhfdsl.language.compile import Compilation, load
    from rlhfdsl.language.diagnostics import Diagnostic, Edit, Fix, Label, Span, UserError
    from rlhfdsl.language.diagnostics.export import as_github, as_json, as_sarif
    from rlhfdsl.language.diagnostics.render import render
    from rlhfdsl.language.recipe import Block, Origin, Recipe, Reference, Setting, Source

__all__ = [
    "Block",
    "Compilation",
    "Diagnostic",
    "Edit",
    "Fix",
    "Label",
    "Origin",
    "Recipe",
    "Reference",
    "Setting",
    "Source",
    "Span",
    "UserError",
    "as_github",
    "as_json",
    "as_sarif",
    "load",
    "render",
]

_HOMES = {
    "compile": ("Compilation", "load"),
    "diagnostics": ("Diagnostic", "Edit", "Fix", "Label", "Span", "UserError"),
    "diagnostics.export": ("as_github", "as_json", "as_sarif"),
    "diagnostics.render": ("render",),
    "recipe": ("Block", "Origin", "Recipe", "Reference", "Setting", "Source"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
