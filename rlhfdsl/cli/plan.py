"""`rlhf plan`: what a run would do, before anything is run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rlhfdsl.cli import several
from rlhfdsl.cli.common import ERROR, OK, fail, needs_file, show_user_error
from rlhfdsl.cli.planned import Planned, add_lock_options, add_plan_options, compiled_with, go_offline, make_plan
from rlhfdsl.language import UserError, as_json
from rlhfdsl.language.files import write_whole
from rlhfdsl.language.suggest import listed, nearest
from rlhfdsl.language.terminal import visible

HELP = "what a run would do: stages, updates, memory, data and files"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="a recipe; - is stdin")
    parser.add_argument(
        "--measured", type=Path, metavar="RUN", help="what a run's plan predicted beside what it measured (runs/NAME)"
    )
    add_plan_options(parser, several.counts, "N[,N…]")
    add_lock_options(parser)
    parser.add_argument(
        "--no-lock", action="store_true", help="neither read nor write rlhf.lock: what needs it stays unknown"
    )
    parser.add_argument(
        "--fit", action="store_true",
        help="choose ZeRO, offload, checkpointing and micro batches anew: the fastest that fits the target",
    )  # fmt: skip
    parser.add_argument(
        "--largest", metavar="FAMILY", help="which models of a family fit in the actor's place: actor, opt, llama-3 …"
    )
    parser.add_argument(
        "--show", metavar="PART", help="one part as JSON: ds_config.actor, stage.ppo.memory, stage.sft.batch, time …"
    )
    parser.add_argument(
        "--format", choices=("text", "json"), default="text",
        help="default: text; json is the plan and, in `actions`, what a run would do with each stage now",
    )  # fmt: skip
    parser.add_argument(
        "-o", dest="output", type=Path, metavar="FILE", help="save the plan for `rlhf run` (.rhplan; .json to read it)"
    )


def run(args: argparse.Namespace) -> int:
    if args.measured is not None:
        return _measured(args.measured)
    if args.file is None:
        fail("name a recipe to plan")
    if args.output is not None:
        needs_file(args.file, "saved with its plan")
    go_offline(args)
    if args.gpus is not None and len(args.gpus) > 1:
        if args.output is not None or args.largest is not None:
            fail("several --gpus print a curve; neither -o nor --largest goes with them")
        return several.over_gpus(args, args.gpus)
    args.gpus = args.gpus[0] if args.gpus is not None else None
    if args.largest is not None:
        return several.over_models(args)
    planned = make_plan(args, use_lock=not args.no_lock, or_without=args.output is None, fit=args.fit)
    if planned.plan is None and args.format == "json":
        print(json.dumps(as_json(planned.diagnostics, planned.compilation.sources), indent=1))
        return ERROR
    planned.show()
    if planned.plan is None:
        return ERROR
    text = to_json(planned.plan)
    if args.output is not None and not _save(args, planned, text):
        return ERROR
    if args.show is not None:
        return _show(planned.plan, args.show)
    actions = {} if args.no_lock else _actions(planned)
    if args.format == "json":
        done = {stage: {"do": do, "reason": reason} for stage, (do, reason) in actions.items()}
        sys.stdout.write(to_json(planned.plan | {"actions": done}))
    else:
        from rlhfdsl.planning.render import layout, render

        sys.stdout.write(visible(render(planned.plan, actions)))
        if args.fit:
            sys.stdout.write(visible("\n" + layout(planned.plan)))
        if args.output is not None:
            print(f"Saved; run exactly this with: rlhf run {args.output}{_base(args)}")
    return OK


def _show(plan: dict[str, object], path: str) -> int:
    """One part of the plan as JSON."""
    from rlhfdsl.planning.parts import part

    try:
        print(json.dumps(part(plan, path), indent=2, ensure_ascii=False))
    except KeyError as error:
        near = nearest(path, error.args[0])
        help = f"did you mean {listed(near)}?" if near else f"there is {listed(error.args[0]) or 'nothing below'}"
        fail(f"the plan has no `{path}`; {help}")
    return OK


def _actions(planned: Planned) -> dict[str, tuple[str, str]]:
    """What a run from this folder would do now with each stage, and why; nothing while facts are missing."""
    from rlhfdsl.running import schedule

    if planned.plan is None or planned.missing:
        return {}
    return {action.stage: (action.do, action.reason) for action in schedule.actions(planned.plan)}


def _measured(folder: Path) -> int:
    """Predicted beside measured, for the stages of a run."""
    from rlhfdsl.running import records

    if not records.is_run(folder):
        fail(f"{folder} is not a run: it has no plan.json")
    sys.stdout.write(records.truth(records.read(folder)))
    return OK


def _save(args: argparse.Namespace, planned: Planned, text: str) -> bool:
    """Write the plan: as JSON to a .json file, else with recipe and lock so that `run` can hold it against them."""
    from rlhfdsl.planning import saved
    from rlhfdsl.planning.validate import validate_plan

    plan, recipe, target = planned.plan, planned.compilation.recipe, planned.target
    assert plan is not None and recipe is not None and target is not None
    validate_plan(plan)
    try:
        data: bytes | str = text
        if args.output.suffix != ".json":
            data = saved.make(saved.PLAN, recipe, plan, planned.locked, target, compiled_with(args))
        write_whole(args.output, data)
    except UserError as error:
        show_user_error(error, recipe)
        return False
    except OSError as error:
        fail(f"{args.output}: {error.strerror}")
    return True


def _base(args: argparse.Namespace) -> str:
    """The option that a plan saved in another folder than the recipe's needs, since input paths are relative."""
    folder = Path(args.file).resolve().parent
    return "" if args.output.resolve().parent == folder else f" --base {Path(args.file).parent}"


def to_json(plan: dict[str, object]) -> str:
    """The plan's one text as JSON: equal plans have equal bytes."""
    return json.dumps(plan, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
