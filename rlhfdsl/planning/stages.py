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
from rlhfdsl.planning.batches import Misfit, largest_divisor, run_length, share
from rlhfdsl.planning.entries import Wanted
from rlhfdsl.planning.fit import Rollout
from rlhfdsl.planning.placing import Part, Scope, engine, memory_of, place, time_of, why, writes_of

Json = dict[str, Any]


def seed_of(recipe_seed: int, address: str) -> int:
    """The seed of a stage, 31 bits of a hash of the recipe's seed and the stage's address."""
    digest = hashlib.sha256(f"{recipe_seed} {address}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def supervised(scope: Scope, block: Block, output: str) -> Json | None:
    """An `sft` or a `reward` stage; None when its batch does not split over the devices."""
    kind = block.type.removeprefix("stage.")
    role, head, item = ("policy", "none", "sequences") if kind == "sft" else ("reward", "scalar", "pairs")
    at, batch, length = block.address, block["batch"], block["length"]
    model = scope.model(block["model"])
    loss = block["loss"] if kind == "sft" else None

    def reads(name: str) -> Json | None:
        if block[name] is None:
            return None
        return scope.edge(Wanted(block[name], kind, kind, length, "cut", loss), model)

    edges = {"train": reads("data"), "eval": reads("eval")}
    part = Part(role, role, at, block, block["model"], head, True, 0, 1 if kind == "sft" else 2, length)
    checks.engine(scope.problems, scope.target, model, part)
    checks.context(scope.problems, model, length, f"{at}.length", f"sequences of {length} tokens")
    checks.parts_have_rows(scope.problems, at, edges)
    course.rows_are_whole(scope.problems, at, edges)

    per_rank = _split(scope, f"{at}.batch", "batch", batch, item)
    if per_rank is None:
        return None
    work = timing.Supervised(_mean(edges["train"], length))
    placed = place(scope, at, [replace(part, per_rank=per_rank)], None, work)
    if placed is None:
        return None
    (only,) = placed.engines

    rows = _used(edges["train"])
    epochs = None if block["steps"] is not None else block["epochs"]
    run = None if rows is None else run_length(rows, batch, epochs or 1, block["steps"])
    updates = run.updates if run else block["steps"]
    if run is not None:
        checks.has_updates(scope.problems, f"{at}.batch", run.per_epoch, rows or 0, batch, item)
        course.tail(scope.problems, f"{at}.batch", run.dropped_tail, rows or 0, batch, item)
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
            "updates": _why_updates(run is not None, rows, batch, epochs, block["steps"]),
        },
    }  # fmt: skip
    every = block.blocks["every"]
    settings: Json = {"epochs": epochs, "steps": block["steps"], "length": length}
    settings |= {"loss": block["loss"]} if kind == "sft" else {"normalize": block["normalize"]}
    settings |= {"log": every["log"], "eval_every": every["eval"]}
    artifacts, writes = writes_of(f"{output}/model", model, only, role)
    return {
        "address": at, "kind": kind, "needs": [block["model"].address], "output": output,
        "seed": seed_of(scope.recipe.block["seed"], at), "artifacts": artifacts,
        "edges": edges,
        "engines": {role: engine(scope, part, only, model, accumulation, updates)},
        "batch": batches, "settings": settings, "memory": memory_of(scope, placed),
        "time": time_of(scope, placed, work, updates), "writes": writes,
    }  # fmt: skip


