"""How the rows of a minibatch are cut into micro batches: like lengths together, short rows more at a time.

A micro batch is padded to its longest row, so rows of mixed lengths waste most of a pass. Losses are sums over the
tokens of the whole minibatch, so the cut changes speed and rounding, never the gradient that is meant.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from rlhfdsl.engines import distributed


def by_length(lengths: Sequence[int], micro: int, longest: int) -> list[list[int]]:
    """Row numbers in micro batches, the longest rows first.

    micro: rows of `longest` tokens that the device has room for; a micro batch of shorter rows holds more of them, up
    to as many tokens, padding counted. One that is half full takes no row that would be a fifth of padding.
    """
    room = micro * longest
    parts: list[list[int]] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        full = not parts or (len(parts[-1]) + 1) * width > room
        if full or (lengths[row] < 0.8 * width and len(parts[-1]) * width >= 0.5 * room):
            parts.append([])
            width = lengths[row]
        parts[-1].append(row)
    return parts


def in_parts(parts: list[list[int]], count: int) -> list[list[int]]:
    """The same rows in at least `count` micro batches: the fullest is halved until there are as many."""
    parts = list(parts)
    while len(parts) < count:
        fullest = max(range(len(parts)), key=lambda i: len(parts[i]))
        half = len(parts[fullest]) // 2
        parts[fullest : fullest + 1] = [parts[fullest][:half], parts[fullest][half:]]
    return parts


def micro_parts(
    lengths: Sequence[int], micro: int, longest: int, size: int | None = None
) -> list[list[torch.Tensor]]:
    """The micro batches, as int64 row numbers, of each minibatch of `size` consecutive rows (None: all rows are one).

    Every rank gets equally many for a minibatch: above ZeRO 0 each pass is a collective call. So all ranks call this
    together, with equally many rows.
    """
    size = size or len(lengths)
    cut = [by_length(lengths[start : start + size], micro, longest) for start in range(0, len(lengths), size)]
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
