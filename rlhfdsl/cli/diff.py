"""`rlhf diff`: two recipes or saved plans side by side, and what their differences mean."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from rlhfdsl.cli.common import ERROR, OK
from rlhfdsl.cli.planned import add_plan_options, plan_or_recipe
from rlhfdsl.language.terminal import visible
from rlhfdsl.planning.compare import compare, render
from rlhfdsl.planning.figures import SHOWN

HELP = "two recipes or plans side by side: only what differs, and what it means"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a recipe, or a saved plan (.json)")
    parser.add_argument("b", metavar="B", help="the same")
    add_plan_options(parser)
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")


def run(args: argparse.Namespace) -> int:
    a, b = (plan_or_recipe(file, args) for file in (args.a, args.b))
    if a is None or b is None:
        return ERROR
    parts = compare(a, b)
    if args.format == "json":
        said = [asdict(part) for part in parts]
        print(json.dumps({"format_version": "1.0", "a": args.a, "b": args.b, "parts": said}, indent=1))
    else:
        sys.stdout.write(visible(render(parts, (args.a, args.b), SHOWN)))
    return OK
