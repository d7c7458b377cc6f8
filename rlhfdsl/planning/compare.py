"""Two plans side by side: only what differs, and what that means for each stage.

A stage's result hangs on what it learns from and how; ZeRO, offload, micro batches and devices change its speed and its
last bits, names and folders where it lies. A stage whose input changes has another result too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhfdsl.planning.keys import leaves

Json = dict[str, Any]
_SPEED = re.compile(
    r"engines\.\w+\.(zero|offload|gradient_checkpointing|packing|micro|accumulation)$|(memory|time)\b|"
    r"batch\.(world|per_rank|micro|accumulation|generate_per_rank)$|batch\.ptx\.(per_rank|micro)$"
)
# Derived from what is shown, or the same thing in other words.
_HIDDEN = re.compile(
    r"(batch\.why|memory\.(engines|available|usable|host|cache)|edges\.\w+\.(key|model|facts\.(sample|files|sources)))\b|"
    r"memory\.phases\.\w+\.(resident|working|engine)$|engines\.\w+\.(deepspeed|weights\.\w+)\b|settings\.ptx$|artifacts\b|writes$"
)


@dataclass(frozen=True, slots=True)
class Difference:
    """One value of a stage (or model) in the two plans; None where a plan has none."""

    path: str
    a: Any
    b: Any

    @property
    def means(self) -> str:
        if _SPEED.match(self.path):
            return "speed"
        return "place" if self.path == "output" else "result"


@dataclass(slots=True)
class Part:
    """A stage, a model or the target in the two plans. means: "only A", "only B", "result", "input", "speed", "place",
    "same"; because: addresses of the inputs that change."""

    address: str
    means: str
    differences: list[Difference] = field(default_factory=list)
    because: list[str] = field(default_factory=list)


def compare(a: Json, b: Json) -> list[Part]:
    """The parts of two plans in the order of the second, those of the first alone at the end of their kind."""
    target = [d for d in _differences(a["target"], b["target"]) if d.path != "origin"]
    parts = [Part("target", "speed" if target else "same", target)]
    changed: set[str] = set()
    for kind in ("models", "data", "blends"):
        for address in dict.fromkeys((*b[kind], *a[kind])):
            part = _part(address, a[kind].get(address), b[kind].get(address))
            part.differences = [d for d in part.differences if not re.match(r"key|facts\.(files|tokenizer)", d.path)]
            if part.means != "same":
                changed.add(address)
                parts.append(part)
    ours, theirs = ({stage["address"]: stage for stage in plan["stages"]} for plan in (a, b))
    for address in dict.fromkeys((*theirs, *ours)):
        part = _part(address, ours.get(address), theirs.get(address))
        stage = theirs.get(address) or ours[address]
        part.because = [name for name in _inputs(stage, b if address in theirs else a) if name in changed]
        if part.because and part.means in ("same", "speed", "place"):
            part.means = "input"
        if part.means in ("result", "input") or part.means.startswith("only"):
            changed.add(address)
        parts.append(part)
    return parts


def _inputs(stage: Json, plan: Json) -> Iterator[str]:
    """What a stage reads: models, stages, data and blends with the sources that they mix."""
    yield from dict.fromkeys((*stage["needs"], *(engine["base"] for engine in stage["engines"].values())))
    for edge in stage["edges"].values():
        if edge is not None:
            yield edge["source"]
            for shares in plan["blends"].get(edge["source"], {"mix": {}})["mix"].values():
                yield from shares


def _part(address: str, a: Json | None, b: Json | None) -> Part:
    if a is None or b is None:
        return Part(address, "only B" if a is None else "only A")
    found = list(_differences(a, b))
    kinds = {difference.means for difference in found}
    means = next((kind for kind in ("result", "speed", "place") if kind in kinds), "same")
    return Part(address, means, found)


def _differences(a: Json, b: Json) -> list[Difference]:
    left, right = dict(leaves(a)), dict(leaves(b))
    return [
        Difference(path, left.get(path), right.get(path))
        for path in dict.fromkeys((*right, *left))
        if left.get(path) != right.get(path) and not _HIDDEN.match(path)
    ]


MEANINGS = {
    "only A": "only in A",
    "only B": "only in B",
    "result": "another result",
    "input": "another result, since its input changes",
    "speed": "the same learning, at another speed or on other devices",
    "place": "the same, under another name or folder",
    "same": "the same",
}


def render(parts: Sequence[Part], names: tuple[str, str], shown: Mapping[str, Any]) -> str:
    """The comparison as text. shown: how to print sizes and seconds, by the last name of a path."""
    lines = [f"A  {names[0]}", f"B  {names[1]}"]
    for part in parts:
        if part.means == "same":
            continue
        because = f" ({', '.join(part.because)})" if part.because else ""
        lines += ["", f"{part.address}: {MEANINGS[part.means]}{because}"]
        cells = [("", "A", "B")] + [(d.path, _cell(d, d.a, shown), _cell(d, d.b, shown)) for d in part.differences]
        if len(cells) > 1:
            widths = [max(len(row[i]) for row in cells) for i in (0, 1)]
            lines += [f"  {r[0].ljust(widths[0])}  {r[1].ljust(widths[1])}  {r[2]}".rstrip() for r in cells]
    if len(lines) == 2:
        return "\n".join([*lines, "", "The two plans say the same."]) + "\n"
    same = [part.address for part in parts if part.means == "same" and part.address != "target"]
    return "\n".join([*lines, "", f"the same: {', '.join(same) or 'nothing'}"]) + "\n"


def _cell(difference: Difference, value: Any, shown: Mapping[str, Any]) -> str:
    if value is None:
        return "-"
    how = shown.get(difference.path.rpartition(".")[2])
    if how is None and difference.path.startswith("time.each."):
        how = shown["seconds"]
    if how is not None and isinstance(value, int | float) and not isinstance(value, bool):
        return str(how(value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
