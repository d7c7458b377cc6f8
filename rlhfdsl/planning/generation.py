"""How many answers a device samples at once, and the bytes that takes."""

from __future__ import annotations

from rlhfdsl.planning import memory, shards
from rlhfdsl.planning.batches import divisors
from rlhfdsl.planning.hardware import Target
from rlhfdsl.planning.layout import Need, Rollout, Sampling

KEPT = 2  # what stays between rollouts may take a half of what model states leave free
CAPTURE = 2.0  # seconds in which a step is captured anew, at most, where its memory was given back


def at_once(
    actor: Need, zero: int, states: memory.States | None, rollout: Rollout, room: int | None, target: Target
) -> Sampling | None:
    """The most sequences that fit in `room` bytes beside all that stays; None when the actor's size is unknown.

    A graph over weights in place keeps its cache where that is at most half of the room, or gives it back after each
    rollout where the sequences that are then at once save more than a capture takes. A copy of the weights, made anew
    for each rollout, lies on the number of devices and is kept or given back as holds the most sequences at once, of
    equals the fewest devices and kept.
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

    def saved(fewer: Sampling, more: Sampling) -> float:
        rates = target.rates(actor.dtype)
        rounds = rollout.per_rank / fewer.rows - rollout.per_rank / more.rows
        return 0.0 if rates is None else rounds * (rollout.length - rollout.prompt) * states.weights / rates.copy

    if rollout.engine == "graph":
        sizes = [rollout.tensor] if rollout.tensor is not None else _sizes(actor, zero, target.gpus)
        kept = (False,) if rollout.free_cache else (True, False)
        found = [way for size in sizes for stays in kept if (way := most("graph", size, stays)) is not None]
        if found:
            best = max(found, key=lambda way: way.rows)
            in_place = zero < 3 and found[0].tensor == 1
            return found[0] if in_place and saved(found[0], best) <= CAPTURE else best
        if not rollout.spare:
            return used("graph", 1, sizes[-1], False)
    return most("eager", 1, False) or used("eager", 1, 1, False)


def _sizes(actor: Need, zero: int, gpus: int) -> list[int]:
    """The numbers of devices that may share a copy: one where the weights are read in place."""
    if zero < 3 or actor.shape is None:
        return [1]
    return [size for size in shards.SIZES if shards.misfit(actor.shape, size, gpus) is None]
