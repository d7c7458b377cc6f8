"""One recipe on other hardware or with other models: what each plan says, in a line.

`rlhf plan --gpus 1,2,4,8` is the curve over GPUs, `rlhf plan --largest FAMILY` the largest model that fits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhfdsl.language.diagnostics import Diagnostic
from rlhfdsl.language.recipe import Recipe, Reference
from rlhfdsl.planning import catalog, figures, memory
from rlhfdsl.planning.hardware import Target
from rlhfdsl.planning.placing import base_of

Json = dict[str, Any]
_SIZE = re.compile(r"-(\d+(\.\d+)?[mb]\b|\d+b\d+).*$", re.IGNORECASE)
_HEAD = ("time", "cost", "GiB peak", "of usable", "GiB of the host")
BOUND = {"E0712": "device", "E0719": "host"}
_TRAINED = re.compile(r"-(instruct|it|chat)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Point:
    """One plan of several. seconds, cost, peak and usable are None where unknown; `error` says why there is no plan.

    peak, usable: bytes of one device. host, host_usable: bytes of a node's memory.
    layout: ZeRO stage and offload of engines that train. bound: which memory is too small, "device" or "host".
    """

    name: str
    world: int
    seconds: float | None = None
    cost: float | None = None
    peak: int | None = None
    usable: int | None = None
    host: int | None = None
    host_usable: int | None = None
    layout: str = ""
    bound: str | None = None
    error: str | None = None


def point(name: str, plan: Json | None, found: Sequence[Diagnostic], target: Target) -> Point:
    """What there is to say of a plan, or of what stood against it."""
    usable = memory.usable(target.host)
    if plan is None:
        errors = [diagnostic.message for diagnostic in found if diagnostic.severity == "error"]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        bound = next((BOUND[diagnostic.code] for diagnostic in found if diagnostic.code in BOUND), None)
        return Point(name, target.world, host_usable=usable, bound=bound, error=errors[0] + more)
    time = plan["time"] or {"seconds": None, "cost": None}
    memories = [stage["memory"] for stage in plan["stages"]]
    tightest = next((one for one in memories if one["peak"] is None), None)  # it may be that one
    tightest = tightest or max(memories, key=lambda one: one["peak"])
    host = max((one["host"] or 0 for one in memories), default=0)
    return Point(
        name, target.world, time["seconds"], time["cost"], tightest["peak"], tightest["usable"], host, usable,
        _layout(plan),
    )  # fmt: skip


def _layout(plan: Json) -> str:
    """`sft 2, actor 3 + optimizer`: the engines that train, equal ones together."""
    users: dict[str, list[str]] = {}
    for stage in plan["stages"]:
        for name, engine in stage["engines"].items():
            if engine["trains"]:
                said = f"{engine['zero']}" + ("" if engine["offload"] == "off" else f" + {engine['offload']}")
                at = stage["address"].removeprefix("stage.") if len(stage["engines"]) == 1 else name
                users.setdefault(said, []).append(at)
    if len(users) == 1:
        return next(iter(users))
    return ", ".join(f"{' '.join(names)} {said}" for said, names in users.items())


def curve(points: Sequence[Point]) -> str:
    """Time, cost, memory and efficiency over GPUs: that of twice the GPUs in half the time is 100 %."""
    first = next((p for p in points if p.seconds), None)
    rows = [["GPUs", *_HEAD, "efficiency", "ZeRO"]]
    for p in points:
        if p.error is not None:
            rows.append([p.name, p.error, "", "", "", "", "", ""])
            continue
        speed = first.seconds * first.world / (p.seconds * p.world) if first and first.seconds and p.seconds else None
        rows.append([p.name, *_cells(p), "-" if speed is None else f"{speed:.0%}", p.layout])
    return _text(rows)


def sizes(points: Sequence[Point]) -> str:
    """Models of a family, small to large, the largest that fits, and whose memory holds back the next."""
    rows = [["model", *_HEAD, "ZeRO"]]
    for p in points:
        rows.append([p.name, p.error, "", "", "", "", ""] if p.error is not None else [p.name, *_cells(p), p.layout])
    if any(p.error is None and p.peak is None for p in points):
        return _text(rows) + "\nwhich of them fits is not known: `rlhf lock` reads what the plans lack\n"
    fitting = [at for at, p in enumerate(points) if p.error is None]
    last = f"largest: {points[fitting[-1]].name}" if fitting else "none of them fits"
    after = points[fitting[-1] + 1 if fitting else 0 :]
    if after and after[0].bound is not None:
        whose = {"device": "a GPU's memory is too small", "host": "the host's memory is too small"}[after[0].bound]
        last += f"; {whose} for {after[0].name}"
    if any(p.error is None and p.host and p.host_usable is None for p in points):
        last += "\nthe host's memory is not known here: with `--host-memory GIB` offload is held to it"
    return _text(rows) + f"\n{last}\n"


def _cells(p: Point) -> list[str]:
    share = "-" if p.peak is None or p.usable is None else f"{p.peak / p.usable:.0%}"
    return [
        "-" if p.seconds is None else f"~ {figures.duration(p.seconds)}",
        "-" if p.cost is None else f"~ ${p.cost:,.0f}" if p.cost >= 100 else f"~ ${p.cost:.2f}",
        "-" if p.peak is None else figures.gib(p.peak),
        share,
        figures.gib(p.host) if p.host else "-",
    ]


def _text(rows: Iterable[Sequence[str]]) -> str:
    """Columns; a row that only says why there is no plan runs over them."""
    rows = list(rows)
    whole = [row for row in rows if any(row[2:])]
    width = max(len(row[0]) for row in rows)
    lines = iter(figures.table([[row[0].ljust(width), *row[1:]] for row in whole]))
    return "".join((next(lines) if any(row[2:]) else f"{row[0]:<{width}}  {row[1]}".rstrip()) + "\n" for row in rows)


# ---- the models of a family


def actor_of(recipe: Recipe) -> str:
    """The address of the model that the last stage with an actor trains, else of the last stage's."""
    stages = [stage for stage in recipe.stages if "actor" in stage.blocks] or list(recipe.stages)
    block = stages[-1].blocks.get("actor", stages[-1])
    reference: Reference = block["model"]
    return base_of(recipe, reference)


def family(name: str) -> list[str]:
    """The hub ids of the catalog that are of a family, one of each size, small to large.

    `name` is a family (`opt`, `qwen2.5`) or one of its models (`facebook/opt-1.3b`). A family of one size takes in
    those whose names go on (`gpt2-medium`).
    """
    wanted, known = _family(name), _counts()
    exact = {hub: count for hub, count in known.items() if _family(hub) == wanted}
    if len(set(exact.values())) < 2:
        exact = {hub: n for hub, n in known.items() if f"{_family(hub)}-".startswith(f"{wanted}-")}
    found: dict[int, str] = {}
    for hub, count in exact.items():
        if count not in found or _TRAINED.search(found[count]):
            found[count] = hub
    return [found[count] for count in sorted(found)]


def families() -> list[str]:
    """Every family of the catalog."""
    return sorted({_family(hub) for hub in catalog.names()})


def _family(hub: str) -> str:
    return _SIZE.sub("", hub.rpartition("/")[2]).lower().removeprefix("meta-")


def _counts() -> dict[str, int]:
    counts = {}
    for hub in catalog.names():
        numbers = catalog.lookup(hub)
        shape = catalog.shape(numbers) if numbers is not None else None
        count = catalog.parameters(shape) if shape is not None else None
        if count is not None:
            counts[hub] = count
    return counts
