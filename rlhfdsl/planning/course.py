"""Checks of how a stage learns: its data, its length, what holds its policy. Plain functions as in checks.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhfdsl.language.recipe import Block, Reference
from rlhfdsl.planning import capabilities, shards
from rlhfdsl.planning.adapters import BLOCK, Lora, linears, matches
from rlhfdsl.planning.batches import remainder
from rlhfdsl.planning.catalog import Shape
from rlhfdsl.planning.entries import Model
from rlhfdsl.planning.hardware import Target
from rlhfdsl.planning.layout import Part
from rlhfdsl.planning.problems import Problems

TAIL_SHARE = 0.25
CUT_SHARE = 0.25
DROP_SHARE = 0.5


def adapters(problems: Problems, part: Part, model: Model, lora: Lora | None) -> None:
    """LoRA targets against the layers of the model's type, and the rank against their widths."""
    if lora is None or part.group is None:
        return
    at, written = f"{part.at}.lora", part.group.blocks["lora"]["targets"]
    known = linears(model.shape)
    if known is None or model.shape is None:
        if written in ("attention", "mlp"):
            problems.report(
                "E0730", f"planning does not know which layers of `{model.address}` are its {written}", f"{at}.targets",
                help='name them, `targets = ["q_proj", "v_proj"]`, or leave `targets` out for all',
            )  # fmt: skip
        return
    names = [] if isinstance(written, str) else written
    lost = [name for name in names if not any(matches(name, layer.path) for layer in known)]
    if lost:
        problems.report(
            "E0730", f"no linear layer of {model.shape.type} is named `{lost[0]}`", f"{at}.targets",
            also=[(model.address, f"a model of type {model.shape.type}")],
            help=f"its layers: {', '.join(layer.path for layer in known)}; or targets = all",
        )  # fmt: skip
    narrow = min(lora.layers or known, key=lambda layer: min(layer.inputs, layer.outputs))
    width = min(narrow.inputs, narrow.outputs)
    if lora.rank >= width:
        problems.report(
            "E0731", f"an adapter of rank {lora.rank} is not smaller than `{narrow.path}`, which is "
            f"{narrow.outputs} x {narrow.inputs}", f"{at}.rank",
            help=f"rank = {max(1, width // 4)} or less, or train the weights themselves: leave `lora` out",
        )  # fmt: skip


