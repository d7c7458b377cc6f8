"""`rlhf check`: every mistake of a recipe, in one run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from rlhfdsl import __version__
from rlhfdsl.cli.common import ERROR, OK, add_recipe_options, compile_recipe, use_colour
from rlhfdsl.cli.packages import absent
from rlhfdsl.language import Diagnostic, Recipe, as_github, as_json, as_sarif, render
from rlhfdsl.language.source import SourceFile

HELP = "find every mistake in a recipe"


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf check`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="a .rlhf recipe; - is stdin")
    add_recipe_options(parser)
    parser.add_argument(
        "--format",
        choices=("text", "json", "sarif", "github"),
        default="text",
        help="how to print (default: text)",
    )
    parser.add_argument("--strict", action="store_true", help="warnings are errors")


def run(args: argparse.Namespace) -> int:
    """Check each file; 1 when one has an error (with --strict, a warning)."""
    code = OK
    found: list[Diagnostic] = []
    sources: dict[str, SourceFile] = {}
    for path in args.files:
        compilation = compile_recipe(path, args)
        if compilation.recipe is not None:
            lacking = tuple(absent(compilation.recipe))
            whole = None if lacking else compilation.recipe
            compilation = replace(compilation, recipe=whole, diagnostics=(*compilation.diagnostics, *lacking))
        if any(d.severity == "error" or args.strict for d in compilation.diagnostics):
            code = ERROR
        if args.format != "text":
            found += compilation.diagnostics
            sources |= compilation.sources
            continue
        before = f"{path}: " if len(args.files) > 1 else ""
        if compilation.diagnostics:
            print(render(compilation.diagnostics, compilation.sources, use_colour(sys.stdout)), end="\n\n")
        if compilation.recipe is not None and not (args.strict and compilation.diagnostics):
            print(f"{before}ok  {summary(compilation.recipe)}{_counted(compilation.diagnostics, '  ')}")
        else:
            print(f"{before}{_counted(compilation.diagnostics, '')}")
    if args.format == "github":
        print(as_github(found, sources))
    elif args.format != "text":
        data = as_json(found, sources) if args.format == "json" else as_sarif(found, sources, __version__)
        print(json.dumps(data, indent=2, ensure_ascii=False))
    return code


def summary(recipe: Recipe) -> str:
    """`3 stages, 2 models, 1 blend`: stages, and the kinds that the recipe has."""
    counts = [(len(recipe.of_kind(kind)), kind) for kind in ("stage", "model", "blend")]
    return ", ".join(f"{n} {kind}{'s' if n != 1 else ''}" for n, kind in counts if n)


def _counted(diagnostics: Sequence[Diagnostic], before: str) -> str:
    counts = [
        (sum(d.severity == severity for d in diagnostics), severity) for severity in ("error", "warning")
    ]
    text = ", ".join(f"{n} {severity}{'s' if n != 1 else ''}" for n, severity in counts if n)
    return before + text if text else ""
