"""How batches split over the GPUs of the recipe's cluster, for an editor to show beside them.

The plan is made from what stands in the files, the lock and the model folders; nothing is asked of the machine, so a
recipe without a cluster has no such numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhfdsl.language.compile import Compilation
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.language.recipe import Block, Recipe
from rlhfdsl.planning import checkpoints, compile, hardware, lock

Json = dict[str, Any]


def batches(file: str, compilation: Compilation) -> list[tuple[int, str]]:
    """Offsets behind the batches of a file, with how they are cut: ` = 8 GPUs x micro 16 x 4`."""
    recipe = compilation.recipe
    plan = _plan(recipe) if recipe is not None else None
    if recipe is None or plan is None:
        return []
    found: dict[int, str] = {}
    for stage in plan["stages"]:
        for block, name, text in _of(recipe.blocks[stage["address"]], stage, _devices(plan["target"])):
            span = block.setting(name).span
            if span is not None and span.file == file:
                found.setdefault(span.end, f" = {text}")
    return sorted(found.items())


def _plan(recipe: Recipe) -> Json | None:
    cluster = next(iter(recipe.of_kind("cluster")), None)
    if cluster is None:
        return None
    written = {"address": cluster.address} | {key: cluster[key] for key in ("gpu", "gpus", "nodes")}
    if written["gpu"] is not None and not hardware.known(written["gpu"]):
        return None
    folder = recipe.path.parent
    try:
        locked = lock.read(folder / lock.NAME)
    except UserError:
        locked = lock.empty()
    target = hardware.resolve({}, written, hardware.CPU)
    plan, _ = compile(recipe, locked, target, known=checkpoints.of_recipe(recipe, folder))
    return plan


def _devices(target: Json) -> str:
    count: int = target["world"]
    one, many = ("GPU", "GPUs") if target["device"] == "cuda" else ("process", "processes")
    return f"{count} {one if count == 1 else many}"


def _of(block: Block, stage: Json, devices: str) -> Iterator[tuple[Block, str, str]]:
    """(block, attribute, how its number is cut) for the batches of a stage."""
    batch = stage["batch"]
    if "rollouts" not in batch:
        yield block, "batch", f"{devices} x micro {batch['micro']} x {batch['accumulation']}"
        return
    actor, world = stage["engines"]["actor"], batch["world"]
    answers = "" if batch["answers"] == 1 else f" x {batch['answers']} answers"
    yield block.blocks["rollout"], "batch", f"{devices} x {batch['prompts'] // world} prompts{answers}"
    times = batch["minibatch"] // world // actor["micro"]
    yield block.blocks["update"], "minibatch", f"{devices} x micro {actor['micro']} x {times}"
    if batch.get("ptx") is not None:
        ptx = batch["ptx"]
        yield block.blocks["ptx"], "batch", f"{devices} x micro {ptx['micro']} x {ptx['per_rank'] // ptx['micro']}"
