"""`rlhf diff`: two recipes, saved plans or runs side by side, and what their differences mean."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhfdsl.cli.common import ERROR, OK
from rlhfdsl.cli.planned import add_plan_options, plan_or_recipe
from rlhfdsl.language.terminal import visible
from rlhfdsl.planning.compare import compare, render
from rlhfdsl.planning.figures import SHOWN
from rlhfdsl.running import records

Json = dict[str, Any]

HELP = "two recipes, plans or runs side by side: only what differs, and what it means"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a recipe, a saved plan, or the folder of a run")
    parser.add_argument("b", metavar="B", help="the same")
    add_plan_options(parser)
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")


def run(args: argparse.Namespace) -> int:
    a, b = (_plan(file, args) for file in (args.a, args.b))
    if a is None or b is None:
        return ERROR
    parts = compare(a, b)
    runs = None
    if records.is_run(Path(args.a)) and records.is_run(Path(args.b)):
        runs = records.read(Path(args.a)), records.read(Path(args.b))
    if args.format == "json":
        out = {"format_version": "1.0", "a": args.a, "b": args.b, "parts": [asdict(part) for part in parts]}
        print(json.dumps(out | ({"runs": records.as_json(*runs)} if runs else {}), indent=1))
        return OK
    sys.stdout.write(visible(render(parts, (args.a, args.b), SHOWN)))
    if runs:
        sys.stdout.write(visible("\nAs they ran\n\n" + records.render(*runs)))
    return OK


def _plan(file: str, args: argparse.Namespace) -> Json | None:
    """The plan of a run's folder, a saved plan, or that of a recipe."""
    return records.plan_of(Path(file)) if records.is_run(Path(file)) else plan_or_recipe(file, args)
