"""`rlhf run`: execute a recipe, or a plan that was saved as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rlhfdsl.cli.common import show_user_error
from rlhfdsl.cli.planned import add_plan_options, plan_recipe
from rlhfdsl.language.diagnostics import UserError

HELP = "run a recipe or a saved plan; finished stages are not run again"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a recipe (.rlhf) or a plan (.json)")
    add_plan_options(parser)
    parser.add_argument("--base", type=Path, help="folder of a saved plan's inputs (default: its own)")


def run(args: argparse.Namespace) -> int:
    if args.file.suffix == ".json":
        recipe, plan, base = None, read_plan(args.file), args.base or args.file.parent
    else:
        recipe, plan = plan_recipe(args)
        base = args.file.parent
    from rlhfdsl.planning.validate import validate_plan

    try:
        validate_plan(plan)
        check_target(plan)
        from rlhfdsl.running.display import Display
        from rlhfdsl.running.supervisor import execute

        with Display() as display:
            execute(plan, base, display)
    except UserError as error:
        show_user_error(error, recipe)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; finished stages are kept, run the same command to go on", file=sys.stderr)
        return 130
    print(f"\ntalk to it with: rlhf chat {plan['recipe']['output']}")
    return 0


def read_plan(path: Path) -> dict[str, Any]:
    """A plan from its JSON file; exits with status 2 when it cannot be read."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        print(f"error: {path} is not a plan: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if not isinstance(plan, dict):
        print(f"error: {path} is not a plan", file=sys.stderr)
        raise SystemExit(2)
    return plan


def check_target(plan: dict[str, Any]) -> None:
    """Refuse a plan for more devices than this machine has. Raises UserError."""
    from rlhfdsl.planning.hardware import detect

    target, here = plan["target"], detect()
    if target["device"] == "cpu":
        return
    if here.device != "cuda" or here.gpus < target["gpus"]:
        has = f"{here.gpus} GPU{'s' * (here.gpus != 1)}" if here.device == "cuda" else "no GPU"
        raise UserError(
            "E0792",
            f"the plan needs {target['gpus']} GPUs on each node, and this machine has {has}",
            at="cluster",
            help="plan for this machine with `--gpus N`, or `--gpu cpu` to run on the CPU",
        )