def ppo(scope: Scope, block: Block, output: str) -> Json | None:
    """A `ppo` stage; None when its batches do not split over the devices."""
    at, world = block.address, scope.target.world
    actor, critic, reward = (block.blocks[name] for name in ("actor", "critic", "reward"))
    rollout, update, ptx = block.blocks["rollout"], block.blocks["update"], block.blocks.get("ptx")
    ref = block.blocks.get("ref")
    reference = ref["model"] if ref is not None and ref["model"] is not None else actor["model"]
    length = rollout["prompt"] + rollout["answer"]
    model = scope.model(actor["model"])
    shares = "actor" if "lora" in actor.blocks and reference == actor["model"] else None

    def prompts(name: str) -> Json | None:
        if block[name] is None:
            return None
        length, overlong = rollout["prompt"], rollout["overlong"]
        return scope.edge(Wanted(block[name], "ppo", "ppo", length, overlong, None), model)

    edges: Json = {"train": prompts("data"), "eval": prompts("eval")}
    if ptx is not None:
        edges["ptx"] = scope.edge(Wanted(ptx["data"], "ppo", "ptx", length, "cut", "all"), model)
    parts = [
        Part("actor", "policy", f"{at}.actor", actor, actor["model"], "none", True, 0, 1, length),
        Part("critic", "critic", f"{at}.critic", critic, critic["model"], "scalar", True, 0, 1, length),
        Part("ref", "ref", f"{at}.ref", ref, reference, "none", False, 0, 1, length, shares),
        Part("reward", "reward", f"{at}.reward", reward, reward["model"], "scalar", False, 0, 1, length),
    ]
    words = f"prompt {rollout['prompt']} + answer {rollout['answer']} = {length} tokens"
    for part in parts:
        other = scope.model(part.reference)
        checks.engine(scope.problems, scope.target, other, part)
        checks.context(scope.problems, other, length, f"{at}.rollout.prompt", words)
        if part.name != "actor":
            checks.same_tokens(scope.problems, model, other, f"{at}.actor.model", part)
    checks.parts_have_rows(scope.problems, at, edges)
    course.rows_are_whole(scope.problems, at, edges)

    course.held_policy(scope.problems, at, block, reference)

    sequences = rollout["batch"] * rollout["answers"]
    minibatch = update["minibatch"]
    split = [
        _split(scope, f"{at}.rollout.batch", "rollout.batch", rollout["batch"], "prompts"),
        _split(scope, f"{at}.update.minibatch", "update.minibatch", minibatch, "sequences"),
        _split(scope, f"{at}.ptx.batch", "ptx.batch", ptx["batch"], "sequences") if ptx is not None else 0,
    ]
    whole = checks.minibatches(scope.problems, at, rollout["batch"], rollout["answers"], minibatch)
    if None in split or whole is None:
        return None
    per_rank, train = sequences // world, minibatch // world
    ptx_rank = split[2] or 0
    sized = [replace(part, per_rank=train if part.trains else per_rank) for part in parts]
    work = timing.Ppo(
        sequences=per_rank, prompt=_mean(edges["train"], rollout["prompt"]), answer=rollout["answer"],
        updates=update["epochs"] * whole, passes=update["epochs"], ptx=ptx_rank, length=length,
    )  # fmt: skip
    placed = place(scope, at, sized, Rollout(per_rank, rollout["prompt"], length), work)
    if placed is None:
        return None
    engines = {p.need.name: p for p in placed.engines}

    rows = _used(edges["train"])
    epochs = None if block["rollouts"] is not None else block["epochs"]
    run = None if rows is None else run_length(rows, rollout["batch"], epochs or 1, block["rollouts"])
    rollouts = run.updates if run else block["rollouts"]
    each = update["epochs"] * whole
    updates = None if rollouts is None else rollouts * each
    late = critic["warmup_rollouts"]
    if run is not None:
        size = f"{at}.rollout.batch"
        checks.has_updates(scope.problems, size, run.per_epoch, rows or 0, rollout["batch"], "prompts")
        course.tail(scope.problems, size, run.dropped_tail, rows or 0, rollout["batch"], "prompts")
    course.critic_warmup(scope.problems, f"{at}.critic.warmup_rollouts", late, rollouts)
    course.interval(scope.problems, block, rollouts, "rollouts")
    own = {"actor": None if rollouts is None else max(0, rollouts - late) * each, "critic": updates}
    reasons: Json = {
        "per_rank": f"{rollout['batch']} prompts x {rollout['answers']} / {world} {scope.target.devices}",
        "minibatches": f"{sequences} sequences / minibatch {minibatch}",
        "updates_per_rollout": f"{update['epochs']} epochs x {whole} minibatches",
        "rollouts": _why_updates(run is not None, rows, rollout["batch"], epochs, block["rollouts"]),
    }
    for name, placement in engines.items():
        reasons |= {f"{name}.{key}": text for key, text in why(scope, placement, "sequences").items()}
    batches: Json = {
        "prompts": rollout["batch"], "answers": rollout["answers"], "sequences": sequences, "world": world,
        "per_rank": per_rank, "minibatch": minibatch, "minibatches": whole, "update_epochs": update["epochs"],
        "updates_per_rollout": each, "rollouts": rollouts, "updates": updates, "rows": rows,
        "dropped_tail": run.dropped_tail if run else None, "generate_per_rank": placed.generate,
        "ptx": _ptx_batch(ptx["batch"], ptx_rank, engines["actor"].micro) if ptx is not None else None,
        "why": reasons,
    }  # fmt: skip
    left = [writes_of(f"{output}/actor", model, engines["actor"], "policy")]
    if actor["ema"] is not None:
        left.append(writes_of(f"{output}/actor", model, engines["actor"], "ema", "-ema"))
    left.append(writes_of(f"{output}/critic", scope.model(critic["model"]), engines["critic"], "critic"))
    artifacts = {name: path for made, _ in left for name, path in made.items()}
    writes = [entry for _, entries in left for entry in entries]
    needs = dict.fromkeys(part.reference.address for part in parts)
    return {
        "address": at, "kind": "ppo", "needs": list(needs), "output": output,
        "seed": seed_of(scope.recipe.block["seed"], at), "artifacts": artifacts, "edges": edges,
        "engines": {
            part.name: engine(
                scope, part, engines[part.name], scope.model(part.reference),
                train // engines[part.name].micro if part.trains else 1, own.get(part.name),
            )
            for part in parts
        },
        "batch": batches, "settings": _ppo_settings(block, rollouts, epochs),
        "memory": memory_of(scope, placed), "time": time_of(scope, placed, work, rollouts), "writes": writes,
    }  # fmt: skip


