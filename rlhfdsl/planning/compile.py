"""Recipe, lock and target to plan: pure, so that equal inputs give equal bytes.

target     the devices are given; nothing is asked of the machine
models     every model that a stage goes back to, with its numbers
stages     in the order in which they run (stages.py)
data       every source and blend that an edge of a stage names
origins    where each value of every block reached came from
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhfdsl.language.diagnostics import Diagnostic
from rlhfdsl.language.recipe import Block, Recipe, Reference
from rlhfdsl.language.schema import naming
from rlhfdsl.planning import checks, entries, onpolicy, scorers, stages, timing
from rlhfdsl.planning.hardware import Target
from rlhfdsl.planning.placing import Scope, base_of
from rlhfdsl.planning.problems import Problems

FORMAT_VERSION = "1.0"


def compile(
    recipe: Recipe,
    lock: Mapping[str, Any],
    target: Target,
    *,
    known: Mapping[str, Any] | None = None,
    fit: bool = False,
) -> tuple[dict[str, Any] | None, tuple[Diagnostic, ...]]:
    """The plan (None when there is an error) and what there is to say about it.

    lock: as `planning.lock.read` gives it; facts that it lacks are null in the plan, and what needs them too.
    known: numbers of models in directories by address, for those without facts (`checkpoints.numbers`).
    fit: take the fastest layout that fits in place of the ZeRO, offload, checkpointing and micro that are written.
    """
    problems = Problems(recipe)
    reached = _reached(recipe, target)
    longest = _longest(recipe)
    models = {
        block.address: entries.model(block, longest.get(block.address, 0), lock, known or {}, problems)
        for block in recipe.of_kind("model")
        if block.address in reached
    }
    for model in models.values():
        checks.pickled(problems, model)
    scope = Scope(recipe, lock, target, problems, models, fit)
    output = recipe.block["output"]
    planned = []
    for block in recipe.stages:
        make = onpolicy.on_policy if "actor" in block.blocks else stages.supervised
        planned.append(make(scope, block, f"{output}/{block.address.removeprefix('stage.')}"))
    checks.offload(problems, target, scope.asked)
    if problems.failed:
        return None, tuple(problems.found)
    return {
        "format_version": FORMAT_VERSION,
        "generator": f"rlhfdsl {_version()}",
        "recipe": {
            "name": recipe.name, "file": recipe.path.name, "language": recipe.block["language"],
            "seed": recipe.block["seed"], "determinism": recipe.block["determinism"], "output": output,
        },
        "target": target.as_dict(),
        "models": {address: model.entry for address, model in models.items()},
        "data": {b.address: entries.data(b) for b in recipe.of_kind("data") if b.address in reached},
        "blends": {b.address: entries.blend(b) for b in recipe.of_kind("blend") if b.address in reached},
        "stages": planned,
        "time": _time(planned, models, target),
        "origins": _origins(recipe, reached),
    }, tuple(problems.found)  # fmt: skip


def _time(planned: list[Any], models: Mapping[str, entries.Model], target: Target) -> dict[str, Any] | None:
    """Seconds and cost of the whole, what they rest on; None when no rate of the target is known."""
    dtypes = dict.fromkeys(model.dtype for model in models.values())
    rates = [found for dtype in dtypes if (found := target.rates(dtype)) is not None]
    if not rates:
        return None
    parts = [stage["time"]["seconds"] for stage in planned if stage["time"] is not None]
    whole = len(parts) == len(planned) and None not in parts
    seconds = round(float(sum(parts)), 3) if whole else None
    price = rates[0].price
    cost = None if seconds is None or price is None else round(seconds / 3600 * price * target.world, 2)
    notes = timing.assumptions(target, dtypes)
    notes += [
        f"{stage['address']}: at ZeRO 3 all weights are gathered anew for each token that is sampled"
        for stage in planned
        if "actor" in stage["engines"] and stage["engines"]["actor"]["zero"] == 3
        and stage["engines"]["actor"]["rollout"]["engine"] == "eager"
        and (stage["memory"]["engines"]["actor"]["parameters"] or 0) > _live(stage["engines"]["actor"])
    ]  # fmt: skip
    return {"seconds": seconds, "price": price, "cost": cost, "assumptions": notes}


def _live(engine: Mapping[str, Any]) -> int:
    """The parameters that an engine at ZeRO 3 may keep whole."""
    live: int = engine["deepspeed"]["zero_optimization"]["stage3_max_live_parameters"]
    return live


def _version() -> str:
    from rlhfdsl import __version__

    return __version__


def _walk(block: Block) -> Iterator[Block]:
    yield block
    for inner in block.blocks.values():
        yield from _walk(inner)


def _reached(recipe: Recipe, target: Target) -> set[str]:
    """The top-level blocks that a stage leads to, and the cluster that the target came from."""
    found = {target.origin} & recipe.blocks.keys()
    waiting = list(recipe.stages)
    while waiting:
        block = waiting.pop()
        if block.address in found:
            continue
        found.add(block.address)
        for inner in _walk(block):
            named = [s.value.address for s in inner.settings.values() if isinstance(s.value, Reference)]
            if inner.kind in naming():
                named += [f"{naming()[inner.kind]}.{name}" for name in inner.settings]
            waiting += [recipe.blocks[address] for address in named]
    return found


def _longest(recipe: Recipe) -> dict[str, int]:
    """The longest sequence that a stage gives to each model block."""
    out: dict[str, int] = {}
    for block in recipe.stages:
        users, judges = [block], []
        if "actor" in block.blocks:
            rollout = block.blocks["rollout"]
            length = rollout["prompt"] + rollout["answer"]
            users = [block.blocks[n] for n in ("actor", "critic", "ref") if n in block.blocks]
            judges = [source.model for source in scorers.of(recipe, block, {})]
        else:
            length = block["length"]
            users += [block.blocks["ref"]] if "ref" in block.blocks else []
        for reference in (*(user["model"] for user in users), *judges):
            if reference is not None:
                base = base_of(recipe, reference)
                out[base] = max(out.get(base, 0), length)
    return out


def _origins(recipe: Recipe, reached: set[str]) -> dict[str, Any]:
    """`stage.sft.lr` -> layer, place and text as written, for every value of the recipe and of the blocks
    reached."""
    blocks = [recipe.block, *(block for address, block in recipe.blocks.items() if address in reached)]
    return {
        f"{inner.address}.{name}": {
            "layer": setting.origin.layer, "where": setting.origin.where or None, "text": setting.origin.text,
        }
        for block in blocks
        for inner in _walk(block)
        for name, setting in inner.settings.items()
        if setting.value is not None or setting.origin.layer != "default"
    }  # fmt: skip
