"""From a recipe file to its plan, with the lock kept: what `plan`, `lock` and `run` share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhfdsl.cli.common import ERROR, add_recipe_options, compile_recipe, fail, from_zero, say, show
from rlhfdsl.cli.packages import absent
from rlhfdsl.language import Compilation, Diagnostic, Recipe, UserError
from rlhfdsl.planning import checkpoints, checks, compile, hardware, lock, scorers

Json = dict[str, Any]
TARGET = ("gpu", "gpus", "nodes", "host_memory", "price")  # options
OF_THE_HUB = frozenset({"E0815", "E0855"})  # what data and models on the hub end in that cannot be had


@dataclass(slots=True)
class Planned:
    """A recipe as far as it could be planned: `plan` is None when `diagnostics` hold an error.

    made: addresses whose facts were made now. stale: files that changed since their facts were made.
    missing: addresses without facts, when none were to be made.
    """

    compilation: Compilation
    plan: Json | None
    diagnostics: tuple[Diagnostic, ...]
    target: hardware.Target | None = None
    locked: Json = field(default_factory=lock.empty)
    made: list[str] = field(default_factory=list)
    stale: list[lock.Change] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def show(self) -> None:
        """The diagnostics to stderr."""
        show(self.diagnostics, self.compilation.sources)


def add_plan_options(
    parser: argparse.ArgumentParser, counts: Callable[[str], object] | None = None, metavar: str = "N"
) -> None:
    """The options of every command that plans a recipe: its parameters, overrides and target.

    counts: reads --gpus where it takes more than a number.
    """
    add_recipe_options(parser)
    target = parser.add_argument_group("target", "default: the recipe's cluster, else what this machine has")
    target.add_argument(
        "--gpu", metavar="NAME", help=f"{', '.join(hardware.catalog())}, cpu, or a profile of `rlhf bench` (.json)"
    )
    target.add_argument(
        "--gpus", type=counts or positive, metavar=metavar, help="GPUs (on a CPU: processes) of each node"
    )
    target.add_argument("--nodes", type=positive, metavar="N", help="nodes")
    target.add_argument(
        "--host-memory", type=_gib, metavar="GIB",
        help="memory of each node, for offload (default: this machine's, where its GPU is the target)",
    )  # fmt: skip
    target.add_argument("--price", type=from_zero, metavar="USD", help="of a GPU and hour, in place of the catalog's")


def add_lock_options(parser: argparse.ArgumentParser) -> None:
    """The options of the commands that make or use rlhf.lock."""
    options = parser.add_argument_group("lock", "default: what rlhf.lock lacks is made, what changed is made anew")
    how = options.add_mutually_exclusive_group()
    how.add_argument("--locked", action="store_true", help="refuse when a file changed or the lock lacks something")
    how.add_argument("--frozen", action="store_true", help="take the lock as it is, without a look at files")
    options.add_argument("--offline", action="store_true", help="use no network: the hub's files come from its cache")


def go_offline(args: argparse.Namespace) -> None:
    """Carry out --offline, for this process and those that it starts, before a library of the hub is imported."""
    if args.offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def plan_recipe(args: argparse.Namespace) -> tuple[Recipe, Json]:
    """`args.file` and its plan with every fact known; diagnostics go to stderr, and with an error it exits
    1."""
    planned = make_plan(args)
    planned.show()
    if planned.plan is None or planned.compilation.recipe is None:
        raise SystemExit(ERROR)
    return planned.compilation.recipe, planned.plan


def compiled_with(args: argparse.Namespace) -> Json:
    """The options of a recipe's compilation, as a saved plan keeps them. `compile_recipe` checked the form of -p."""
    params = {name: value for name, _, value in (text.partition("=") for text in args.param)}
    fit = bool(getattr(args, "fit", False))
    return {"params": params, "profile": args.profile, "sets": list(args.sets), "fit": fit}


def plan_or_recipe(file: str, args: argparse.Namespace) -> Json | None:
    """A saved plan, or the plan of a recipe with the facts that its lock has; None after an error that was shown."""
    from rlhfdsl.cli import saving

    if saving.is_saved(Path(file)):
        return saving.read_saved(Path(file)).plan
    if file.endswith(".json"):
        return saving.read_plan(Path(file))
    planned = make_plan(argparse.Namespace(**(vars(args) | {"file": file})), make_facts=False)
    planned.show()
    return planned.plan


