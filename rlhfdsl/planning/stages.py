"""A stage block becomes a stage of the plan: edges, engines, batch algebra, settings, memory, what it writes.

Each function reads from top to bottom in the order in which the plan decides: what comes in, whether it can
run here, how a batch splits over the devices, how the engines lie on them, how long the run is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhfdsl.language.recipe import Block, Recipe, Reference
from rlhfdsl.planning import checks, deepspeed_config, entries
from rlhfdsl.planning.batches import Misfit, largest_divisor, run_length, share, warmup_updates
from rlhfdsl.planning.entries import Model, Wanted
from rlhfdsl.planning.fit import Fit, Need, Placement, Rollout, fit, token_limit
from rlhfdsl.planning.hardware import Target
from rlhfdsl.planning.memory import BYTES
from rlhfdsl.planning.problems import Problems

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scope:
    """What every stage of a recipe is planned with."""

    recipe: Recipe
    lock: Mapping[str, Any]
    target: Target
    problems: Problems
    models: Mapping[str, Model]

    def model(self, reference: Reference) -> Model:
        """The model whose architecture and tokenizer the weights behind a reference have."""
        return self.models[base_of(self.recipe, reference)]

    def edge(self, want: Wanted, model: Model) -> Json:
        return entries.edge(want, model, self.recipe, self.lock)


@dataclass(frozen=True, slots=True)
class Part:
    """One engine of a stage before it is placed. `group` is the block with its settings; `at` its address."""

    name: str
    role: str
    at: str
    group: Block | None
    reference: Reference
    head: str
    trains: bool
    per_rank: int
    sequences: int
    length: int


def base_of(recipe: Recipe, reference: Reference) -> str:
    """The address of the model block that a policy or reward model goes back to."""
    block = recipe.blocks[reference.address]
    while block.kind == "stage":
        inner = block
        if block.type == "stage.ppo":
            inner = block.blocks["critic" if reference.facet == "critic" else "actor"]
        reference = inner["model"]
        block = recipe.blocks[reference.address]
    return block.address


def weights_of(recipe: Recipe, reference: Reference) -> Json:
    """Where an engine's weights come from: a model block or an artifact of a stage."""
    block = recipe.blocks[reference.address]
    if block.kind == "model":
        return {"model": block.address}
    artifact = reference.facet or {"stage.reward": "reward"}.get(block.type, "policy")
    return {"stage": block.address, "artifact": artifact}


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

    per_rank = _split(scope, f"{at}.batch", "batch", batch, item)
    if per_rank is None:
        return None
    placed = _fit(scope, at, [replace(part, per_rank=per_rank)], None)
    if placed is None:
        return None
    (engine,) = placed.engines

    rows = _used(edges["train"])
    epochs = None if block["steps"] is not None else block["epochs"]
    run = None if rows is None else run_length(rows, batch, epochs or 1, block["steps"])
    updates = run.updates if run else block["steps"]
    if run is not None:
        checks.has_updates(scope.problems, f"{at}.batch", run.per_epoch, rows or 0, batch, item)
        checks.tail(scope.problems, f"{at}.batch", run.dropped_tail, rows or 0, batch, item)
    checks.interval(scope.problems, block, updates, "updates")
    accumulation = per_rank // engine.micro
    batches: Json = {
        "batch": batch, "world": scope.target.world, "per_rank": per_rank, "micro": engine.micro,
        "accumulation": accumulation, "rows": rows, "epochs": epochs,
        "updates_per_epoch": run.per_epoch if run else None, "updates": updates,
        "dropped_tail": run.dropped_tail if run else None,
        "why": {
            "per_rank": f"batch {batch} / {scope.target.world} {scope.target.devices}",
            **_why(engine, item),
            "accumulation": f"{per_rank} / micro {engine.micro}",
            "updates": _why_updates(run is not None, rows, batch, epochs, block["steps"]),
        },
    }  # fmt: skip
    every = block.blocks["every"]
    settings: Json = {"epochs": epochs, "steps": block["steps"], "length": length}
    settings |= {"loss": block["loss"]} if kind == "sft" else {"normalize": block["normalize"]}
    settings |= {"log": every["log"], "eval_every": every["eval"]}
    return {
        "address": at, "kind": kind, "needs": [block["model"].address], "output": output,
        "seed": seed_of(scope.recipe.block["seed"], at), "artifacts": {role: f"{output}/model"},
        "edges": edges,
        "engines": {role: _engine(scope, part, engine, model, accumulation, updates)},
        "batch": batches, "settings": settings, "memory": _memory(scope, placed),
        "writes": [_write(f"{output}/model", model, head)],
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
        Part("ref", "ref", f"{at}.ref", ref, reference, "none", False, 0, 1, length),
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
    placed = _fit(scope, at, sized, Rollout(per_rank, length))
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
        checks.tail(scope.problems, size, run.dropped_tail, rows or 0, rollout["batch"], "prompts")
    checks.critic_warmup(scope.problems, f"{at}.critic.warmup_rollouts", late, rollouts)
    checks.interval(scope.problems, block, rollouts, "rollouts")
    own = {"actor": None if rollouts is None else max(0, rollouts - late) * each, "critic": updates}
    why: Json = {
        "per_rank": f"{rollout['batch']} prompts x {rollout['answers']} / {world} {scope.target.devices}",
        "minibatches": f"{sequences} sequences / minibatch {minibatch}",
        "updates_per_rollout": f"{update['epochs']} epochs x {whole} minibatches",
        "rollouts": _why_updates(run is not None, rows, rollout["batch"], epochs, block["rollouts"]),
    }
    for name, engine in engines.items():
        why |= {f"{name}.{key}": text for key, text in _why(engine, "sequences").items()}
    batches: Json = {
        "prompts": rollout["batch"], "answers": rollout["answers"], "sequences": sequences, "world": world,
        "per_rank": per_rank, "minibatch": minibatch, "minibatches": whole, "update_epochs": update["epochs"],
        "updates_per_rollout": each, "rollouts": rollouts, "updates": updates, "rows": rows,
        "dropped_tail": run.dropped_tail if run else None, "generate_per_rank": placed.generate,
        "ptx": _ptx_batch(ptx["batch"], ptx_rank, engines["actor"].micro) if ptx is not None else None,
        "why": why,
    }  # fmt: skip
    writes = [_write(f"{output}/actor", model, "none")]
    artifacts = {"policy": f"{output}/actor"}
    if actor["ema"] is not None:
        artifacts["ema"] = f"{output}/actor-ema"
        writes.append(_write(f"{output}/actor-ema", model, "none"))
    artifacts["critic"] = f"{output}/critic"
    writes.append(_write(f"{output}/critic", scope.model(critic["model"]), "scalar"))
    needs = dict.fromkeys(part.reference.address for part in parts)
    return {
        "address": at, "kind": "ppo", "needs": list(needs), "output": output,
        "seed": seed_of(scope.recipe.block["seed"], at), "artifacts": artifacts, "edges": edges,
        "engines": {
            part.name: _engine(
                scope, part, engines[part.name], scope.model(part.reference),
                train // engines[part.name].micro if part.trains else 1, own.get(part.name),
            )
            for part in parts
        },
        "batch": batches, "settings": _ppo_settings(block, rollouts, epochs),
        "memory": _memory(scope, placed), "writes": writes,
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


def _fit(scope: Scope, at: str, parts: Sequence[Part], rollout: Rollout | None) -> Fit | None:
    """Place the engines of a stage; None (and a report) when a written micro batch does not divide."""
    needs = []
    for part in parts:
        parallel = _parallel(scope.recipe, part)
        micro = None if parallel is None or parallel["micro"] == "auto" else parallel["micro"]
        if micro is not None and part.per_rank % micro:
            checks.micro(scope.problems, f"{_address(parallel)}.micro", part, micro)
            return None
        needs.append(_need(scope, part, parallel, micro))
    placed = fit(needs, rollout, scope.target)
    checks.memory(scope.problems, scope.target, at, placed, rollout)
    return placed


def _address(block: Block | None) -> str:
    assert block is not None
    return block.address


def _parallel(recipe: Recipe, part: Part) -> Block | None:
    if part.group is None or part.group["parallel"] is None:
        return None
    return recipe.blocks[part.group["parallel"].address]


def _need(scope: Scope, part: Part, parallel: Block | None, micro: int | None) -> Need:
    model = scope.model(part.reference)
    zero: int | None = None
    offload, checkpointing = "off", None if part.trains else False
    if parallel is not None:
        zero = None if parallel["zero"] == "auto" else parallel["zero"]
        offload = parallel["offload"] or "off"
        if part.trains and parallel["gradient_checkpointing"] != "auto":
            checkpointing = parallel["gradient_checkpointing"]
    if not part.trains:
        # Stages 1 and 2 shard gradients and optimizer states, which an engine that only infers does not have:
        # what is written there is for the engines that train.
        zero = None if zero in (1, 2) else zero
        offload = "params" if offload in ("params", "both") and zero in (3, None) else "off"
    ema = part.name == "actor" and part.group is not None and part.group["ema"] is not None
    return Need(
        part.name, model.shape, model.count(part.head), part.head, model.dtype,
        model.entry["attention"] == "eager", part.trains, part.per_rank, part.sequences, part.length, zero,
        offload, checkpointing, micro, ema,
    )  # fmt: skip


def _engine(
    scope: Scope, part: Part, placed: Placement, model: Model, accumulation: int, updates: int | None
) -> Json:
    group, target = part.group, scope.target
    schedule = optimizer = None
    if part.trains and group is not None:
        warmup = group["warmup"]
        known = isinstance(warmup, int) or updates is not None
        schedule = {
            "kind": group["schedule"], "lr": group["lr"],
            "warmup": warmup_updates(warmup, updates or 0) if known else None, "updates": updates,
        }  # fmt: skip
        checks.schedule(scope.problems, part.at, warmup, schedule)
        optimizer = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    return {
        "role": part.role, "trains": part.trains, "weights": weights_of(scope.recipe, part.reference),
        "base": model.address, "head": part.head, "dtype": model.dtype, "attention": model.entry["attention"],
        "dropout": group["dropout"] if part.trains and group is not None else 0.0,
        "gradient_checkpointing": placed.checkpointing, "zero": placed.zero, "offload": placed.need.offload,
        "micro": placed.micro, "accumulation": accumulation,
        "ema": group["ema"] if part.name == "actor" and group is not None else None, "schedule": schedule,
        "deepspeed": deepspeed_config.config(
            dtype=model.dtype, zero=placed.zero, offload=placed.need.offload, device=target.device,
            world=target.world, micro=placed.micro, accumulation=accumulation, parameters=placed.need.count,
            trains=part.trains, optimizer=optimizer,
            grad_clip=group["grad_clip"] if part.trains and group is not None else 0.0,
        ),
    }  # fmt: skip


def _ptx_batch(batch: int, per_rank: int, micro: int) -> Json:
    """The ptx loss runs through the actor in micro batches no larger than the actor's."""
    return {"batch": batch, "per_rank": per_rank, "micro": largest_divisor(per_rank, micro)}


def _memory(scope: Scope, placed: Fit) -> Json:
    engines = {}
    for p in placed.engines:
        s = p.states
        engines[p.need.name] = {
            "parameters": p.need.count,
            "weights": s.weights if s else None, "gradients": s.gradients if s else None,
            "optimizer": s.optimizer if s else None, "total": s.total if s else None,
            "working": p.working, "host": s.host if s else None,
        }  # fmt: skip
    return {
        "engines": engines, "states": placed.states, "generate": placed.cache, "total": placed.total,
        "available": scope.target.memory, "fits": placed.fits,
    }  # fmt: skip


def _write(path: str, model: Model, head: str) -> Json:
    count = model.count(head)
    return {"path": path, "bytes": None if count is None else count * BYTES[model.dtype]}


def _used(edge: Json | None) -> int | None:
    if edge is None or edge["facts"] is None:
        return None
    return int(edge["facts"]["used"])


def _why(placed: Placement, item: str) -> Json:
    """Where an engine's micro batch, ZeRO stage and checkpointing come from."""
    need = placed.need
    if need.micro is not None:
        micro = f"as written; {need.per_rank} / {need.micro} = {need.per_rank // need.micro}"
    else:
        limit = token_limit(placed.room)
        fits = "" if placed.room is None else f" and {placed.room / 2**30:.1f} GiB free"
        micro = f"derived: largest divisor of {need.per_rank} within {limit:,} tokens".replace(",", " ")
        micro += f" ({need.tokens} for each of the {item}){fits}"
    out = {"micro": micro, "zero": "as written" if need.zero is not None else placed.reason}
    if need.trains:
        derived = (
            "derived: on, else it does not fit" if placed.checkpointing else "derived: off, it fits without"
        )
        out["gradient_checkpointing"] = "as written" if need.checkpointing is not None else derived
    return out


def _why_updates(known: bool, rows: int | None, batch: int, epochs: int | None, written: int | None) -> str:
    if written is not None:
        return "as written"
    if not known:
        return f"{epochs} x floor(rows / {batch}), known after lock"
    return f"{epochs} x floor({rows} / {batch})"
