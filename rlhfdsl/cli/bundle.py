"""`rlhf bundle`: a recipe with all that it takes to repeat it, in one file; and the way back."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from rlhfdsl.cli.common import ERROR, OK, fail, needs_file, show_user_error
from rlhfdsl.cli.planned import add_lock_options, add_plan_options, compiled_with, go_offline, make_plan
from rlhfdsl.cli.saving import is_saved, read_saved
from rlhfdsl.language import UserError
from rlhfdsl.language.files import write_whole
from rlhfdsl.planning import places, saved
from rlhfdsl.planning.validate import validate_plan

HELP = "pack a recipe with its lock, plan and local data into one file that `rlhf run` takes"


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf bundle`."""
    parser.add_argument("file", metavar="FILE", type=Path, help="a recipe; with --open a bundle or saved plan")
    add_plan_options(parser)
    add_lock_options(parser)
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="the bundle (default: RECIPE.rlhfb)")
    parser.add_argument(
        "--limit", type=int, default=saved.LIMIT >> 20, metavar="MIB", help="most local data (default: %(default)s)"
    )
    parser.add_argument("--run", type=Path, metavar="RUN", help="add the metrics and hashes of this run of it")
    parser.add_argument("--open", type=Path, metavar="FOLDER", help="verify a bundle and unpack it to a new folder")


def run(args: argparse.Namespace) -> int:
    """Make a bundle, or open one."""
    if args.open is not None:
        return _open(args)
    needs_file(args.file, "bundled")
    if is_saved(args.file):
        fail(f"{args.file} is packed already; --open FOLDER unpacks it, `rlhf run` runs it")
    go_offline(args)
    planned = make_plan(args)
    planned.show()
    plan, recipe, target = planned.plan, planned.compilation.recipe, planned.target
    if plan is None or recipe is None or target is None:
        return ERROR
    output = args.output or Path(f"{args.file.stem}.rlhfb")
    validate_plan(plan)
    try:
        places.confined(plan)
        record = None
        if args.run is not None:
            from rlhfdsl.running.record import collect

            record = collect(plan, args.run)
        limit = max(0, args.limit) << 20
        data = saved.make(
            saved.BUNDLE, recipe, plan, planned.locked, target, compiled_with(args), limit, record
        )
        write_whole(output, data)
    except UserError as error:
        return show_user_error(error, recipe)
    except OSError as error:
        fail(f"{error.filename or output}: {error.strerror}")
    print(f"{output}  {len(data) / 2**20:.2f} MiB  sha256:{hashlib.sha256(data).hexdigest()}")
    print(f"Run exactly this with: rlhf run {output}")
    return OK


def _open(args: argparse.Namespace) -> int:
    if args.open.exists():
        fail(f"{args.open} is there already; name a new folder")
    try:
        path = saved.unfold(read_saved(args.file, valid=False), args.open)
    except UserError as error:
        return show_user_error(error)
    except OSError as error:
        fail(f"{args.open}: {error.strerror}")
    print(f"{path} is the recipe; its lock is beside it")
    return OK
