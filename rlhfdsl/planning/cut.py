"""How rows of unequal lengths are cut into micro batches: like lengths together, short rows more at a time.

A micro batch is padded to its longest row, so rows of mixed lengths waste most of a pass, or its attention where the
rows are packed; and a pass costs its launches however short its rows are, which for a small model is most of its time.
Losses are sums over the tokens of the whole minibatch, so the cut changes speed and rounding, never the gradient that
is meant. Trainers cut by this (training/micro.py), and a plan's seconds count what it leaves (timing.py).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from rlhfdsl.planning.rates import BACKWARD_LAUNCHES, LAYER_FORWARD

# Of a real token, what padding takes in a packed pass, where attention alone sees it: queries, keys, values and its
# output are about a quarter of what a layer keeps for the backward pass.
ATTENDED = 0.25
# Of the launches of a pass, what it has beside them to spread tokens over their rows and to gather them: 12 kernels of
# a layer, forwards and backwards, beside 60 or so.
SPREAD = 0.2
# Seconds that ZeRO 3 takes of a host for each parameter tensor: in a forward pass, and in a backward pass, which also
# reduces the gradient (PPO of OPT-1.3B with OPT-350M, 388 tensors each, on two H200; in the middle of two hosts).
HOOKS, BACKWARD_HOOKS = 0.085e-3, 0.3e-3
HALVINGS = 20  # of an interval of lengths: to less than a thousandth of a token
MOST = 128  # rows that are cut for a plan, and stand for more
# FLOP/s of passes, at 6 FLOPs for each parameter and token: an H100's, and those of a core of a CPU.
SPEED = {"cuda": 4e14, "cpu": 5e10}


@dataclass(frozen=True)
class PassCost:
    """What a pass over a micro batch takes, counted in real tokens, and so how it reads its rows.

    launches, hooks: tokens that take as long as what a pass launches beside its tokens, and as what ZeRO 3 does in it.
    packs: whether the model can be read without padding.
    """

    launches: float
    packs: bool = False
    hooks: float = 0.0

    @classmethod
    def of(cls, device: str, layers: float, parameters: int, packs: bool, tensors: int = 0) -> Self:
        """Of forward and backward. tensors: those that ZeRO 3 gathers."""
        token = 6 * parameters / SPEED[device]
        seconds = (1 + BACKWARD_LAUNCHES) * LAYER_FORWARD * layers
        return cls(seconds / token, packs, (HOOKS + BACKWARD_HOOKS) * tensors / token)

    def over(self, sequences: int) -> Self:
        """The same of rows of so many sequences, as pairs are, whose tokens are counted by the sequence."""
        return replace(self, launches=self.launches / sequences, hooks=self.hooks / sequences)

    def packed(self, real: float, padded: float) -> bool:
        """Whether rows of `real` tokens, `padded` with their padding, are read without it: a pass of few tokens is all
        launches, and is faster with it."""
        return self.packs and padded - real > SPREAD * self.launches / (1 - ATTENDED)

    def tokens(self, real: float, padded: float) -> float:
        """What it takes of the memory that a micro batch has."""
        return real + ATTENDED * (padded - real) if self.packed(real, padded) else padded

    def whole(self, real: float, padded: float) -> float:
        """What it takes of the time."""
        launches = self.launches * (1 + SPREAD * self.packed(real, padded))
        return self.tokens(real, padded) + launches + self.hooks


def by_length(
    lengths: Sequence[float], room: float, cost: PassCost, real: Sequence[float] | None = None
) -> list[list[int]]:
    """Row numbers in micro batches, the longest rows first: the cut that costs least.

    room: tokens of a micro batch; a longer row is alone. real: tokens of a row where it has padding by itself, as a
    pair of unequal sequences. The cost of the longest k rows is the least over the last micro batch among them.
    """
    real = lengths if real is None else real
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    least, begins = [0.0], [0]
    for end in range(1, len(rows) + 1):
        costs = []
        own = 0.0
        for start in range(end - 1, -1, -1):
            own += real[rows[start]]
            padded = (end - start) * lengths[rows[start]]
            if start < end - 1 and cost.tokens(own, padded) > room:
                if own > room or not cost.packs:
                    break  # wider and more rows from here on
                continue  # which have room once they are packed, maybe
            costs.append((least[start] + cost.whole(own, padded), start))
        taken, start = min(costs)
        least.append(taken)
        begins.append(start)
    parts: list[list[int]] = []
    end = len(rows)
    while end:
        parts.append(rows[begins[end] : end])
        end = begins[end]
    return parts[::-1]


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long sequences are, as a plan knows it: their mean, and lengths with the share of all that are no longer."""

    mean: float
    points: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Self:
        """Of the `lengths` of an edge's facts."""
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        return cls(float(facts["mean"]), tuple((share, float(facts[name])) for name, share in shares.items()))

    def behind(self, tokens: float) -> Lengths:
        """Of the same sequences with so many tokens more."""
        return Lengths(self.mean + tokens, tuple((share, length + tokens) for share, length in self.points))

    def rows(self, count: int) -> list[float]:
        """The lengths of `count` rows that stand for all: their logarithm between the points in a line, and below the
        first so that the mean is right."""
        if not self.points:
            return [self.mean] * count
        (first, median), *_ = self.points
        above = sum((b - a) * _mean(low, high) for (a, low), (b, high) in itertools.pairwise(self.points))
        least, most = min(1.0, median), median
        for _ in range(HALVINGS):
            middle = (least + most) / 2
            if above + first * _mean(middle, median) < self.mean:
                least = middle
            else:
                most = middle
        points = [(0.0, most), *self.points]
        out, at = [], 0
        for row in range(count):
            share = (row + 0.5) / count
            while points[at + 1][0] < share:
                at += 1
            (a, low), (b, high) = points[at], points[at + 1]
            out.append(low * (high / low) ** ((share - a) / (b - a)))
        return out


def _mean(low: float, high: float) -> float:
    """Of lengths whose logarithms are spread evenly between two."""
    return (high - low) / math.log(high / low) if high > low else low


@dataclass(frozen=True, slots=True)
class Passes:
    """What the passes of a minibatch come to: how many they are; of real tokens, of those that all but attention
    computes, and of those that attend, each times the columns that it sees; launches, in those of plain passes."""

    count: float
    real: float
    computed: float
    attended: float
    launched: float


@functools.lru_cache(maxsize=1024)  # a plan asks for the same again in each layout that it tries
def passes(lengths: Lengths, rows: float, room: float, cost: PassCost) -> Passes:
    """Of a minibatch of so many rows, on one device."""
    mean = lengths.mean
    if not lengths.points:  # nothing to cut by
        full = math.ceil(rows / max(1.0, room // mean))
        return Passes(full, rows * mean, rows * mean, rows * mean * mean, full)
    sample = lengths.rows(max(1, min(math.ceil(rows), MOST)))
    scale = rows / len(sample)
    count = real = computed = attended = launched = 0.0
    for part in by_length(sample, room, cost):
        own, width = sum(sample[row] for row in part), sample[part[0]]
        packed = cost.packed(own, len(part) * width)
        count += 1
        real += own
        computed += own if packed else len(part) * width
        attended += len(part) * width * width
        launched += 1 + SPREAD * packed
    return Passes(*(scale * x for x in (count, real, computed, attended, launched)))
