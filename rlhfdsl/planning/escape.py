"""What an engine's `deepspeed { }` passes on to DeepSpeed, and whether each key has an effect there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhfdsl.language import schema
from rlhfdsl.language.recipe import Block
from rlhfdsl.planning.layout import Placement
from rlhfdsl.planning.problems import Problems

Json = dict[str, Any]


def passed_on(group: Block | None) -> Json:
    """The keys that are written, nested as DeepSpeed has them; empty for an engine without the block."""
    block = group.blocks.get("deepspeed") if group is not None else None
    return _values(block) if block is not None else {}


def _values(block: Block) -> Json:
    out: Json = {
        name: list(setting.value) if isinstance(setting.value, tuple) else setting.value
        for name, setting in block.settings.items()
        if block.written(name)
    }
    inner = {name: _values(nested) for name, nested in block.blocks.items()}
    return out | {name: values for name, values in inner.items() if values}


def merge(config: Json, over: Json) -> Json:
    """`over` on a configuration, key by key inside its parts."""
    out = dict(config)
    for name, value in over.items():
        old = out.get(name)
        out[name] = merge(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return out


def learned(config: Json, type_: str = "deepspeed") -> Json:
    """Of a configuration what another value of would give another model, by the table of `deepspeed { }`.

    How ZeRO lies on the devices is not in it; what the plan derives elsewhere (precision, the optimizer) is.
    """
    definition = schema.definition(type_)
    out: Json = {}
    for name, value in config.items():
        if name in definition.blocks:
            inner = learned(value, definition.blocks[name][0])
            out |= {name: inner} if inner else {}
        elif name in definition.attributes:
            affects = definition.attributes[name].table["x-affects"]
            out |= {name: value} if affects == "result" else {}
        elif not type_.startswith("deepspeed.zero_optimization"):
            out[name] = value
    return out


def effects(problems: Problems, group: Block | None, placed: Placement) -> None:
    """A report for each key that does nothing for an engine as it is placed."""
    block = group.blocks.get("deepspeed") if group is not None else None
    for part, name, needs in _needing(block) if block is not None else ():
        missing = _missing(needs, placed)
        if missing is not None:
            problems.report(
                "E0311", f"`{name}` has no effect: {missing[0]}", f"{part.address}.{name}",
                notes=[f"ZeRO {placed.zero}, {placed.reason}"] if needs.startswith("zero") else (),
                help=f"delete it, or {missing[1]}",
            )  # fmt: skip


def _needing(block: Block) -> Iterator[tuple[Block, str, str]]:
    """Each written key with what it needs: (block, name, needs)."""
    for name in block.settings:
        needs = schema.definition(block.type).attributes[name].table.get("x-needs")
        if needs and block.written(name):
            yield block, name, str(needs)
    for inner in block.blocks.values():
        yield from _needing(inner)


def _missing(needs: str, placed: Placement) -> tuple[str, str] | None:
    """What an engine lacks of what a key needs, and what would give it; None when it is all there."""
    kind, *stages = needs.split()
    offload, dtype = placed.offload, placed.need.dtype
    if kind == "zero":
        write = f"write `zero = {stages[-1]}` in its `parallel` block"
        return None if str(placed.zero) in stages else (f"the engine is at ZeRO {placed.zero}", write)
    if kind in ("bf16", "fp16"):
        return None if dtype == kind else (f"the model is in {dtype}", f"write `dtype = {kind}` in the model")
    if kind == "offload_optimizer":
        fits = offload in ("optimizer", "both")
        return None if fits else ("the optimizer stays on the GPU", "write `offload = optimizer`")
    if kind == "offload_param":
        fits = offload in ("params", "both")
        return None if fits else ("the parameters stay on the GPU", "write `offload = params`")
    write = "write `nvme` beside `offload` in a `parallel` block"
    return None if placed.need.nvme is not None else ("nothing of the engine is on NVMe", write)
