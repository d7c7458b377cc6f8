"""`rlhf graph`: what feeds what, as text or for Mermaid or Graphviz."""

from __future__ import annotations

import argparse
import sys

from rlhfdsl.cli.common import ERROR, OK
from rlhfdsl.cli.planned import add_plan_options, plan_or_recipe
from rlhfdsl.language.terminal import visible
from rlhfdsl.planning import graph

HELP = "the stages, and which models and data feed them"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a recipe (- is stdin), or a saved plan (.json)")
    add_plan_options(parser)
    parser.add_argument("--format", choices=("text", "mermaid", "dot"), default="text", help="default: text")


def run(args: argparse.Namespace) -> int:
    plan = plan_or_recipe(args.file, args)
    if plan is None:
        return ERROR
    draw = {"text": graph.text, "mermaid": graph.mermaid, "dot": graph.dot}[args.format]
    sys.stdout.write(visible(draw(plan)))
    return OK
