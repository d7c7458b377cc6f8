"""What `rlhf run` is given, as a plan: a recipe, a plan in JSON, or a saved plan or bundle held against its recipe."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rlhfdsl.cli.common import ERROR, fail, needs_file, say, show, show_user_error
from rlhfdsl.cli.planned import TARGET, plan_recipe, target_of
from rlhfdsl.cli.saving import is_saved, read_plan, read_saved
from rlhfdsl.language import Diagnostic, Recipe, UserError, load
from rlhfdsl.planning import checkpoints, compile, places, saved
from rlhfdsl.planning.validate import validate_plan

Given = tuple[Recipe | None, dict[str, Any], Path]


def given(args: argparse.Namespace) -> Given:
    """The recipe (None for JSON), the plan to run, and the folder that its input paths are relative to.

    Diagnostics go to stderr. Raises UserError, and SystemExit 1 or 2 after a message.
    """
    needs_file(args.file, "run")
    asked = args.sha256 is not None
    if is_saved(args.file):
        recipe, plan, base = _saved(args)
    elif asked:
        fail("--sha256 is for a saved plan or a bundle")
    elif args.file.suffix == ".json":
        recipe, plan, base = None, read_plan(args.file), args.base or args.file.parent
        places.confined(plan, any_output=args.output is not None)
    else:
        if args.base is not None:
            fail("--base is for a saved plan; the paths of a recipe are relative to its own folder")
        recipe, plan = plan_recipe(args)
        base = args.file.parent
        validate_plan(plan)
        # Whoever runs a recipe may send its output anywhere; what the recipe itself says stays in here.
        chosen = plan["origins"]["recipe.output"]["layer"] in ("set", "param")
        try:
            places.confined(plan, any_output=chosen or args.output is not None)
        except UserError as error:
            raise SystemExit(show_user_error(error, recipe)) from None
    return recipe, plan if args.output is None else places.relocate(plan, str(args.output)), base


def _saved(args: argparse.Namespace) -> Given:
    if args.param or args.profile or args.sets:
        fail(f"{args.file} holds its own settings; `rlhf bundle {args.file} --open FOLDER` unpacks its recipe")
    held = read_saved(args.file)
    name = args.file.name
    wanted = (args.sha256 or held.digest).removeprefix("sha256:").lower()
    if wanted != held.digest:
        raise UserError("E0751", f"`{name}` has sha256 {held.digest}, and {wanted} is asked for", place=name,
                        help="it is another file than the one that was meant; do not use it")  # fmt: skip
    places.confined(held.plan, any_output=args.output is not None)
    places.no_strange_code(held.plan, name, bundle=held.kind == saved.BUNDLE)
    if held.kind == saved.PLAN:
        base = args.base or args.file.parent
        with tempfile.TemporaryDirectory() as folder:
            path = saved.unfold(held, Path(folder).resolve() / "opened")
            recipe = _recipe(held, path, name)
            return recipe, _plan(args, held, recipe, base, name), base
    if args.base is not None:
        fail("--base is for a saved plan; a bundle has its inputs in it")
    output = places.make_output(Path(args.output or held.plan["recipe"]["output"]))
    path = saved.unfold(held, output / f"bundle-{held.digest[:12]}")
    recipe = _recipe(held, path, name)
    return recipe, _plan(args, held, recipe, path.parent, name), path.parent


def _recipe(held: saved.Saved, path: Path, name: str) -> Recipe:
    """The recipe of an unfolded archive, compiled as it was."""
    options = held.about["options"]
    compilation = load(path, sets=options["sets"], params=options["params"], profile=options["profile"])
    root = path.resolve().parents[held.recipe.count("/")]
    strange = [file for file in saved.texts(compilation.sources) if not Path(file).resolve().is_relative_to(root)]
    if compilation.recipe is None or strange:
        show(compilation.diagnostics, compilation.sources)
        why = f"its recipe includes `{strange[0]}`, outside of it" if strange else "its recipe has an error here"
        raise UserError("E0752", f"`{name}` cannot be run: {why}", place=name, help="ask for it anew")
    return compilation.recipe


def _plan(args: argparse.Namespace, held: saved.Saved, recipe: Recipe, base: Path, name: str) -> dict[str, Any]:
    """The saved plan, or the same recipe and lock planned for the target of the options."""
    saved.check(held, recipe, base, name)
    if all(getattr(args, option) is None for option in TARGET):
        return held.plan
    target = target_of(recipe, args)
    if isinstance(target, Diagnostic):
        show([target], recipe.sources)
        raise SystemExit(ERROR)
    fit = bool(held.about["options"]["fit"])
    plan, found = compile(recipe, held.locked, target, known=checkpoints.of_recipe(recipe, base), fit=fit)
    show(found, recipe.sources)
    if plan is None:
        raise SystemExit(ERROR)
    say(f"{name} was planned for other devices: the batches are the same, the last bits may differ")
    return plan
