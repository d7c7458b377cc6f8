"""Learning-rate schedules as pure functions of the update."""

from __future__ import annotations

import math


def learning_rate(schedule: dict, update: int) -> float:
    """The rate of update `update` (from 0) under a plan's schedule {kind, lr, warmup, updates}.

    Warm-up rises linearly over `warmup` updates and reaches `lr` on update `warmup`; after it, `constant` stays,
    `linear` falls to 0 and `cosine` follows half a cosine to 0, both reaching 0 one update after the last.
    """
    peak, warmup, updates = schedule["lr"], schedule["warmup"], schedule["updates"]
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    done = (update - warmup) / max(1, updates - warmup)
    match schedule["kind"]:
        case "constant":
            return peak
        case "linear":
            return peak * max(0.0, 1.0 - done)
        case "cosine":
            return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    raise ValueError(f"unknown schedule {schedule['kind']!r}")
