"""Small charts of numbers over updates (x, from 0), as SVG text without scripts or fonts of its own.

Colours are the page's: a series has the class `s0`, `s1`, …; axes, grid and marks have classes of their own. A point is
(x, y), where y may be None or not finite: the line then has a gap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import TypeGuard, TypeVar

from rlhfdsl.language.terminal import visible

Point = tuple[float, float | None]
Item = TypeVar("Item")
MOST = 400  # points of a series that are drawn
COLUMNS = 60  # places of a chart that tell their numbers
COLOURS = 6
WIDTH, HEIGHT = 360, 210  # one unit is a pixel of a phone
LEFT, RIGHT, BOTTOM = 46, 8, 20
ROW, LETTER = 16, 5.6  # of the legend: height of a row, width of a character
LARGEST = 1e300  # beyond it differences overflow


@dataclass(frozen=True, slots=True)
class Series:
    """A line by the name that the legend has, with a point at least. dots: its points are few and are drawn as such."""

    name: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where values lie in the picture."""

    xs: tuple[float, float]
    ys: tuple[float, float]
    top: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (HEIGHT - BOTTOM - self.top)

    def at(self, point: tuple[float, float]) -> str:
        return f"{self.x(point[0]):.1f} {self.y(point[1]):.1f}"


def lines(label: str, series: Sequence[Series], unit: str, marks: Iterable[tuple[float, str]] = ()) -> str:
    """Lines over common axes. unit: of x, `update`. marks: (x, what it says) on the x axis."""
    frame, body = _begin(label, series, [y for one in series for _, y in one.points])
    for number, one in enumerate(series):
        for kind, path in _paths(frame, thinned(one.points), one.dots):
            body.append(f'<path class="s{number % COLOURS} {kind}" d="{path}"/>')
    return _end(frame, body, series, unit, marks)


def stack(label: str, series: Sequence[Series], unit: str, marks: Iterable[tuple[float, str]] = ()) -> str:
    """Parts of a whole, one above the other from 0, all with the same x; a part that is missing leaves a gap."""
    whole: list[Point] = []
    layers: dict[float, list[float]] = {}
    for points in zip(*(one.points for one in series), strict=True):
        parts = [y for _, y in points if _known(y)]
        known = len(parts) == len(points)
        whole.append((points[0][0], sum(parts) if known else None))
        layers[points[0][0]] = [0.0, *accumulate(parts)]
    frame, body = _begin(label, series, [0.0, *(y for _, y in whole)])
    for number in range(len(series)):
        for run in _runs(thinned(whole)):
            there = [frame.at((x, layers[x][number + 1])) for x, _ in run]
            back = [frame.at((x, layers[x][number])) for x, _ in reversed(run)]
            body.append(f'<path class="s{number % COLOURS} area" d="M{"L".join(there + back)}Z"/>')
    return _end(frame, body, series, unit, marks)


# ---- numbers


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST points and the gaps between them: of each bin the least and the greatest, so that spikes stay."""
    if len(points) <= MOST:
        return list(points)
    out: list[Point] = []
    for part in _parts(points, MOST // 2):
        values = [(y, i) for i, (_, y) in enumerate(part) if _known(y)]
        kept = {min(values)[1], max(values)[1]} if values else set()
        gap = [i for i, (_, y) in enumerate(part) if not _known(y)][:1]
        out += [part[i] for i in sorted(kept.union(gap))]
    return out


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 multiples of 1, 2 or 5 times a power of ten; the first and the last enclose both numbers."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1 / LARGEST):  # all the same, as far as a picture shows
        room = abs(low) / 10
        low, high = (low - room, high + room) if room > 1 / LARGEST else (0.0, 1.0)
    least = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def label_of(value: float, step: float) -> str:
    """A tick's number with the digits that tell it from the next: `0.25`, `40k`, `1.5e-5`."""
    size, place = abs(value), math.floor(math.log10(step) + 1e-9)
    if size < step / 2:
        return "0"
    if size >= 1e9 or (step < 1e-4 and size < 0.1):
        return _plain(f"{value:.{math.floor(math.log10(size) + 1e-9) - place}e}")
    if size >= 1e4:
        return f"{value / 1e6:g}M" if size >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.{max(0, -place)}f}"


def short(value: float) -> str:
    """Four digits: `0.6931`, `1.5e-5`."""
    return _plain(f"{value:.4g}")


def _plain(number: str) -> str:
    """A number without the zeros of its exponent."""
    mantissa, e, exponent = number.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def _known(y: float | None) -> TypeGuard[float]:
    return y is not None and abs(y) < LARGEST  # which nan is not