def _ppo_settings(block: Block, rollouts: int | None, epochs: int | None) -> Json:
    rollout, update, kl, every = (block.blocks[name] for name in ("rollout", "update", "kl", "every"))
    reward, ptx = block.blocks["reward"], block.blocks.get("ptx")
    estimator = kl["estimator"]
    if estimator == "auto":
        estimator = "k1" if kl["apply"] == "reward" else "k3"
    return {
        "epochs": epochs,
        "rollouts": rollouts,
        "rollout": {name: s.value for name, s in rollout.settings.items()},
        "update": {name: s.value for name, s in update.settings.items()},
        "kl": {
            "coef": kl["coef"], "apply": kl["apply"], "estimator": estimator, "target": kl["target"],
            "horizon": kl["horizon"] if kl["target"] is not None else None,
        },
        "reward": {name: reward[name] for name in ("clip", "normalize", "missing_eos")},
        "ptx": None if ptx is None else {"weight": ptx["weight"], "batch": ptx["batch"]},
        "critic": {"warmup_rollouts": block.blocks["critic"]["warmup_rollouts"]},
        "log": every["log"], "eval_every": every["eval"], "samples_every": every["samples"],
    }  # fmt: skip


def _split(scope: Scope, at: str, name: str, total: int, item: str) -> int | None:
    part = share(total, scope.target.world)
    if isinstance(part, Misfit):
        checks.does_not_split(scope.problems, scope.target, at, name, part, item)
        return None
    return part


def _ptx_batch(batch: int, per_rank: int, micro: int) -> Json:
    """The ptx loss runs through the actor in micro batches no larger than the actor's."""
    return {"batch": batch, "per_rank": per_rank, "micro": largest_divisor(per_rank, micro)}


def _used(edge: Json | None) -> int | None:
    if edge is None or edge["facts"] is None:
        return None
    return int(edge["facts"]["used"])


def _mean(edge: Json | None, length: int) -> float:
    """Mean tokens of a sequence by the locked facts, else as many as it may have."""
    if edge is None or edge["facts"] is None:
        return float(length)
    return float(edge["facts"]["lengths"]["mean"])


def _why_updates(known: bool, rows: int | None, batch: int, epochs: int | None, written: int | None) -> str:
    if written is not None:
        return "as written"
    if not known:
        return f"{epochs} x floor(rows / {batch}), known after lock"
    return f"{epochs} x floor({rows} / {batch})"
