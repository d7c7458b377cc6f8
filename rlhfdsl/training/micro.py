"""The micro batches of a minibatch, cut by the lengths of its rows (planning/cut.py), on every rank as many."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

import torch

from rlhfdsl.engines import distributed
from rlhfdsl.planning.cut import PassCost, by_length


class Reader(Protocol):
    """What reads micro batches: see `engines/engine.py`."""

    micro: int

    cost: PassCost


def in_parts(parts: list[list[int]], count: int) -> list[list[int]]:
    """The same rows in at least `count` micro batches: the fullest is halved until there are as many."""
    parts = list(parts)
    while len(parts) < count:
        fullest = max(range(len(parts)), key=lambda i: len(parts[i]))
        half = len(parts[fullest]) // 2
        parts[fullest : fullest + 1] = [parts[fullest][:half], parts[fullest][half:]]
    return parts


def micro_parts(
    lengths: Sequence[int], engine: Reader, longest: int, size: int | None = None
) -> list[list[torch.Tensor]]:
    """The micro batches, as int64 row numbers, of each minibatch of `size` consecutive rows (None: all rows are one).

    longest: tokens of a row at which the engine's micro batch was sized. Every rank gets equally many micro batches for
    a minibatch: above ZeRO 0 each pass is a collective call. So all ranks call this together, with equally many rows.
    """
    size = size or len(lengths)
    room = engine.micro * longest
    cut = [
        by_length(lengths[start : start + size], room, engine.cost)
        for start in range(0, len(lengths), size)
    ]
    return _on_every_rank(cut, size)


def micro_pairs(lengths: Sequence[tuple[int, int]], engine: Reader, longest: int) -> list[torch.Tensor]:
    """As `micro_parts` of one minibatch whose rows are pairs of sequences, read together and padded to the longer."""
    longer, mean = [max(pair) for pair in lengths], [sum(pair) / 2 for pair in lengths]
    cut = by_length(longer, engine.micro * longest, engine.cost.over(2), mean)
    return _on_every_rank([cut], len(lengths))[0]


def _on_every_rank(cut: list[list[list[int]]], size: int) -> list[list[torch.Tensor]]:
    """The micro batches of minibatches of `size` rows, of each as many as on the rank that has most."""
    most = distributed.all_max(torch.tensor([len(parts) for parts in cut])).tolist()
    return [
        [torch.tensor(rows) + number * size for rows in in_parts(parts, count)]
        for number, (parts, count) in enumerate(zip(cut, most, strict=True))
    ]


Metrics = dict[str, float]
Passes = Generator[None, None, Metrics]  # yields after each micro batch, returns the metrics of all


def in_turn(passes: Sequence[Passes]) -> Metrics:
    """Take the micro batches of several engines in turn; the metrics of all.

    A small model's kernels end sooner than a host launches them: between those of a large one, the device never waits.
    """
    found: list[Metrics] = [{} for _ in passes]
    waiting = list(range(len(passes)))
    while waiting:
        for number in list(waiting):
            try:
                next(passes[number])
            except StopIteration as end:
                found[number] = end.value
                waiting.remove(number)
    return {name: value for metrics in found for name, value in metrics.items()}
