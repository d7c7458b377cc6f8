"""How many answers a device samples at once, and the bytes that takes."""

from __future__ import annotations

from rlhfdsl.planning import memory
from rlhfdsl.planning.batches import divisors
from rlhfdsl.planning.layout import Need, Rollout, Sampling

KEPT = 2  # what stays between rollouts may take a half of what model states leave free


def at_once(
    actor: Need, zero: int, states: memory.States | None, rollout: Rollout, room: int | None
) -> Sampling | None:
    """The most sequences that fit in `room` bytes beside all that stays; None when the actor's size is unknown.

    A graph keeps its cache, and at ZeRO 3 its copy of the weights, where that is at most half of the room; else it
    gives them back after each rollout; and where there is no room even so, eager samples if it may.
    """
    shape = actor.shape
    if shape is None or states is None:
        return None
    copy = memory.BYTES[actor.dtype] * states.parameters if zero == 3 else 0
    live = memory.gathered(states, dtype=actor.dtype, zero=zero, live=actor.live)

    def used(engine: str, rows: int, stays: bool) -> Sampling:
        graph = engine == "graph"
        cache, whole = memory.generation(
            shape, rows=rows, prompt=rollout.prompt, length=rollout.length, dtype=actor.dtype, eager=actor.eager,
            graph=graph,
        )  # fmt: skip
        return Sampling(engine, rows, cache, whole + (copy if graph else live), cache + copy if stays else 0)

    ways = [("eager", False)]
    if rollout.engine == "graph":
        ways = [("graph", False)] if rollout.free_cache else [("graph", True), ("graph", False)]
        ways += [("eager", False)] if rollout.spare else []
    for engine, stays in ways:
        for rows in divisors(rollout.per_rank)[::-1]:
            found = used(engine, rows, stays)
            if room is None or (found.whole <= room and KEPT * found.kept <= room):
                return found
    return used(ways[-1][0], 1, False)