def _runs(points: Iterable[Point]) -> Iterator[list[tuple[float, float]]]:
    """The stretches between gaps."""
    run: list[tuple[float, float]] = []
    for x, y in points:
        if _known(y):
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _parts(items: Sequence[Item], count: int) -> Iterator[Sequence[Item]]:
    """`items` in at most `count` parts of equal size, but for one item."""
    count = min(count, len(items))
    for i in range(count):
        yield items[i * len(items) // count : (i + 1) * len(items) // count]


# ---- the picture


def _begin(label: str, series: Sequence[Series], values: Iterable[float | None]) -> tuple[_Frame, list[str]]:
    """The frame that holds all values that are known, and the parts of the picture that lie below them."""
    names = [one.name for one in series]
    body, top = _legend(names) if len(names) > 1 else ([], 8.0)
    xs = [x for one in series for x, _ in one.points]
    low, high = 0.0, max(1.0, *xs)  # updates are counted from 1, and 0 is before them
    across = ticks(low, high)
    known = [y for y in values if _known(y)]
    up = ticks(min(known, default=0.0), max(known, default=0.0))
    frame = _Frame((low, high), (up[0], up[-1]), top)
    for y in up:
        place = frame.y(y)
        body.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>')
        body.append(f'<text x="{LEFT - 5}" y="{place + 3.5:.1f}" text-anchor="end">{label_of(y, up[1] - up[0])}</text>')
    step = max(1.0, across[1] - across[0])
    for x in across:
        if x <= high and x == round(x):
            anchor = "end" if frame.x(x) > WIDTH - 24 else "middle"
            place = WIDTH - RIGHT if anchor == "end" else frame.x(x)
            body.append(f'<text x="{place:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{label_of(x, step)}</text>')
    return frame, [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(label)}">', *body]


def _end(
    frame: _Frame, body: list[str], series: Sequence[Series], unit: str, marks: Iterable[tuple[float, str]]
) -> str:
    base = HEIGHT - BOTTOM
    body.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    columns = list(_columns(frame, series, unit))
    for x, says in marks:
        if frame.xs[0] <= x <= frame.xs[1]:
            place = frame.x(x)
            path = f"M{place:.1f} {frame.top:.1f}V{base}m-4 6h8l-4 -6z"
            columns.append(f'<path class="mark" d="{path}"><title>{_text(says)}</title></path>')
    return "".join([*body, *columns, "</svg>"])


def _legend(names: Sequence[str]) -> tuple[list[str], float]:
    out, x, row = [], float(LEFT), 0
    for number, name in enumerate(names):
        width = 16 + LETTER * len(name)
        if x > LEFT and x + width > WIDTH:
            x, row = float(LEFT), row + 1
        y = ROW * row + 11
        out.append(f'<path class="s{number % COLOURS} dot" d="M{x + 3:.1f} {y - 3.5:.1f}h0"/>')
        out.append(f'<text x="{x + 10:.1f}" y="{y}">{_text(name)}</text>')
        x += width + 6
    return out, ROW * (row + 1) + 6.0


def _paths(frame: _Frame, points: Sequence[Point], dots: bool) -> Iterator[tuple[str, str]]:
    """(class, path): lines, and dots where asked for. A point between two gaps is a dot of the line's width."""
    runs = list(_runs(points))
    if runs:
        drawn = ("L".join(map(frame.at, run)) + ("h0" if len(run) == 1 else "") for run in runs)
        yield "thin" if dots else "line", "".join(f"M{path}" for path in drawn)
        if dots:
            yield "dot", "".join(f"M{frame.at(point)}h0" for run in runs for point in run)


def _columns(frame: _Frame, series: Sequence[Series], unit: str) -> Iterator[str]:
    """Strips over the whole height that show the numbers below them when they are pointed at."""
    held = [(one.name, dict(one.points)) for one in series]
    parts = list(_parts(sorted({x for _, points in held for x in points}), COLUMNS))
    edges = [frame.x((a[-1] + b[0]) / 2) for a, b in zip(parts, parts[1:], strict=False)]
    for xs, left, right in zip(parts, [float(LEFT), *edges], [*edges, float(WIDTH - RIGHT)], strict=True):
        told = [f"{unit} {xs[0]:g}" if len(xs) == 1 else f"{unit}s {xs[0]:g} to {xs[-1]:g}"]
        for name, points in held:
            ys = [points[x] for x in xs if x in points]
            told += [f"{name}: {_range([y for y in ys if _known(y)])}"] if ys else []
        strip = f"M{left:.1f} {frame.top:.0f}H{right:.1f}V{HEIGHT - BOTTOM}H{left:.1f}z"
        yield f'<path class="hit" d="{strip}"><title>{_text(chr(10).join(told))}</title></path>'


def _range(values: Sequence[float]) -> str:
    if not values:
        return "not a number"
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"


def _text(text: str) -> str:
    return escape(visible(text))
