"""A stage that learns from its own answers (`ppo`, `grpo`, `rloo`) becomes a stage of the plan.

As stages.py; the batch is counted in prompts of a rollout, the answers to them, and minibatches of the update.
"""

from __future__ import annotations

from dataclasses import replace

from rlhfdsl.language.recipe import Block
from rlhfdsl.planning import capabilities, checks, course, scorers, timing
from rlhfdsl.planning.adapters import in_4_bits
from rlhfdsl.planning.batches import largest_divisor, run_length
from rlhfdsl.planning.entries import Wanted
from rlhfdsl.planning.layout import Part, Rollout
from rlhfdsl.planning.placing import Scope, engine, memory_of, place, sampler, time_of, why
from rlhfdsl.planning.stages import Json, checkpoints, lengths, seed_of, split, used, why_updates
from rlhfdsl.planning.written import writes_of


def on_policy(scope: Scope, block: Block, output: str) -> Json | None:
    """A `ppo`, `grpo` or `rloo` stage; None when its batches do not split over the devices."""
    at, world, kind = block.address, scope.target.world, block.type.removeprefix("stage.")
    actor, reward, critic = block.blocks["actor"], block.blocks["reward"], block.blocks.get("critic")
    sources = scorers.of(scope.recipe, block, scope.lock)
    rollout, update, ptx = block.blocks["rollout"], block.blocks["update"], block.blocks.get("ptx")
    ref = block.blocks.get("ref")
    reference = ref["model"] if ref is not None and ref["model"] is not None else actor["model"]
    length = rollout["prompt"] + rollout["answer"]
    model = scope.model(actor["model"])
    shares = "actor" if "lora" in actor.blocks and reference == actor["model"] else None
    packed = in_4_bits(actor)

    def prompts(name: str) -> Json | None:
        if block[name] is None:
            return None
        length, overlong = rollout["prompt"], rollout["overlong"]
        return scope.edge(Wanted(block[name], kind, "prompts", length, overlong, None), model)

    edges: Json = {"train": prompts("data"), "eval": prompts("eval")}
    if ptx is not None:
        edges["ptx"] = scope.edge(Wanted(ptx["data"], kind, "ptx", length, "cut", "all"), model)
    parts = [
        Part("actor", "policy", f"{at}.actor", actor, actor["model"], "none", True, 0, 1, length, in_4_bits=packed),
        Part("ref", "ref", f"{at}.ref", ref, reference, "none", False, 0, 1, length, shares, packed and bool(shares)),
    ]
    parts += [
        Part(source.entry["engine"], "reward", source.at, reward, source.model, "scalar", False, 0, 1, length)
        for source in sources
        if source.model is not None
    ]
    if critic is not None:
        judge = Part("critic", "critic", f"{at}.critic", critic, critic["model"], "scalar", True, 0, 1, length)
        parts.insert(1, replace(judge, in_4_bits=in_4_bits(critic)))
    words = f"prompt {rollout['prompt']} + answer {rollout['answer']} = {length} tokens"
    for part in parts:
        other = scope.model(part.reference)
        checks.engine(scope.problems, scope.target, other, part)
        checks.context(scope.problems, other, length, f"{at}.rollout.prompt", words)
        if part.name != "actor":
            checks.same_tokens(scope.problems, model, other, (f"{at}.actor.model", "actor"), part)
    checks.same_ids(scope.problems, model, scope.model(reference), at)
    checks.parts_have_rows(scope.problems, at, edges)
    course.rows_are_whole(scope.problems, at, edges)

    course.held_policy(scope.problems, at, block, reference)

    sequences = rollout["batch"] * rollout["answers"]
    minibatch = update["minibatch"]
    ranks = [
        split(scope, f"{at}.rollout.batch", "rollout.batch", rollout["batch"], "prompts"),
        split(scope, f"{at}.update.minibatch", "update.minibatch", minibatch, "sequences"),
        split(scope, f"{at}.ptx.batch", "ptx.batch", ptx["batch"], "sequences") if ptx is not None else 0,
    ]
    whole = checks.minibatches(scope.problems, at, rollout["batch"], rollout["answers"], minibatch)
    if None in ranks or whole is None:
        return None
    per_rank, train, each = sequences // world, minibatch // world, update["epochs"] * whole
    ptx_rank = ranks[2] or 0
    sized = [replace(part, per_rank=train if part.trains else per_rank) for part in parts]
    wanted, _ = capabilities.choose(
        model.shape.type if model.shape else "", 0, scope.target.device, rollout["engine"]
    )
    work = timing.OnPolicy(
        sequences=per_rank, prompts=lengths(edges["train"], rollout["prompt"]), answer=rollout["answer"],
        updates=each, passes=update["epochs"], ptx=ptx_rank, length=length,
    )  # fmt: skip
    tensor = course.tensor(scope.problems, scope.target, at, rollout["tensor"], model.shape)
    tensor = course.whole_base(scope.problems, at, tensor, packed)
    sampling = Rollout(
        per_rank, rollout["prompt"], length, wanted, rollout["engine"] == "auto", rollout["free_cache"], tensor
    )  # fmt: skip
    placed = place(scope, at, sized, sampling, work)
    if placed is None:
        return None
    engines = {p.need.name: p for p in placed.engines}

    rows = used(edges["train"])
    epochs = None if block["rollouts"] is not None else block["epochs"]
    run = None if rows is None else run_length(rows, rollout["batch"], epochs or 1, block["rollouts"])
    rollouts = run.updates if run else block["rollouts"]
    updates = None if rollouts is None else rollouts * each
    late = critic["warmup_rollouts"] if critic is not None else 0
    if rows is not None and run is not None:
        size = f"{at}.rollout.batch"
        checks.has_updates(scope.problems, scope.target, size, run.per_epoch, rows, rollout["batch"], "prompts")
        course.tail(scope.problems, size, run.dropped_tail, rows, rollout["batch"], "prompts")
    course.critic_warmup(scope.problems, f"{at}.critic.warmup_rollouts", late, rollouts)
    course.interval(scope.problems, block, rollouts, "rollouts")
    own = {"actor": None if rollouts is None else max(0, rollouts - late) * each, "critic": updates}
    reasons: Json = {
        "per_rank": f"{rollout['batch']} prompts x {rollout['answers']} / {world} {scope.target.devices}",
        "minibatches": f"{sequences} sequences / minibatch {minibatch}",
        "updates_per_rollout": f"{update['epochs']} epochs x {whole} minibatches",
        "rollouts": why_updates(run is not None, rows, rollout["batch"], epochs, block["rollouts"]),
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
    if critic is not None:
        left.append(writes_of(f"{output}/critic", scope.model(critic["model"]), engines["critic"], "critic"))
    artifacts = {name: path for made, _ in left for name, path in made.items()}
    writes = [entry for _, entries in left for entry in entries]
    needs = dict.fromkeys(part.reference.address for part in parts)
    built = {
        part.name: engine(
            scope, part, engines[part.name], scope.model(part.reference),
            train // engines[part.name].micro if part.trains else 1, own.get(part.name),
        )
        for part in parts
    }
    built["actor"]["rollout"] = sampler(model, placed, scope.target, rollout, per_rank)
    course.rollout_engine(scope.problems, at, rollout["engine"], tensor, built["actor"]["rollout"])
    return {
        "address": at, "kind": kind, "needs": list(needs), "output": output,
        "seed": seed_of(scope.recipe.block["seed"], at), "artifacts": artifacts, "edges": edges,
        "engines": built,
        "batch": batches, "settings": _settings(block, sources, rollouts, epochs),
        "memory": memory_of(scope, placed), "time": time_of(scope, placed, work, rollouts), "writes": writes,
    }  # fmt: skip


def _settings(block: Block, sources: list[scorers.Source], rollouts: int | None, epochs: int | None) -> Json:
    rollout, update, kl, every = (block.blocks[name] for name in ("rollout", "update", "kl", "every"))
    reward, ptx, critic = block.blocks["reward"], block.blocks.get("ptx"), block.blocks.get("critic")
    overlong = reward.blocks.get("overlong")
    estimator = kl["estimator"]
    if estimator == "auto":
        estimator = "k1" if kl["apply"] == "reward" else "k3"
    return {
        "epochs": epochs,
        "rollouts": rollouts,
        "rollout": {
            name: s.value for name, s in rollout.settings.items() if name not in ("engine", "tensor", "free_cache")
        },
        "update": {name: s.value for name, s in update.settings.items()},
        "kl": {
            "coef": kl["coef"], "apply": kl["apply"], "estimator": estimator, "target": kl["target"],
            "horizon": kl["horizon"] if kl["target"] is not None else None,
        },
        "reward": {
            **{name: reward[name] for name in ("clip", "normalize", "missing_eos")},
            "overlong": None if overlong is None else {name: overlong[name] for name in ("buffer", "penalty")},
            "sources": [source.entry for source in sources],
        },
        "ptx": None if ptx is None else {"weight": ptx["weight"], "batch": ptx["batch"]},
        "critic": None if critic is None else {"warmup_rollouts": critic["warmup_rollouts"]},
        "log": every["log"], "eval_every": every["eval"], "samples_every": every["samples"], **checkpoints(block),
    }  # fmt: skip


def _ptx_batch(batch: int, per_rank: int, micro: int) -> Json:
    """The ptx loss runs through the actor in micro batches no larger than the actor's."""
    return {"batch": batch, "per_rank": per_rank, "micro": largest_divisor(per_rank, micro)}
