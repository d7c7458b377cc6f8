"""What a stage reads, right before it is read and from end to end: local files and files of the hub against the lock,
models of earlier stages against what those noted."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import lock
from rlhfdsl.running import schedule, weights

Json = Mapping[str, Any]


def verify_inputs(plan: Json, stage: Json, base: Path) -> None:
    """Raise UserError for the first file of a stage's data and models that is not the one in the plan's facts.

    base: the folder that the plan's input paths are relative to. A plan without facts asks for nothing.
    """
    seen: dict[Path, lock.Facts] = {}
    for at, facts in _facts(plan, stage):
        for change in lock.changes(dict(facts), base, seen, whole=True):
            help = "put the locked file back, or plan again: the plan's counts are those of the locked one"
            if change.found is None:
                help = "put it back; the inputs of a saved plan lie beside it, or in the folder that --base names"
            raise UserError("E0725", str(change), at=at, place=str(base / change.name), help=help)
        for name, pins in (facts.get("hub") or {}).items():
            if at.startswith("model."):
                from rlhfdsl.models.hub import verify_model

                verify_model(name, pins, at)


def verify_made(plan: Json, stage: Json, fresh: Collection[str] = ()) -> None:
    """Raise UserError for the first file that is not what the stage wrote which made it, cut or gone for instance.

    fresh: stages that need no look, since this run has just made them.
    """
    read = {
        (source["stage"], source["artifact"])
        for source in (engine["weights"] for engine in stage["engines"].values())
        if "stage" in source and source["stage"] not in fresh
    }
    makers = {maker["address"]: maker for maker in plan["stages"]}
    for address, artifact in sorted(read):
        folder = Path(makers[address]["artifacts"][artifact])
        noted = (schedule.read_result(folder.parent) or {}).get("files") or {}
        then = {name: pin for name, pin in noted.items() if Path(name).parts[0] == folder.name}
        now = weights.hashes({"artifacts": {artifact: str(folder)}}, folder.parent)
        differs = weights.difference(then, {name: now[name] for name in then if name in now})
        if differs is not None:
            raise UserError(
                "E0799", f"{stage['address']} reads a model that is not as {address} left it: {differs}", at=address,
                place=str(folder.parent),
                help=f"delete {folder.parent} to make it again; if it was changed on purpose, copy it and name the "
                "copy in a `model` block",
            )  # fmt: skip


def _facts(plan: Json, stage: Json) -> Iterator[tuple[str, Json]]:
    """The facts of a stage's edges, scorers and models, with the address of what each is about."""
    models: dict[str, None] = {}
    for edge in stage["edges"].values():
        if edge is not None:
            models[edge["model"]] = None
            if edge["facts"] is not None:
                yield edge["source"], edge["facts"]
    for address, source in lock.scorers({"stages": [stage]}):
        if source["facts"] is not None:
            yield address, source["facts"]
    models |= dict.fromkeys(engine["base"] for engine in stage["engines"].values())
    for address in models:
        facts = plan["models"][address]["facts"]
        if facts is not None:
            yield address, facts