def whole_blocks(problems: Problems, part: Part, model: Model) -> None:
    """A base in 4 bits whose rows do not split into blocks of one scale."""
    odd = [layer for layer in linears(model.shape) or () if layer.inputs % BLOCK]
    if part.in_4_bits and part.shares is None and odd and model.shape is not None:
        widths = {model.shape.intermediate: "intermediate", model.shape.hidden: "hidden"}
        name, whole = widths.get(odd[0].inputs), -(-odd[0].inputs // BLOCK) * BLOCK
        scratch = model.entry["arch"] is not None and name is not None
        problems.report(
            "E0733", f"the {odd[0].inputs} inputs of `{odd[0].path}` do not split into blocks of {BLOCK}",
            f"{part.at}.lora.base", also=[(model.address, "this model")],
            help=f"{name} = {whole}, or base = full" if scratch else "base = full",
        )  # fmt: skip


def rounded_again(problems: Problems, part: Part) -> None:
    """A base in 4 bits of weights in which an earlier stage has merged adapters."""
    maker = problems.recipe.blocks[part.reference.address]
    if not part.in_4_bits or part.shares is not None or maker.kind != "stage":
        return
    if "actor" in maker.blocks:
        maker = maker.blocks["critic" if part.reference.facet == "critic" else "actor"]
    if "lora" not in maker.blocks:
        return
    problems.report(
        "W0709", f"what the adapters of `{maker.address}` learned is merged and rounded to 4 bits here",
        f"{part.at}.lora.base", also=[(f"{maker.address}.lora", "these adapters")],
        notes=["a change of a weight that is smaller than half a step of the 4 bits is lost with it"],
        help="base = full starts from just what was left; or nothing, where an evaluation at the start finds it there",
    )  # fmt: skip


def whole_base(problems: Problems, at: str, tensor: int | None, in_4_bits: bool) -> int | None:
    """As `tensor`, and 1 and a report where a base in 4 bits would be cut."""
    if in_4_bits and tensor is not None and tensor > 1:
        problems.report(
            "E0732", f"tensor = {tensor} would cut a base in 4 bits, whose packed weights are read whole",
            f"{at}.rollout.tensor", also=[(f"{at}.actor.lora.base", "the base in 4 bits")], help="leave `tensor` out",
        )  # fmt: skip
        return 1
    return tensor


def critic_warmup(problems: Problems, at: str, late: int, rollouts: int | None) -> None:
    """A critic warm-up that leaves the actor no rollout."""
    if late and rollouts is not None and late >= rollouts:
        problems.report(
            "E0704",
            f"the critic alone learns for {late} rollouts of {rollouts}, so the actor would make no update",
            at, help=f"warmup_rollouts = {max(0, rollouts - 1)} or less",
        )  # fmt: skip


def tail(problems: Problems, at: str, dropped: int, rows: int, batch: int, item: str) -> None:
    """A warning when much of the data is in the tail that no batch reads."""
    if rows > batch and dropped > TAIL_SHARE * rows:
        problems.report(
            "W0701", f"{dropped} of {rows} {item} are in no batch", at,
            notes=[remainder(rows, batch)], help="a smaller batch uses more of them",
        )  # fmt: skip


def schedule(problems: Problems, at: str, written: int | float, plan: Mapping[str, Any]) -> None:
    """A warm-up against the length of its run."""
    updates, warmup = plan["updates"], plan["warmup"]
    if not updates or warmup is None:
        return
    if warmup >= updates:
        problems.report(
            "E0705", f"a warm-up of {warmup} updates never reaches lr in a run of {updates}", f"{at}.warmup",
            help=f"warmup = {max(0, updates // 10)}, or a ratio such as 3%",
        )  # fmt: skip
    elif written and not warmup:
        problems.report(
            "W0703", f"a warm-up of {written:.2%} of {updates} updates rounds to none".replace(".00%", "%"),
            f"{at}.warmup", help="give it as a count of updates",
        )  # fmt: skip


def interval(problems: Problems, block: Block, total: int | None, unit: str) -> None:
    """Intervals of `every` that end after the run does."""
    every = block.blocks["every"]
    for name in ("eval", "samples"):
        value = every[name] if name in every.settings else None
        if value is not None and total and value > total:
            problems.report(
                "W0702", f"every.{name} = {value} {unit} is longer than the run of {total}",
                f"{block.address}.every.{name}",
            )  # fmt: skip


def rows_are_whole(problems: Problems, at: str, edges: Mapping[str, Any]) -> None:
    """A warning when a stage learns from rows of which many are cut, so that they do not end, or most are dropped."""
    for name, edge in edges.items():
        facts = None if edge is None else edge["facts"]
        if facts is None or not facts["used"] or name == "ptx":
            continue
        setting = {"train": "data"}.get(name, name)
        sequences = facts["used"] * (2 if edge["read"] == "preference" else 1)
        dropped = sum(facts["dropped"].values())
        if edge["read"] in ("chat", "preference") and facts["truncated"] > CUT_SHARE * sequences:
            problems.report(
                "W0706", f"{facts['truncated']} of {sequences} sequences are cut at {edge['length']} tokens",
                f"{at}.{setting}", notes=["what is cut has no end that a model could learn"],
                help="a larger length, or shorter rows",
            )  # fmt: skip
        elif dropped > DROP_SHARE * facts["rows"]:
            why = [f"{count} {reason.replace('_', ' ')}" for reason, count in facts["dropped"].items() if count]
            problems.report(
                "W0706", f"{dropped} of {facts['rows']} rows are dropped", f"{at}.{setting}", notes=why,
                help="a larger length, or other rows",
            )  # fmt: skip


def held_policy(problems: Problems, at: str, stage: Block, reference: Reference) -> None:
    """A reference of other weights than the actor's."""
    actor = stage.blocks["actor"]["model"]
    if (reference.address, reference.facet) != (actor.address, actor.facet):
        problems.report(
            "W0705", f"the reference is `{reference.address}`, and the actor starts from `{actor.address}`",
            f"{at}.ref.model", also=[(f"{at}.actor.model", "the actor starts from this")],
            notes=["the KL is not 0 before the first update"],
            help="leave `ref` out to hold the policy near its start",
        )  # fmt: skip


def tensor(problems: Problems, where: Target, at: str, asked: str | int, shape: Shape | None) -> int | None:
    """The devices that share a copy of the weights as the recipe says it, None for `auto`.

    A number into which the layers cannot be cut is reported, and 1 in its place.
    """
    if not isinstance(asked, int):
        return None
    why = None if shape is None else shards.misfit(shape, asked, where.gpus)
    if shape is None or why is None:
        return asked
    fitting = [size for size in range(1, asked) if shards.misfit(shape, size, where.gpus) is None]
    problems.report(
        "E0717", f"the actor's weights cannot be cut in {asked} shards", f"{at}.rollout.tensor", label=why,
        notes=[f"{where.world} GPUs = {where.nodes} x {where.gpus} ({where.origin})"],
        help=f"tensor = {max(fitting)}, or leave it out: auto takes what holds the most answers at once",
    )  # fmt: skip
    return 1


def rollout_engine(
    problems: Problems, at: str, asked: str, tensor: int | None, chosen: Mapping[str, Any]
) -> None:  # fmt: skip
    """A rollout engine that the recipe names and the actor cannot have, and shards for one that has none."""
    if asked == "graph" and chosen["engine"] != "graph":
        problems.report(
            "E0716", f"the actor cannot sample with `engine = graph`: {chosen['reason']}", f"{at}.rollout.engine",
            help="engine = eager, or leave it out: auto takes the fastest that there is",
        )  # fmt: skip
    elif tensor is not None and tensor > 1 and chosen["engine"] != "graph":
        could = chosen["reason"] == capabilities.table()["cpu"]["reason"]  # auto prefers `generate` there
        problems.report(
            "E0717", f"tensor = {tensor} is for `engine = graph`, and the actor samples with `generate`",
            f"{at}.rollout.tensor", label=chosen["reason"],
            help="leave `tensor` out" + (", or write `engine = graph`" if could else ""),
        )  # fmt: skip
