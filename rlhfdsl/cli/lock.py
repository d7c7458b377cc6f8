"""`rlhf lock`: make the facts of a recipe's data and models, or check that they are there."""

from __future__ import annotations

import argparse

from rlhfdsl.cli.common import ERROR, OK
from rlhfdsl.cli.planned import add_plan_options, make_plan
from rlhfdsl.planning import lock

HELP = "read data and tokenizers once, and keep what planning needs of them in rlhf.lock"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a recipe")
    add_plan_options(parser)
    parser.add_argument("--check", action="store_true", help="make nothing; exit 1 when something is missing")


def run(args: argparse.Namespace) -> int:
    planned = make_plan(args, make_facts=not args.check)
    planned.show()
    for name in planned.stale:
        print(f"changed  {name}")
    for address in planned.missing:
        print(f"missing  {address}")
    for address in planned.made:
        print(f"made     {address}")
    if planned.plan is None:
        return ERROR
    if planned.missing:
        return ERROR
    entries = {entry["key"] for _, entry in (*lock.edges(planned.plan), *planned.plan["models"].items())}
    print(f"{lock.NAME} holds all {len(entries)} inputs of {args.file}")
    return OK
