"""How many answers a device samples at once, and the bytes that takes."""

from __future__ import annotations

from rlhfdsl.planning import memory, shards
from rlhfdsl.planning.batches import divisors
from rlhfdsl.planning.hardware import Target
from rlhfdsl.planning.layout import Need, Rollout, Sampling

KEPT = 2  # what stays between rollouts may take a half of what model states leave free


def at_once(
    actor: Need, zero: int, states: memory.States | None, rollout: Rollout, room: int | None, target: Target
) -> Sampling | None:
    """The most sequences that fit in `room` bytes beside all that stays; None when the actor's size is unknown.

    A graph keeps its cache, and a copy of the weights, where that is at most half of the room, or gives them back after
    each rollout, whichever holds more sequences at once. A copy lies on the number of devices that holds the most. Of
    equals it is the fewest devices, and kept.
    Where no graph has room, eager samples if it may.
    """
    shape = actor.shape
    if shape is None or states is None:
        return None
    live = memory.gathered(states, dtype=actor.dtype, zero=zero, live=actor.live)
    read = memory.read_back(shape, actor.dtype) if actor.packed else 0

    def used(engine: str, rows: int, tensor: int, stays: bool) -> Sampling:
        graph, copy = engine == "graph", 0
        cache, whole = memory.generation(
            shards.part(shape, tensor), rows=rows * tensor, prompt=rollout.prompt, length=rollout.length,
            dtype=actor.dtype, eager=actor.eager, graph=graph, device=target.device,
        )  # fmt: skip
        if graph and (zero == 3 or tensor > 1):
            copy = memory.BYTES[actor.dtype] * shards.held(shape, states.parameters, tensor)
        whole += read + (copy if graph else live)
        return Sampling(engine, rows, cache, whole, cache + copy if stays else 0, tensor)

    def most(engine: str, tensor: int, stays: bool) -> Sampling | None:
        for rows in divisors(rollout.per_rank)[::-1]:
            found = used(engine, rows, tensor, stays)
            if room is None or (found.whole <= room and KEPT * found.kept <= room):
                return found
        return None

    if rollout.engine == "graph":
        sizes = [rollout.tensor] if rollout.tensor is not None else _sizes(actor, zero, target.gpus)
        kept = (False,) if rollout.free_cache else (True, False)
        found = [way for size in sizes for stays in kept if (way := most("graph", size, stays)) is not None]
        if found:
            return max(found, key=lambda way: way.rows)
        if not rollout.spare:
            return used("graph", 1, sizes[-1], False)
    return most("eager", 1, False) or used("eager", 1, 1, False)


def _sizes(actor: Need, zero: int, gpus: int) -> list[int]:
    """The numbers of devices that may share a copy: one where the weights are read in place."""
    if zero < 3 or actor.shape is None:
        return [1]
    return [size for size in shards.SIZES if shards.misfit(actor.shape, size, gpus) is None]
