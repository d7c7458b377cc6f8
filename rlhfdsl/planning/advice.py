"""Other ways to lay a stage out: what fits when what is written does not, and what is fastest (`rlhf plan --fit`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rlhfdsl.planning import timing
from rlhfdsl.planning.adapters import BLOCK, Lora, linears, packed
from rlhfdsl.planning.fit import fit, offload_of
from rlhfdsl.planning.hardware import Target
from rlhfdsl.planning.layout import Fit, Need, Rollout
from rlhfdsl.planning.timing import Work

MOST_GPUS = 64  # times as many as asked for
RANK = 16


@dataclass(frozen=True, slots=True)
class Change:
    """A layout that fits, in the words of the recipe. seconds: of one update or rollout, None when unknown."""

    words: str
    fit: Fit
    seconds: float | None


def nearest(
    needs: Sequence[Need], rollout: Rollout | None, target: Target, work: Work, most: int = 3
) -> list[Change]:
    """The changes of settings that make a stage fit, the fastest first; of two within 5 % the smaller change."""
    found: dict[str, Change] = {}
    for words, variant in _steps(needs, target):
        placed = fit(variant, rollout, target)
        if placed.fits and words not in found:
            found[words] = Change(words, placed, timing.whole(work, target, placed))
    ways = list(found.values())  # from the smallest change on, which sorting keeps among equals
    least = min((way.seconds for way in ways if way.seconds), default=1.0)
    return sorted(ways, key=lambda way: int(20 * (way.seconds or 0.0) / least))[:most]


def adapted(
    needs: Sequence[Need], rollout: Rollout | None, target: Target, in_4_bits: bool = False
) -> bool:
    """Whether the stage fits without offload when what trains whole has adapters of RANK beside all its layers.

    in_4_bits: and the base of every engine with adapters is.
    """
    beside = [_adapted(need) if need.trains and need.lora is None else need for need in needs]
    if in_4_bits:
        bases = {need.name for need in beside if need.lora is not None and _splits(need)}
        beside = [replace(n, packed=packed(n.shape) or 0) if (n.shares or n.name) in bases else n for n in beside]
    free = [
        replace(n, micro=None, zero=None, offload="off", checkpointing=None if n.trains else False) for n in beside
    ]
    return beside != list(needs) and fit(free, rollout, target).fits is True


def _splits(need: Need) -> bool:
    """Whether the layers of an engine's base can be in 4 bits."""
    return all(layer.inputs % BLOCK == 0 for layer in linears(need.shape) or ())


def _adapted(need: Need) -> Need:
    layers = linears(need.shape)
    if layers is None or need.shape is None or need.count is None:
        return need
    entry = {"rank": RANK, "dropout": 0.0}
    count = need.shape.layers * sum(RANK * (layer.inputs + layer.outputs) for layer in layers)
    head = need.shape.embed if need.head == "scalar" else 0
    return replace(need, count=need.count + count, trained=count + head, lora=Lora(entry, layers, count))


