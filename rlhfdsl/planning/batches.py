"""Batch algebra: what the writer counts over all devices becomes rank, micro batch and accumulation.

Every function is arithmetic on integers. A number that does not divide is returned as a `Misfit`, which holds
the figures that a message needs; nothing is rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Misfit:
    """`total` is not divisible by `divisor`; `below` and `above` are the nearest totals that are (0 =
    none)."""

    total: int
    divisor: int

    @property
    def below(self) -> int:
        return self.total // self.divisor * self.divisor

    @property
    def above(self) -> int:
        return self.below + self.divisor

    @property
    def nearest(self) -> str:
        """The nearest totals in words, `96 or 128`."""
        return f"{self.below} or {self.above}" if self.below else str(self.above)


def remainder(total: int, divisor: int) -> str:
    """`total` in whole parts and the rest, in words."""
    return f"{total} = {divisor} x {total // divisor} + {total % divisor}"


def share(total: int, parts: int) -> int | Misfit:
    """`total` split evenly over `parts`."""
    return total // parts if total % parts == 0 else Misfit(total, parts)


def divisors(n: int) -> tuple[int, ...]:
    """The divisors of n > 0, in ascending order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, and at least 1."""
    return max((d for d in divisors(n) if d <= most), default=1)


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n nearest to `wanted`; of two equally near, the smaller."""
    return min(divisors(n), key=lambda d: (abs(d - wanted), d))


@dataclass(frozen=True, slots=True)
class Run:
    """How many updates a number of rows gives: per epoch, in all, and the rows of an epoch that no update
    reads."""

    per_epoch: int
    updates: int
    dropped_tail: int


def run_length(rows: int, batch: int, epochs: int, steps: int | None) -> Run:
    """`floor(rows / batch)` updates in each epoch, its tail dropped; `steps`, when given, is the number of
    updates.

    >>> run_length(rows=1000, batch=64, epochs=2, steps=None)
    Run(per_epoch=15, updates=30, dropped_tail=40)
    """
    per_epoch = rows // batch
    return Run(per_epoch, per_epoch * epochs if steps is None else steps, rows - per_epoch * batch)


def warmup_updates(warmup: int | float, updates: int) -> int:
    """Updates of the warm-up: a count as it is, a ratio of the updates rounded to the nearest (half up)."""
    return warmup if isinstance(warmup, int) else math.floor(warmup * updates + 0.5)


def proves(batch: int, world: int, micro: int, accumulation: int) -> bool:
    """Whether a batch is the sum of its micro batches over all ranks."""
    return batch == world * micro * accumulation
