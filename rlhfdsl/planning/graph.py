"""The graph of a plan: models and data on one side, the stages that they feed in their order, what each makes."""

from __future__ import annotations

import re
from typing import Any

Json = dict[str, Any]
Arrow = tuple[str, str, str]


def arrows(plan: Json) -> list[Arrow]:
    """(from, to, label) of every edge: weights with the engines that take them, data with what it is read as."""
    found: list[Arrow] = []
    for stage in plan["stages"]:
        takes: dict[tuple[str, str], list[str]] = {}
        for name, engine in stage["engines"].items():
            weights = engine["weights"]
            origin = weights.get("model") or weights["stage"]
            takes.setdefault((origin, weights.get("artifact", "")), []).append(name)
        for (origin, artifact), names in takes.items():
            said = f"{artifact} as " if artifact and [artifact] != names else ""
            found.append((origin, stage["address"], said + ", ".join(names)))
        for name, edge in stage["edges"].items():
            if edge is not None:
                source = edge["source"] + (f".{edge['part']}" if edge["part"] else "")
                found.append((source, stage["address"], f"{name}: {edge['read']}"))
    return list(dict.fromkeys(found))


def mermaid(plan: Json) -> str:
    """The graph for a Markdown page that draws Mermaid."""
    nodes = _nodes(plan)
    lines = ["flowchart LR"]
    for name, (kind, label) in nodes.items():
        left, right = {"model": ("[(", ")]"), "data": ("[/", "/]"), "stage": ("[", "]")}[kind]
        lines.append(f'  {_id(name)}{left}"{"<br>".join(label)}"{right}')
    lines += [f'  {_id(a)} -->|"{label}"| {_id(b)}' for a, b, label in arrows(plan)]
    return "\n".join(lines) + "\n"


def dot(plan: Json) -> str:
    """The graph for Graphviz."""
    shapes = {"model": "cylinder", "data": "note", "stage": "box"}
    lines = [f'digraph "{_quoted(plan["recipe"]["name"])}" {{', "  rankdir=LR;"]
    for name, (kind, label) in _nodes(plan).items():
        text = "\\n".join(_quoted(line) for line in label)
        lines.append(f'  "{_quoted(name)}" [shape={shapes[kind]}, label="{text}"];')
    lines += [f'  "{_quoted(a)}" -> "{_quoted(b)}" [label="{_quoted(label)}"];' for a, b, label in arrows(plan)]
    return "\n".join([*lines, "}"]) + "\n"


def text(plan: Json) -> str:
    """The stages in their order, each with what comes in and what it makes."""
    lines = []
    for stage in plan["stages"]:
        lines.append(stage["address"])
        for origin, to, label in arrows(plan):
            if to == stage["address"]:
                lines.append(f"  <- {origin}  ({label})")
        lines += [f"  -> {name}  {path}" for name, path in stage["artifacts"].items()]
    return "\n".join(lines) + "\n"


def _nodes(plan: Json) -> dict[str, tuple[str, list[str]]]:
    """Every end of an arrow: its kind and the lines of its label."""
    stages = {stage["address"]: stage for stage in plan["stages"]}
    out: dict[str, tuple[str, list[str]]] = {}
    for arrow in arrows(plan):
        for name in arrow[:2]:
            if name in stages:
                batch = stages[name]["batch"]
                unit = "rollouts" if "rollouts" in batch else "updates"
                count = "" if batch[unit] is None else f"{batch[unit]} {unit}"
                out[name] = ("stage", [name, *([count] if count else [])])
            elif name in plan["models"]:
                source = plan["models"][name]["from"]
                label = "from scratch" if source is None else source.get("hub") or source["path"]
                out[name] = ("model", [name, label])
            else:
                out[name] = ("data", [name])
    return out


def _id(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')