def make_plan(
    args: argparse.Namespace,
    *,
    use_lock: bool = True,
    make_facts: bool = True,
    or_without: bool = False,
    fit: bool = False,
    upgrade: bool = False,
) -> Planned:
    """Compile `args.file` for its target.

    use_lock: read rlhf.lock beside the recipe. make_facts: make what it lacks or what is stale, and write it.
    or_without: where the hub cannot be had, plan without what is there, with a warning.
    upgrade: make every fact of this recipe anew, so that hub revisions move to what they are now.
    fit: lay the engines out the fastest way that fits, whatever is written.
    """
    compilation = compile_recipe(str(args.file), args)
    recipe = compilation.recipe
    if recipe is None:
        return Planned(compilation, None, compilation.diagnostics)
    target = target_of(recipe, args)
    if isinstance(target, Diagnostic):
        return Planned(compilation, None, (*compilation.diagnostics, target))
    known = checkpoints.of_recipe(recipe, recipe.path.parent)
    bare, found = compile(recipe, lock.empty(), target, known=known, fit=fit)
    lacking = tuple(absent(recipe))
    if lacking:
        return Planned(compilation, None, (*compilation.diagnostics, *found, *lacking), target)
    out = Planned(compilation, bare, (*compilation.diagnostics, *found), target)
    if bare is None or not use_lock:
        return out
    path = recipe.path.parent / lock.NAME
    try:
        locked = lock.read(path)
    except UserError as error:
        out.plan, out.diagnostics = None, (*compilation.diagnostics, error.diagnostic(None))
        return out
    out.locked = locked
    frozen, strict = getattr(args, "frozen", False), getattr(args, "locked", False)
    # Stale facts go before they are planned with: what they say may be wrong by now.
    out.stale = [] if frozen else lock.drop_stale(locked, bare, path.parent)
    if upgrade:
        lock.forget(locked, bare)
    plan, found = compile(recipe, locked, target, known=known, fit=fit)
    out.plan, out.diagnostics = plan, (*compilation.diagnostics, *found)
    if plan is None:
        return out
    out.missing = [address for _, address, _ in lock.missing(plan)]
    if frozen or strict:
        for difference in lock.made_here(locked):
            say(f"{lock.NAME} was made by other versions: {difference}")
        refusal = lock.refusal(out.stale, out.missing)
        if refusal is not None:
            out.plan, out.diagnostics = None, (*out.diagnostics, refusal.diagnostic(recipe))
        return out
    if not out.missing or not make_facts:
        return out
    for change in out.stale:
        say(f"{change}; it is read again")
    try:
        out.made = _make(plan, locked, path)
    except UserError as error:
        told = error.diagnostic(recipe)
        if not or_without or error.code not in OF_THE_HUB:
            out.plan, out.diagnostics = None, (*out.diagnostics, told)
            return out
        plan, found = compile(recipe, locked, target, known=known, fit=fit)
        note = "this is planned without it; a run needs it"
        told = replace(told, code="W0708", severity="warning", notes=(*told.notes, note))
        out.plan, out.diagnostics = plan, (*compilation.diagnostics, *found, told)
        return out
    out.missing = []
    locked = out.locked = lock.read(path)  # in the order of the file, so that equal plans have equal bytes
    plan, found = compile(recipe, locked, target, known=known, fit=fit)
    out.plan, out.diagnostics = plan, (*compilation.diagnostics, *found)
    return out


def target_of(recipe: Recipe, args: argparse.Namespace) -> hardware.Target | Diagnostic:
    """The target by flags, cluster and machine. A GPU that the catalog does not list exits 2 as a flag, and
    is a diagnostic in a recipe."""
    cluster = next(iter(recipe.of_kind("cluster")), None)
    if args.gpu is not None and not hardware.known(args.gpu) and not hardware.is_profile(args.gpu):
        fail(f"`{args.gpu}` is not in the catalog of GPUs: {hardware.meant(args.gpu)}")
    written = None
    if cluster is not None:
        if args.gpu is None and cluster["gpu"] is not None and not hardware.known(cluster["gpu"]):
            return checks.unknown_gpu(recipe, cluster["gpu"], f"{cluster.address}.gpu")
        written = {"address": cluster.address} | {key: cluster[key] for key in ("gpu", "gpus", "nodes")}
    flags = {key: getattr(args, key) for key in TARGET}
    asks = flags["gpu"] is None and (written is None or written["gpu"] is None)
    try:
        target = hardware.resolve(flags, written, hardware.detect() if asks else hardware.CPU)
        if target.device == "cpu" and args.host_memory is not None:
            fail(f"--host-memory is for offload from GPUs, and the target is cpu ({target.origin})")
        return target
    except UserError as error:  # of a profile
        fail(f"{error.message}; {error.help}")


def _make(plan: Json, locked: Json, path: Path) -> list[str]:
    """Make the facts that a plan lacks and write the lock; what was made before a mistake is kept."""
    from rlhfdsl.data.facts import edge_facts
    from rlhfdsl.models.facts import model_facts

    base = path.parent
    made = []
    try:
        for part, address, entry in lock.missing(plan):
            _tell(address)
            if part == "models":
                # The edges, which come after the models, read the tokenizer of the commit that is pinned here.
                found = entry["facts"] = model_facts(entry, base, address)
            else:
                found = edge_facts(plan, entry, base) if part == "edges" else scorers.facts(entry, base, address)
            locked.setdefault(part, {})[entry["key"]] = found
            made.append(address)
    finally:
        if made:
            lock.stamp(locked)
            try:
                lock.write(path, locked)
            except OSError as error:
                fail(
                    f"{path}: {error.strerror}; what was read of data and models is kept there: take a copy of the "
                    "recipe in a folder that can be written, or look at it with `rlhf plan --no-lock`"
                )
    return made


def _tell(address: str) -> None:
    if sys.stderr.isatty():
        say(f"reading {address}")


def _gib(text: str) -> int:
    """`512`, in GiB, as bytes."""
    return positive(text) << 30


def positive(text: str) -> int:
    """A number from 1 of an option."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"takes a number from 1, not `{text}`")
    return value
