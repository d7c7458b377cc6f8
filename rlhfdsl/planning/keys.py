"""What a stage's result hangs on, as one key, and what has changed when two keys differ.

Three kinds of values stand in a stage of the plan:
  decisive   what is learned, from what and how: another value gives another result, and the stage runs anew
  layout     how the engines lie on the ranks: another value gives the same learning, and a checkpoint does not fit
  the rest   micro batches, gradient checkpointing, intervals, estimates, folders: neither

A key is a hash over the decisive values and the keys of the stages that this one needs, so a change reaches what
follows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from rlhfdsl.planning import escape
from rlhfdsl.planning.lock import SEMANTICS

Json = dict[str, Any]

# Settings of a stage that leave its result alone.
_INTERVALS = ("log", "eval_every", "samples_every", "checkpoint_every", "keep")
_BATCH = ("why", "world", "per_rank", "micro", "accumulation", "generate_per_rank")
_ENGINE = ("zero", "offload", "nvme", "gradient_checkpointing", "packing", "micro", "accumulation", "deepspeed")
_DEEPSPEED = (
    *("train_batch_size", "train_micro_batch_size_per_gpu"),
    *("gradient_accumulation_steps", "managed_gradient_accumulation"),
)


def keys(plan: Json) -> dict[str, str]:
    """The key of every stage of a plan, by address."""
    found: dict[str, str] = {}
    for stage in plan["stages"]:
        found[stage["address"]] = digest(decisive(plan, stage, found))
    return found


def decisive(plan: Json, stage: Json, upstream: Mapping[str, str]) -> Json:
    """Everything that decides what a stage makes. upstream: the keys of the stages before it."""
    batch = {name: value for name, value in stage["batch"].items() if name not in _BATCH}
    if batch.get("ptx") is not None:
        batch["ptx"] = {"batch": batch["ptx"]["batch"]}
    return {
        "semantics": SEMANTICS,
        "kind": stage["kind"],
        "seed": stage["seed"],
        "settings": {name: value for name, value in stage["settings"].items() if name not in _INTERVALS},
        "batch": batch,
        "engines": {name: _learning(engine) for name, engine in stage["engines"].items()},
        "edges": stage["edges"],
        "needs": {name: upstream.get(name) or plan["models"][name] for name in stage["needs"]},
    }


def layout(plan: Json, stage: Json) -> Json:
    """How the engines that train lie on the ranks, which the files of a checkpoint follow."""
    return {
        "world": plan["target"]["world"],
        "device": plan["target"]["device"],
        "engines": {
            name: {"zero": engine["zero"], "offload": engine["offload"]}
            for name, engine in stage["engines"].items()
            if engine["trains"]
        },
    }


def stamp(plan: Json, stage: Json) -> Json:
    """What a checkpoint or a result of a stage is marked with: its key, what the key is of, and the layout."""
    found = keys(plan)
    values = decisive(plan, stage, found)
    return {"stage": stage["address"], "key": digest(values), "decisive": values, "layout": layout(plan, stage)}


def digest(values: Json) -> str:
    """The key of decisive values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _learning(engine: Json) -> Json:
    """An engine without what lays it out."""
    values = {name: value for name, value in engine.items() if name not in _ENGINE}
    given = engine["deepspeed"]
    config = escape.learned({name: value for name, value in given.items() if name not in _DEEPSPEED})
    if engine["trains"]:
        parameters = config.pop("optimizer")["params"]
        values["optimizer"] = {k: v for k, v in parameters.items() if k not in ("torch_adam", "fused")}
        values["optimizer"]["grad_clip"] = config.pop("gradient_clipping")
    return values | {"deepspeed": config}


def changes(stage: Json, before: Json, now: Json, written: Mapping[str, Any]) -> list[str]:
    """What differs between two stamps' `decisive` values, as `stage.ppo.kl.coef: 0.05, now 0.5`.

    written: the addresses of the recipe's values (a plan's `origins`). What the writer wrote comes before what was
    derived from it; a stage that is needed is named alone.
    """
    old, new = dict(leaves(before)), dict(leaves(now))
    named: list[str] = []
    derived: list[str] = []
    for path in dict.fromkeys((*new, *old)):
        a, b = old.get(path), new.get(path)
        if a == b:
            continue
        address = _address(stage, path)
        if path.startswith("needs.stage."):
            named.insert(0, f"{path.removeprefix('needs.')} changed")
        elif path.startswith("edges."):
            derived.append(f"the rows of `{path.split('.')[1]}` changed")
        elif path == "seed":
            named.append("recipe.seed changed")  # the stage's own is derived from it
        elif address in written:
            named.append(f"{address}: {_text(a)}, now {_text(b)}")
        else:
            derived.append(f"{address}: {_text(a)}, now {_text(b)}")
    return list(dict.fromkeys(named or derived))


def _address(stage: Json, path: str) -> str:
    """The address in the recipe of a decisive value, where it has one."""
    at, words = str(stage["address"]), path.split(".")
    match words[0]:
        case "needs":
            return ".".join(word for word in words[1:] if word not in ("arch",))
        case "engines":
            engine, *rest = words[1:]
            rest = ["schedule"] if rest == ["schedule", "kind"] else rest
            rest = rest[1:] if rest[0] in ("schedule", "optimizer") and len(rest) > 1 else rest
            inner = [] if "policy" in stage["engines"] or stage["kind"] == "reward" else [engine]
            return ".".join((at, *inner, *rest))
        case "settings" | "batch":
            return ".".join((at, *words[1:]))
    return ".".join((at, *words))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dictionaries with their dotted paths; an empty dictionary is a value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
