"""`rlhf verify`: execute a finished run again, and tell how far the two agree."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rlhfdsl.cli.common import ERROR, OK, fail, say, show_user_error
from rlhfdsl.cli.planned import go_offline
from rlhfdsl.language import UserError
from rlhfdsl.language.terminal import visible

if TYPE_CHECKING:
    from rlhfdsl.running.verify import Agreement

HELP = "execute a finished run again in a scratch folder; the level of agreement and the first difference"
_LEVELS = ("inputs", "batches", "metrics", "bits")


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf verify`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder (runs/NAME)")
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME", help="this stage (default: all that are finished)"
    )
    parser.add_argument("--updates", type=int, metavar="N", help="only the first N updates (PPO: rollouts) of a stage")
    parser.add_argument(
        "--level", choices=_LEVELS, default="bits", help="what has to agree for exit code 0 (default: bits, the most)"
    )
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="compare with the record in this bundle and execute nothing"
    )
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="folder of the inputs (default: as the run noted)")
    parser.add_argument("--offline", action="store_true", help="use no network")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")


def run(args: argparse.Namespace) -> int:
    """Execute, compare and tell."""
    go_offline(args)
    if args.updates is not None and args.updates < 1:
        fail("--updates takes a number from 1")
    from rlhfdsl.running.supervisor import Interrupted
    from rlhfdsl.running.verify import verify

    def show(stage: dict[str, object], event: dict[str, object]) -> None:
        if event["event"] == "launch":
            say(f"{stage['address']} is executed again")

    try:
        if args.against is not None:
            found = _against(args)
        else:
            found = verify(args.run, args.base, show, stages=args.stage, updates=args.updates)
    except UserError as error:
        return show_user_error(error)
    except Interrupted as stop:
        say("stopped; nothing is left of it, and the run is as it was")
        return 128 + stop.signal
    if args.format == "json":
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        for one in found:
            print(visible(told(one)))
    wanted = _LEVELS.index(args.level)
    enough = all(_LEVELS.index(one.level) >= min(wanted, _LEVELS.index(one.asked)) for one in found)
    sys.stdout.flush()
    return OK if enough else ERROR


def _against(args: argparse.Namespace) -> list[Agreement]:
    from rlhfdsl.cli.saving import read_saved
    from rlhfdsl.running.record import against

    if args.stage or args.updates is not None or args.base is not None:
        fail("--against executes nothing, so it goes with none of --stage, --updates and --base")
    held = read_saved(args.against, valid=False)
    if not held.record:
        fail(f"{args.against} has no record of a run; `rlhf bundle RECIPE --run RUN` adds one")
    return against(args.run, held.record, args.against.name)


def told(one: Agreement) -> str:
    """A stage's agreement in words."""
    reached = {
        "inputs": "the same plan and inputs", "batches": "the same batches", "metrics": "the same metrics",
        "bits": "the same bits of the weights",
    }[one.level]  # fmt: skip
    lines = [f"{one.stage}  {reached}  ({one.events} updates and evaluations compared)"]
    if one.first is not None:
        lines.append(f"  first difference  {one.first}")
    if one.largest:
        lines.append(f"  largest           {one.largest:.1e} of a metric")
    lines += [f"  around it         {note}" for note in one.notes]
    if one.asked == "metrics":
        lines.append("  not looked at     the weights, which a whole stage has")
    return "\n".join(lines)
