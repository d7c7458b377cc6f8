"""`rlhf run`: execute a recipe, a saved plan or a bundle."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from rlhfdsl.cli.common import ERROR, show_user_error
from rlhfdsl.cli.opened import given
from rlhfdsl.cli.planned import add_lock_options, add_plan_options, go_offline
from rlhfdsl.language import Recipe
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.language.terminal import visible
from rlhfdsl.planning.figures import table

HELP = "run a recipe, a saved plan or a bundle; finished stages are not run again"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a recipe (.rlhf), a saved plan (.rhplan, .json) or a bundle (.rlhfb)")
    add_plan_options(parser)
    add_lock_options(parser)
    parser.add_argument("--base", type=Path, help="folder of a saved plan's inputs (default: its own)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the run writes, in place of the recipe's")
    parser.add_argument("--sha256", metavar="HEX", help="refuse a saved plan or bundle with another hash")
    parser.add_argument(
        "--anew", action="store_true", help="start unfinished stages at their beginning; what they have is kept aside",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=seconds, metavar="TIME", default=1800.0,
        help="end a stage that makes no progress for this long, as 90s, 30m, 2h (default: 30m)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    go_offline(args)
    # Not at the head: --offline comes before what might import the hub. Not in the `try`, whose clauses need a name.
    from rlhfdsl.running.supervisor import Interrupted, execute

    recipe: Recipe | None = None
    try:
        recipe, plan, base = given(args)
        check_target(plan)
        from rlhfdsl.running.display import Display

        with Display() as display:
            execute(plan, base, display, anew=args.anew, patience=args.patience)
    except UserError as error:
        show_user_error(error, recipe)
        return exit_code(error)
    except Interrupted as stop:
        print(f"\n{visible(stop.message)}; run the same command to go on", file=sys.stderr)
        return 128 + stop.signal
    print(visible("\n" + "\n".join(left_behind(plan))))
    return 0


def left_behind(plan: dict[str, Any]) -> list[str]:
    """Where a finished run's models and numbers are, and how to talk to its policy, in lines."""
    output = plan["recipe"]["output"]
    models = [
        (stage["address"].removeprefix("stage."), name, path)
        for stage in plan["stages"]
        for name, path in stage["artifacts"].items()
    ]
    lines = ["models, in Hugging Face form:", *(f"  {row}" for row in table(models))]
    lines.append(f"curves and samples: rlhf report {output}")
    if any("policy" in stage["artifacts"] for stage in plan["stages"]):
        lines.append(f"talk to it: rlhf chat {output}")
    return lines


def exit_code(error: UserError) -> int:
    """4 a rank died, 5 out of memory, 6 a loss or gradient that is not finite, 7 no progress; 1 anything else."""
    from rlhfdsl.running.failure import EXITS

    return EXITS.get(error.code, ERROR)


def seconds(text: str) -> float:
    """A duration as a recipe writes it, in seconds."""
    from rlhfdsl.language.units import Quantity, read_number

    found = read_number(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?[a-z]+", text) else None
    if not isinstance(found, Quantity) or found.unit != "duration" or found.value <= 0:
        raise argparse.ArgumentTypeError(f"takes a time such as 30m, not `{text}`")
    return float(found.value)


def check_target(plan: dict[str, Any]) -> None:
    """Refuse a plan for more devices than this machine has. Raises UserError."""
    from rlhfdsl.planning.hardware import detect

    target, here = plan["target"], detect()
    if target["device"] == "cpu":
        return
    if here.device != "cuda" or here.gpus < target["gpus"]:
        has = gpus(here.gpus) if here.device == "cuda" else "no GPU"
        raise UserError(
            "E0792",
            f"the plan needs {gpus(target['gpus'])} on each node, and this machine has {has}",
            help="plan for this machine with `--gpus N`, or `--gpu cpu` to run on the CPU",
        )


def gpus(count: int) -> str:
    """A number of GPUs in words."""
    return f"{count} GPU" if count == 1 else f"{count} GPUs"
