"""A stage block becomes a stage of the plan: edges, engines, batch algebra, settings, memory, time, what it writes.

Each function reads from top to bottom in the order in which the plan decides: what comes in, whether it can
run here, how a batch splits over the devices, how the engines lie on them, how long the run is.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from rlhfdsl.language.recipe import Block
from rlhfdsl.planning import checks, course, timing
from rlhfdsl.planning.adapters import in_4_bits
from rlhfdsl.planning.batches import Misfit, run_length, share
from rlhfdsl.planning.cut import Lengths
from rlhfdsl.planning.entries import Wanted
from rlhfdsl.planning.layout import Part
from rlhfdsl.planning.placing import Scope, engine, memory_of, place, time_of, why
from rlhfdsl.planning.written import writes_of

Json = dict[str, Any]


def seed_of(recipe_seed: int, address: str) -> int:
    """The seed of a stage, 31 bits of a hash of the recipe's seed and the stage's address."""
    digest = hashlib.sha256(f"{recipe_seed} {address}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def supervised(scope: Scope, block: Block, output: str) -> Json | None:
    """An `sft`, `reward` or `dpo` stage; None when its batch does not split over the devices."""
    kind = block.type.removeprefix("stage.")
    role, head = ("reward", "scalar") if kind == "reward" else ("policy", "none")
    reader, item, sequences = ("sft", "sequences", 1) if kind == "sft" else ("pairs", "pairs", 2)
    at, batch, length = block.address, block["batch"], block["length"]
    model = scope.model(block["model"])
    loss = block["loss"] if kind == "sft" else None

    def reads(name: str) -> Json | None:
        if block[name] is None:
            return None
        return scope.edge(Wanted(block[name], kind, reader, length, "cut", loss), model)

    edges = {"train": reads("data"), "eval": reads("eval")}
    packed = in_4_bits(block)
    parts = [Part(role, role, at, block, block["model"], head, True, 0, sequences, length, in_4_bits=packed)]
    if kind == "dpo":
        parts += _reference(scope, block, length)
    for part in parts:
        other = scope.model(part.reference)
        checks.engine(scope.problems, scope.target, other, part)
        checks.context(scope.problems, other, length, f"{at}.length", f"sequences of {length} tokens")
        checks.same_tokens(scope.problems, model, other, (f"{at}.model", role), part)
    checks.parts_have_rows(scope.problems, at, edges)
    course.rows_are_whole(scope.problems, at, edges)

    per_rank = split(scope, f"{at}.batch", "batch", batch, item)
    if per_rank is None:
        return None
    work = timing.Supervised(lengths(edges["train"], length))
    placed = place(scope, at, [replace(part, per_rank=per_rank) for part in parts], None, work)
    if placed is None:
        return None
    only = placed.engines[0]

    rows = used(edges["train"])
    epochs = None if block["steps"] is not None else block["epochs"]
    run = None if rows is None else run_length(rows, batch, epochs or 1, block["steps"])
    updates = run.updates if run else block["steps"]
    if rows is not None and run is not None:
        checks.has_updates(scope.problems, scope.target, f"{at}.batch", run.per_epoch, rows, batch, item)
        course.tail(scope.problems, f"{at}.batch", run.dropped_tail, rows, batch, item)
    course.interval(scope.problems, block, updates, "updates")
    accumulation = per_rank // only.micro
    batches: Json = {
        "batch": batch, "world": scope.target.world, "per_rank": per_rank, "micro": only.micro,
        "accumulation": accumulation, "rows": rows, "epochs": epochs,
        "updates_per_epoch": run.per_epoch if run else None, "updates": updates,
        "dropped_tail": run.dropped_tail if run else None,
        "why": {
            "per_rank": f"batch {batch} / {scope.target.world} {scope.target.devices}",
            **why(scope, only, item),
            "accumulation": f"{per_rank} / micro {only.micro}",
            "updates": why_updates(run is not None, rows, batch, epochs, block["steps"]),
        },
    }  # fmt: skip
    every = block.blocks["every"]
    settings: Json = {"epochs": epochs, "steps": block["steps"], "length": length}
    own = {"sft": ("loss",), "reward": ("normalize",), "dpo": ("beta", "smoothing", "precompute")}
    settings |= {name: block[name] for name in own[kind]}
    settings |= {"log": every["log"], "eval_every": every["eval"], **checkpoints(block)}
    artifacts, writes = writes_of(f"{output}/model", model, only, role)
    needs = dict.fromkeys(part.reference.address for part in parts)
    return {
        "address": at, "kind": kind, "needs": list(needs), "output": output,
        "seed": seed_of(scope.recipe.block["seed"], at), "artifacts": artifacts,
        "edges": edges,
        "engines": {
            part.name: engine(
                scope, part, where, scope.model(part.reference), accumulation if part.trains else 1, updates
            )
            for part, where in zip(parts, placed.engines, strict=True)
        },
        "batch": batches, "settings": settings, "memory": memory_of(scope, placed),
        "time": time_of(scope, placed, work, updates), "writes": writes,
    }  # fmt: skip


def _reference(scope: Scope, block: Block, length: int) -> list[Part]:
    """The reference of a `dpo` stage: none where the policy itself reads all pairs before its first update."""
    ref, at = block.blocks.get("ref"), block.address
    reference = ref["model"] if ref is not None and ref["model"] is not None else block["model"]
    if block["precompute"] and reference == block["model"]:
        return []
    shares = "policy" if "lora" in block.blocks and reference == block["model"] else None
    packed = bool(shares) and in_4_bits(block)
    return [Part("ref", "ref", f"{at}.ref", ref, reference, "none", False, 0, 2, length, shares, packed)]


def split(scope: Scope, at: str, name: str, total: int, item: str) -> int | None:
    """What one device gets of a batch; None (and a report) when it does not come out even."""
    part = share(total, scope.target.world)
    if isinstance(part, Misfit):
        checks.does_not_split(scope.problems, scope.target, at, name, part, item)
        return None
    return part


def used(edge: Json | None) -> int | None:
    """The rows that an edge gives, by the locked facts."""
    if edge is None or edge["facts"] is None:
        return None
    return int(edge["facts"]["used"])


def lengths(edge: Json | None, length: int) -> Lengths:
    """How long sequences are by the locked facts, else as many tokens as they may have."""
    if edge is None or edge["facts"] is None:
        return Lengths(float(length))
    return Lengths.of_facts(edge["facts"]["lengths"])


def why_updates(known: bool, rows: int | None, batch: int, epochs: int | None, written: int | None) -> str:
    """Where the number of updates (or rollouts) comes from."""
    if written is not None:
        return "as written"
    if not known:
        return f"{epochs} x floor(rows / {batch}), known after lock"
    return f"{epochs} x floor({rows} / {batch})"


def checkpoints(block: Block) -> Json:
    """How often a stage saves, in updates (PPO: rollouts) or seconds, and how many of the checkpoints stay."""
    every = block.blocks["every"]["checkpoint"]
    # A duration is a float and a count an int: the language gives them so.
    interval = None if every is None else {"seconds": every} if isinstance(every, float) else {"updates": every}
    return {"checkpoint_every": interval, "keep": block["keep"]}
