"""The engines of a stage as the plan holds them: what each needs, where it lies, its DeepSpeed configuration, and the
memory, time and reasons of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlhfdsl.language.recipe import Block, Recipe, Reference
from rlhfdsl.planning import (
    adapters,
    advice,
    capabilities,
    checks,
    course,
    deepspeed_config,
    entries,
    escape,
    nvme,
    shards,
    timing,
)
from rlhfdsl.planning.adapters import Lora
from rlhfdsl.planning.batches import warmup_updates
from rlhfdsl.planning.catalog import largest_layer
from rlhfdsl.planning.entries import Model, Wanted
from rlhfdsl.planning.fit import fit, token_limit
from rlhfdsl.planning.hardware import Target
from rlhfdsl.planning.layout import Fit, Need, Part, Placement, Rollout
from rlhfdsl.planning.problems import Problems
from rlhfdsl.planning.timing import Work

Json = dict[str, Any]
FASTEST = "derived: the fastest that fits"


@dataclass(frozen=True, slots=True)
class Scope:
    """What every stage of a recipe is planned with. fit: lay it out the fastest way, whatever is written.

    asked: what every engine so far asks of a device.
    """

    recipe: Recipe
    lock: Mapping[str, Any]
    target: Target
    problems: Problems
    models: Mapping[str, Model]
    fit: bool = False
    asked: list[tuple[Part, Need]] = field(default_factory=list)

    def model(self, reference: Reference) -> Model:
        """The model whose architecture and tokenizer the weights behind a reference have."""
        return self.models[base_of(self.recipe, reference)]

    def edge(self, want: Wanted, model: Model) -> Json:
        return entries.edge(want, model, self.recipe, self.lock)


def base_of(recipe: Recipe, reference: Reference) -> str:
    """The address of the model block that a policy or reward model goes back to."""
    block = recipe.blocks[reference.address]
    while block.kind == "stage":
        inner = block
        if "actor" in block.blocks:
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


def place(scope: Scope, at: str, parts: Sequence[Part], rollout: Rollout | None, work: Work) -> Fit | None:
    """Place the engines of a stage; None (and a report) when a written micro batch does not divide."""
    needs = []
    for part in parts:
        course.adapters(scope.problems, part, scope.model(part.reference), lora_of(scope, part))
        course.whole_blocks(scope.problems, part, scope.model(part.reference))
        course.rounded_again(scope.problems, part)
        parallel = parallel_of(scope.recipe, part)
        micro = None if parallel is None or parallel["micro"] == "auto" else parallel["micro"]
        if not scope.fit and micro is not None and parallel is not None and part.per_rank % micro:
            checks.micro(scope.problems, f"{parallel.address}.micro", part, micro)
            return None
        needs.append(_need(scope, part, parallel, micro, rollout is not None))
    scope.asked.extend(zip(parts, needs, strict=True))
    best = advice.fastest(needs, rollout, scope.target, work) if scope.fit else None
    seconds = partial(timing.whole, work, scope.target)
    placed = fit(needs, rollout, scope.target, seconds) if best is None else best.fit
    checks.memory(scope.problems, scope.target, at, placed, rollout, work)
    return placed


def parallel_of(recipe: Recipe, part: Part) -> Block | None:
    """The `parallel` block that an engine names."""
    if part.group is None or part.group["parallel"] is None:
        return None
    return recipe.blocks[part.group["parallel"].address]


def lora_of(scope: Scope, part: Part) -> Lora | None:
    """The adapters of an engine, None when its weights train themselves, or nothing does."""
    block = part.group.blocks.get("lora") if part.group is not None and part.trains else None
    return None if block is None else adapters.lora(block, scope.model(part.reference).shape)


def _need(scope: Scope, part: Part, parallel: Block | None, micro: int | None, samples: bool) -> Need:
    model = scope.model(part.reference)
    lora, count = lora_of(scope, part), model.count(part.head)
    trained = None
    if lora is not None:
        trained = None if lora.count is None else lora.count + model.head_count(part.head)
        count = None if count is None or lora.count is None else count + lora.count
    zero: int | None = None
    offload: str | None = None
    checkpointing = None if part.trains else False
    if parallel is not None:
        zero = None if parallel["zero"] == "auto" else parallel["zero"]
        offload = parallel["offload"] or "off"
        if part.trains and parallel["gradient_checkpointing"] != "auto":
            checkpointing = parallel["gradient_checkpointing"]
    if not part.trains:
        # Stages 1 and 2 shard gradients and optimizer states, which an engine that only infers does not have:
        # what is written there is for the engines that train.
        zero = None if zero in (1, 2) else zero
        if offload is not None and offload != "idle":
            offload = "params" if offload in ("params", "both") and zero in (3, None) else "off"
    if offload == "idle" and (part.trains or not samples):
        offload = "off"
    if part.shares is not None:
        offload = "off"
    ema = part.name == "actor" and part.group is not None and part.group["ema"] is not None
    ours = escape.passed_on(part.group).get("zero_optimization", {})
    return Need(
        part.name, model.shape, count, part.head, model.dtype,
        model.entry["attention"] == "eager", part.trains, part.per_rank, part.sequences, part.length, zero,
        offload, checkpointing, micro, ema, ours.get("reduce_bucket_size"),
        ours.get("stage3_max_live_parameters", deepspeed_config.LIVE), trained, lora, part.shares,
        (adapters.packed(model.shape) or 0) if part.in_4_bits else 0,
        None if parallel is None or offload in ("off", "idle") else parallel["nvme"],
        parallel is None or parallel["packing"],
    )  # fmt: skip


def engine(
    scope: Scope, part: Part, placed: Placement, model: Model, accumulation: int, updates: int | None
) -> Json:
    """One engine of the plan."""
    group = part.group
    schedule = optimizer = None
    if part.trains and group is not None:
        warmup = group["warmup"]
        known = isinstance(warmup, int) or updates is not None
        schedule = {
            "kind": group["schedule"], "lr": group["lr"],
            "warmup": warmup_updates(warmup, updates or 0) if known else None, "updates": updates,
        }  # fmt: skip
        course.schedule(scope.problems, part.at, warmup, schedule)
        escape.effects(scope.problems, group, placed)
        optimizer = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    lora = lora_of(scope, part)
    return {
        "role": part.role, "trains": part.trains, "weights": weights_of(scope.recipe, part.reference),
        "base": model.address, "head": part.head, "dtype": model.dtype, "attention": model.entry["attention"],
        "lora": None if lora is None else lora.entry, "shares": part.shares,
        "dropout": group["dropout"] if part.trains and group is not None else 0.0,
        "gradient_checkpointing": placed.checkpointing, "packing": placed.need.packing,
        "zero": placed.zero, "offload": placed.offload,
        "nvme": placed.need.nvme,
        "micro": placed.micro, "accumulation": accumulation,
        "ema": group["ema"] if part.name == "actor" and group is not None else None, "schedule": schedule,
        "rollout": None,
        "deepspeed": {} if part.shares is not None else _config(scope, part, placed, accumulation, optimizer),
    }  # fmt: skip


def _config(scope: Scope, part: Part, placed: Placement, accumulation: int, optimizer: Json | None) -> Json:
    """The DeepSpeed configuration of an engine, with what its recipe passes on."""
    group, need, target = part.group, placed.need, scope.target
    config = deepspeed_config.config(
        dtype=need.dtype, zero=placed.zero, offload=placed.offload, device=target.device,
        world=target.world, micro=placed.micro, accumulation=accumulation, parameters=need.count,
        trains=part.trains, learns=need.trained, optimizer=optimizer,
        grad_clip=group["grad_clip"] if part.trains and group is not None else 0.0,
    )  # fmt: skip
    if need.nvme is not None:
        largest = None if need.shape is None else largest_layer(need.shape)
        config = nvme.config(config, need.nvme, largest, target.world)
    return escape.merge(config, escape.passed_on(group))


def sampler(model: Model, placed: Fit, target: Target, rollout: Block, per_rank: int) -> Json:
    """The rollout engine of a stage's actor: which, the devices that share a copy of its weights, whether it gives its
    memory back after each rollout, and why. per_rank: answers of a rollout on one device."""
    kind = model.shape.type if model.shape is not None else ""
    zero = next(p.zero for p in placed.engines if p.need.name == "actor")
    chosen, reason = capabilities.choose(kind, zero, target.device, rollout["engine"])
    free, tensor = rollout["free_cache"], 1
    sampling = placed.sampling
    if sampling is not None and chosen == "graph":
        reasons = capabilities.table()["reasons"]
        if sampling.engine == "eager":
            chosen, reason = "eager", reasons["no_room"]
            if target.gpus > 1 and shards.rules(kind) is None:
                reason += f"; {reasons['uncut']}: {shards.why_not(kind)}"
        else:
            tensor = sampling.tensor
            if tensor > 1:
                reason = reasons["shards"].format(tensor=tensor)
                if rollout["tensor"] == "auto":
                    reason += f", {reasons['shards_all' if sampling.rows == per_rank else 'shards_most']}"
            if sampling.kept == 0 and not free:
                free, reason = True, f"{reason}; {reasons['given_back']}"
    return {"engine": chosen, "tensor": tensor, "free_cache": free and chosen == "graph", "reason": reason}


def memory_of(scope: Scope, placed: Fit) -> Json:
    """The memory of a stage, in bytes: what each engine keeps and needs by phase, and the peak of each phase."""
    engines = {}
    for p in placed.engines:
        s = p.states
        engines[p.need.name] = {
            "parameters": p.need.count, "trained": p.need.learns if p.need.trains else 0,
            "weights": s.weights if s else None, "gradients": s.gradients if s else None,
            "optimizer": s.optimizer if s else None, "average": p.average if s else None,
            "total": s.total + p.average if s else None, "lasting": s.lasting + p.average if s else None,
            "host": s.host if s else None, "disk": s.disk if s else None, "working": p.working,
        }  # fmt: skip
    hosts = [p.states.host if p.states else None for p in placed.engines]
    return {
        "engines": engines,
        "phases": {
            phase.name: {
                "resident": phase.resident, "working": phase.working, "engine": phase.engine, "peak": phase.peak,
            }
            for phase in placed.phases
        },
        "cache": None if placed.sampling is None else placed.sampling.cache, "peak": placed.peak,
        "host": None if None in hosts else sum(host or 0 for host in hosts),
        "available": scope.target.memory, "usable": placed.usable, "host_usable": placed.host_usable,
        "fits": placed.fits,
    }  # fmt: skip


def time_of(scope: Scope, placed: Fit, work: Work, times: int | None) -> Json | None:
    """Seconds of one update or rollout by phase, and of `times` of them; None when no rate is known."""
    each = timing.seconds(placed, work, scope.target)
    if each is None:
        return None
    one = sum(each.values())
    return {
        "each": {name: _digits(value) for name, value in each.items()},
        "seconds": None if times is None else _digits(one * times),
    }


def _digits(value: float) -> float:
    """Four significant digits: an estimate has no more, and a plan's bytes hang on no last bit."""
    return float(f"{value:.4g}")


def why(scope: Scope, placed: Placement, item: str) -> Json:
    """Where an engine's micro batch, ZeRO stage and checkpointing come from."""
    need = placed.need
    if need.shares is not None:
        once = ", read in one forward with it" if placed.joint else ""
        return {"micro": f"as the {need.shares}'s{once}", "zero": placed.reason}
    if need.micro is not None:
        micro = f"as written; {need.per_rank} / {need.micro} = {need.per_rank // need.micro}"
    else:
        limit = token_limit(placed.room)
        fits = "" if placed.room is None else f" and {placed.room / 2**30:.1f} GiB free"
        micro = f"derived: largest divisor of {need.per_rank} within {limit:,} tokens".replace(",", " ")
        micro += f" ({need.tokens} for each of the {item}){fits}"
    out = {"micro": micro, "zero": placed.reason}
    if need.trains:
        out["gradient_checkpointing"] = "as written"
        if need.checkpointing is None:
            fits = "on, else it does not fit" if placed.checkpointing else "off, it fits without"
            out["gradient_checkpointing"] = f"derived: {fits}"
    if scope.fit:
        out |= {name: FASTEST for name in ("zero", "gradient_checkpointing") if name in out}
    return out