def more_gpus(needs: Sequence[Need], rollout: Rollout | None, target: Target) -> Target | None:
    """The smallest target of 2, 4, … times the GPUs on which the stage fits without offload, with its batches."""
    times = 2
    while times <= MOST_GPUS and all(need.per_rank % times == 0 for need in needs):
        eight = target.gpus * times <= 8
        wider = replace(target, gpus=target.gpus * times) if eight else replace(target, nodes=target.nodes * times)
        shared = [
            replace(
                n, per_rank=n.per_rank // times, micro=None, zero=None, offload="off",
                checkpointing=None if n.trains else False,
            )
            for n in needs
        ]  # fmt: skip
        split = replace(rollout, per_rank=rollout.per_rank // times) if rollout else None
        if fit(shared, split, wider).fits:
            return wider
        times *= 2
    return None


def fastest(needs: Sequence[Need], rollout: Rollout | None, target: Target, work: Work) -> Change | None:
    """The layout of the least predicted time that fits (without rates, of the fewest means), None if none fits."""
    best: Change | None = None
    for words, variant in _grid(needs, target):
        placed = fit(variant, rollout, target)
        if placed.fits is False:
            continue
        found = Change(words, placed, timing.whole(work, target, placed))
        if best is None or (found.seconds or 0.0) < (best.seconds or 0.0):
            best = found
    return best


def _steps(needs: Sequence[Need], target: Target) -> Iterator[tuple[str, list[Need]]]:
    """Settings of a `parallel` block, from the smallest change on."""
    on = [replace(need, checkpointing=True) if need.trains else need for need in needs]
    yield "gradient_checkpointing = on", on
    free = [replace(need, micro=None) for need in needs]
    yield "micro = auto", free
    yield "gradient_checkpointing = on, micro = auto", [_with(need, None, None, True) for need in free]
    whole = any(need.packed for need in needs)  # a base in 4 bits, which stage 3 does not partition
    stages = () if target.world == 1 else (2,) if whole else (2, 3)
    for zero in stages:
        yield f"zero = {zero}, micro = auto", [_with(need, zero, None, None) for need in free]
        yield (
            f"zero = {zero}, gradient_checkpointing = on, micro = auto",
            [_with(need, zero, None, True) for need in free],
        )
    if target.device == "cpu":
        return
    if any(n.offload not in (None, "off") for n in needs):
        yield (
            "offload = off, gradient_checkpointing = on, micro = auto",
            [_with(need, None, "off", True) for need in free],
        )
    if any(n.name == "actor" for n in needs) and any(not n.trains and n.shares is None for n in needs):
        yield (
            "offload = idle, gradient_checkpointing = on, micro = auto",
            [_with(need, None, "idle", True) for need in free],
        )
    for zero, offload in ((2, "optimizer"), (3, "optimizer"), (3, "both"))[: 1 if whole else 3]:
        yield (
            f"zero = {zero}, offload = {offload}, gradient_checkpointing = on, micro = auto",
            [_with(need, zero, offload, True) for need in free],
        )
    if target.host is not None and not whole:
        yield (
            'zero = 3, offload = both, nvme = "FOLDER", gradient_checkpointing = on, micro = auto',
            [replace(_with(need, 3, "both", True), nvme="FOLDER") for need in free],
        )


def _with(need: Need, zero: int | None, offload: str | None, checkpointing: bool | None) -> Need:
    """An engine under the settings of a `parallel` block; one that infers shards its weights at stage 3 only."""
    stage = need.zero if zero is None else max(zero, need.zero or 0)
    moved = need.offload if offload is None else offload_of(need, offload)
    if not need.trains:
        return replace(need, zero=3 if stage == 3 else need.zero, offload=moved)
    return replace(
        need, zero=stage, offload=moved,
        checkpointing=need.checkpointing if checkpointing is None else checkpointing,
    )  # fmt: skip


def _grid(needs: Sequence[Need], target: Target) -> Iterator[tuple[str, list[Need]]]:
    """Every ZeRO stage, offload and checkpointing of the engines that train; the others' follow."""
    lowest = 0 if all(need.dtype == "fp32" for need in needs if need.trains) else 1
    stages = (lowest,) if target.world == 1 else (lowest, 2, 3)
    layouts: list[tuple[int, str]] = [(zero, "off") for zero in stages]
    if target.device == "cuda":
        layouts += [(zero, "idle") for zero in stages if zero < 3 and any(n.name == "actor" for n in needs)]
        layouts += [(2, "optimizer"), (3, "optimizer"), (3, "both")]
    if any(need.packed for need in needs):
        layouts = [(zero, offload) for zero, offload in layouts if zero < 3]
    for zero, offload in layouts:
        for checkpointing in (False, True):
            for shared in (False, True) if target.world > 1 and zero < 3 else (zero == 3 and target.world > 1,):
                variant = [
                    replace(
                        n, zero=zero, offload=offload_of(n, offload), checkpointing=checkpointing, micro=None
                    ) if n.trains
                    else replace(
                        n, zero=3 if shared or offload == "both" else 0,
                        offload="off" if shared and offload == "idle" else offload_of(n, offload), micro=None,
                    )
                    for n in needs
                ]  # fmt: skip
                yield f"zero = {zero}, offload = {offload}", variant


