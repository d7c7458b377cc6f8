"""Which part a row belongs to, and how sources are mixed in a part: exact, and free of seeds.

A part is decided by a row's prompt alone, so a row keeps its part when others come or go, and rows with one
prompt are never in two parts, whatever source they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction


@dataclass(slots=True)
class Pool:
    """The rows of one source that may be taken: who comes first (by a hash), and the tokens of each."""

    ranks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def part_of(key: str, split: Mapping[str, float]) -> str | None:
    """The part of a prompt with the hash `key` (hex), None beyond the parts when they sum to less than one.

    The parts share the range of the hash in the order of their names, so the order in a recipe decides
    nothing.
    """
    place = Fraction(int(key[:16], 16), 1 << 64)
    end = Fraction(0)
    for part in sorted(split):
        end += exact(split[part])
        if place < end:
            return part
    return None


def mix(pools: Mapping[str, Pool], shares: Mapping[str, float], by: str, until: str) -> list[tuple[str, int]]:
    """The rows of one epoch as (source, row of its pool), the sources interleaved evenly.

    With `until` = first, the epoch ends when the first source is used up and no row comes twice; with all,
    it ends when the last one is, and the others repeat. The amounts (rows, or tokens when `by` is tokens)
    are as `shares`, to within one row. A source with nothing to give makes this empty: the caller has
    checked.
    """
    shares = {name: share for name, share in sorted(shares.items()) if share > 0}
    costs = {name: pools[name].tokens if by == "tokens" else [1] * len(pools[name].tokens) for name in shares}
    limits = [Fraction(sum(costs[name])) / exact(share) for name, share in shares.items()]
    limit = min(limits) if until == "first" else max(limits)
    placed = []
    for source, (name, share) in enumerate(shares.items()):
        rows = _take(pools[name].ranks, costs[name], limit * exact(share))
        placed += [(Fraction(2 * n + 1, 2 * len(rows)), source, name, row) for n, row in enumerate(rows)]
    return [(name, row) for _, _, name, row in sorted(placed)]


def exact(share: float) -> Fraction:
    """A share as it was written: 0.1 is one tenth and not the nearest binary number."""
    return Fraction(str(share))


def _take(ranks: Sequence[int], costs: Sequence[int], amount: Fraction) -> list[int]:
    """Rows that cost at most `amount`: whole passes over all, then the lowest ranks, in source order."""
    total = sum(costs)
    if total == 0:
        return []
    passes, rest = divmod(amount, total)
    chosen = []
    for row in sorted(range(len(ranks)), key=lambda row: (ranks[row], row)):
        rest -= costs[row]
        if rest < 0:
            break
        chosen.append(row)
    return [*range(len(ranks))] * int(passes) + sorted(chosen)
