"""What the commands share: a recipe or its diagnostics, colours, and the messages of a UserError."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from rlhfdsl.language import Compilation, Diagnostic, Recipe, UserError
    from rlhfdsl.language.source import Overlay, SourceFile

OK, ERROR, USAGE, BUG = 0, 1, 2, 3


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """`-p`, `--profile` and `--set`, as every command that reads a recipe takes them."""
    parser.add_argument(
        "-p", "--param", action="append", default=[], metavar="NAME=VALUE", help="give a parameter"
    )
    parser.add_argument("--profile", metavar="NAME", help="apply a profile of the recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        dest="sets",
        help="set a value of the recipe",
    )


@cache
def _whole(stream: TextIO) -> bytes:
    return stream.buffer.read()


def held(name: str | Path) -> tuple[Path, Overlay | None]:
    """The path of a recipe that was named on the command line, and its text if that comes from stdin (`-`).

    What stdin names lies in the current folder.
    """
    if str(name) != "-":
        return Path(name), None
    path = Path("<stdin>")
    return path, lambda asked: _whole(sys.stdin) if asked == path else None


def needs_file(name: str | Path, why: str) -> None:
    """Refuse a recipe from stdin, with exit code 2."""
    if str(name) == "-":
        fail(f"a recipe from stdin cannot be {why}: write it to a file first")


def compile_recipe(path: str | Path, args: argparse.Namespace) -> Compilation:
    """Load a recipe with the options of `add_recipe_options`; exit 2 when a -p is not NAME=VALUE."""
    from rlhfdsl.language import load

    if Path(path).suffix in (".rhplan", ".rlhfb"):
        fail(f"{path} is not a recipe: `rlhf run` runs it, `rlhf bundle {path} --open FOLDER` unpacks its recipe")
    params: dict[str, str] = {}
    for text in args.param:
        name, equals, value = text.partition("=")
        if not equals or not name:
            fail(f"-p takes NAME=VALUE, for example -p seed=7; `{text}` is not")
        params[name] = value
    at, overlay = held(path)
    return load(at, sets=args.sets, params=params, profile=args.profile, overlay=overlay)


def load_recipe(path: str | Path, args: argparse.Namespace) -> Recipe:
    """The recipe of a file; warnings and errors go to stderr, and with an error the command exits 1."""
    compilation = compile_recipe(path, args)
    show(compilation.diagnostics, compilation.sources)
    if compilation.recipe is None:
        raise SystemExit(ERROR)
    return compilation.recipe


def show(diagnostics: Sequence[Diagnostic], sources: Mapping[str, SourceFile]) -> None:
    """Diagnostics to stderr, with windows of the sources (`recipe.sources` for those about a recipe)."""
    if diagnostics:
        from rlhfdsl.language import render

        print(render(diagnostics, sources, use_colour(sys.stderr)), file=sys.stderr)


def show_user_error(error: UserError, recipe: Recipe | None = None) -> int:
    """A UserError to stderr, with a window when the recipe is given; returns the exit code 1."""
    show([error.diagnostic(recipe)], recipe.sources if recipe is not None else {})
    return ERROR


def say(text: str) -> None:
    """A line about what goes on, to stderr: stdout is for what was asked."""
    from rlhfdsl.language.terminal import visible

    print(visible(text), file=sys.stderr)


def use_colour(stream: TextIO) -> bool:
    """Colour on a terminal, unless NO_COLOR or TERM=dumb forbids it."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def from_zero(text: str) -> float:
    """A number of an option, from 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"takes a number from 0, not `{text}`")
    return value


def fail(message: str) -> NoReturn:
    """A usage error: one line to stderr, exit 2."""
    say(f"rlhf: {message}")
    raise SystemExit(USAGE)
