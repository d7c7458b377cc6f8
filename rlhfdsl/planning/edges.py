"""The data edges of a plan as text: how many rows, how long, and one rendered sample with its loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import dropwhile
from typing import Any

from rlhfdsl.planning import figures
from rlhfdsl.planning.figures import LATER

Json = dict[str, Any]
WIDTH = 110
SAMPLE_LINES = 12


def edge(name: str, edge: Json) -> list[str]:
    source = edge["source"] + (f".{edge['part']}" if edge["part"] else "")
    head = f"  {name:<9} {source} as {edge['read']}, {edge['overlong']} at {edge['length']} tokens"
    facts = edge["facts"]
    if facts is None:
        return [f"{head}: {LATER}"]
    dropped = {why: count for why, count in facts["dropped"].items() if count}
    lost = ", ".join(f"{figures.number(count)} {why.replace('_', ' ')}" for why, count in dropped.items())
    spread = facts["lengths"]
    lines = [
        f"{head}: {figures.number(facts['used'])} used of {figures.number(facts['rows'])} rows",
        f"            {figures.number(facts['tokens'])} tokens, median {figures.number(spread['p50'])}, 90 % under "
        f"{figures.number(spread['p90'])}, longest {figures.number(spread['max'])}; "
        f"{figures.number(facts['truncated'])} cut; dropped: {lost or 'none'}",
    ]
    if len(facts["sources"]) > 1:
        shares = [
            f"{path} {figures.number(rows['used'])} of {figures.number(rows['rows'])}"
            for path, rows in facts["sources"].items()
        ]
        lines.append(f"            {'; '.join(shares)}")
    return lines + _sample(facts["sample"])


def _sample(segments: Sequence[Json]) -> list[str]:
    """One rendered sample; `>` marks lines whose text carries a loss. A second answer has a line of its
    own."""
    lines: list[tuple[bool, str]] = [(False, "")]
    answered = False
    for segment in segments:
        for number, piece in enumerate(segment["text"].split("\n")):
            if number or (answered and segment["loss"]):
                lines.append((False, ""))
                answered = False
            lines[-1] = (lines[-1][0] or (segment["loss"] and bool(piece)), lines[-1][1] + piece)
        answered = segment["loss"]
    lines = list(dropwhile(lambda line: not line[1].strip(), lines))
    shown = lines[:SAMPLE_LINES]
    out = [f"            {'>' if loss else '|'} {_clip(text.strip())}".rstrip() for loss, text in shown]
    if len(lines) > len(shown):
        out.append(f"            | ({figures.count(len(lines) - len(shown), 'more line')})")
    return out


def _clip(text: str) -> str:
    room = WIDTH - 14
    printable = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return printable if len(printable) <= room else printable[: room - 3] + "..."
