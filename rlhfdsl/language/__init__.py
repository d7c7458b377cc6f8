"""The recipe language: text to a checked recipe. README.md tells the order of the passes."""

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
