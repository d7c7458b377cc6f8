"""`rlhf lock`: make the facts of a recipe's data and models, or check that they are there."""

from __future__ import annotations

import argparse

from rlhfdsl.cli.common import ERROR, OK, fail
from rlhfdsl.cli.planned import add_lock_options, add_plan_options, go_offline, make_plan
from rlhfdsl.language.terminal import visible
from rlhfdsl.planning import lock

HELP = "read data and tokenizers once, and keep what planning needs of them in rlhf.lock"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a recipe; - is stdin")
    add_plan_options(parser)
    add_lock_options(parser)
    parser.add_argument("--check", action="store_true", help="make nothing; exit 1 when something is missing")
    parser.add_argument(
        "--upgrade", action="store_true", help="read everything again; hub revisions move to what they are now"
    )


def run(args: argparse.Namespace) -> int:
    if args.upgrade and (args.check or args.locked or args.frozen):
        fail("--upgrade makes the lock anew, so it goes with none of --check, --locked and --frozen")
    go_offline(args)
    planned = make_plan(args, make_facts=not args.check, upgrade=args.upgrade)
    planned.show()
    for change in planned.stale:
        print(visible(f"changed  {change.name}"))
    if not planned.made:
        for difference in lock.made_here(planned.locked):
            print(f"differs  {difference}")
    for address in planned.missing:
        print(f"missing  {address}")
    for address in planned.made:
        print(f"made     {address}")
    if planned.plan is None:
        return ERROR
    if planned.missing:
        return ERROR
    entries = {entry["key"] for _, _, entry in lock.entries(planned.plan)}
    print(f"{lock.NAME} holds all {len(entries)} inputs of {args.file}")
    return OK
