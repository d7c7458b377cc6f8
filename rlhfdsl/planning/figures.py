"""Numbers of a plan as text, with the digits that an estimate has; and columns of text."""

from __future__ import annotations

from collections.abc import Sequence

LATER = "(known after lock)"


def parameters(count: int | None) -> str:
    """`1.32 B`."""
    if count is None:
        return LATER
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return str(count)


def gib(count: int | None) -> str:
    """Bytes in GiB, without the unit."""
    if count is None:
        return LATER
    value = count / 2**30
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(count: int | None) -> str:
    """Bytes as files have them: `2.6 GB`."""
    if count is None:
        return LATER
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """Two digits are enough for an estimate: `0.4 s`, `42 s`, `7 m`, `2.5 h`, `3.1 days`."""
    for step, unit in ((86400, "days"), (3600, "h"), (60, "m")):
        if seconds >= (2 * step if unit == "days" else step):
            value = seconds / step
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    if seconds >= 1:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def number(count: int | None) -> str:
    """A count with thousands apart: `12 345`."""
    return LATER if count is None else f"{count:,}".replace(",", " ")


def count(many: int | None, what: str) -> str:
    """`1 update`, `3 batches`, `(known after lock) updates`."""
    plural = what + ("es" if what.endswith("ch") else "s")
    return f"{number(many)} {what if many == 1 else plural}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell, two spaces between them."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


SHOWN = {
    "peak": lambda value: f"{gib(value)} GiB",
    "bytes": size,
    "memory": lambda value: f"{gib(value)} GiB",
    "seconds": duration,
}
