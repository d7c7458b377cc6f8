"""A finished run executed once more in a scratch folder, and how far the two agree.

From weak to strong: the inputs (hashes, checked before a stage starts), the batches (the hash of all rows, and the
fingerprints and counts in the metrics), the metrics of every update and evaluation, the bits of the weights. Each stage
is given the models that the run itself made before it, so that a stage answers for itself alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import keys, lock, places
from rlhfdsl.running import schedule, weights
from rlhfdsl.running.metrics import BATCHES, known, read_metrics
from rlhfdsl.running.supervisor import execute

Json = dict[str, Any]
Show = Callable[[Json, Json], None]
LEVELS = ("inputs", "batches", "metrics", "bits")
_COMPARED = ("update", "eval", "invariants")
_COUNTS = ("tokens", "eval_rows", "eval_pairs", *BATCHES)


@dataclass(slots=True)
class Agreement:
    """How far one stage came out the same.

    level: the strongest of LEVELS that holds with all before it. asked: the strongest that was looked at, "bits" of a
    whole stage. first: the first difference. largest: the largest relative difference of a number in the metrics.
    events: how many were compared. notes: what differs around the run (versions, devices).
    """

    stage: str
    asked: str
    level: str = "inputs"
    first: str | None = None
    largest: float = 0.0
    events: int = 0
    notes: list[str] = field(default_factory=list)


class _Enough(Exception):
    """The updates that were asked for are done."""


def verify(
    run: Path, base: Path | None, show: Show, *, stages: Sequence[str] = (), updates: int | None = None
) -> list[Agreement]:
    """Execute the finished stages of a run again, beside it, and compare. Nothing of the run is changed.

    run: a folder that `rlhf run` wrote. base: the folder of its inputs, None for the one that the run noted.
    stages: names or addresses, all finished ones when empty. updates: do so many of each stage and compare those.
    Raises UserError when there is nothing to execute, when an input changed, and when a stage fails.
    """
    plan = _plan(run)
    chosen = list(_chosen(plan, stages))
    for stage in chosen if updates is not None else ():
        _has_metrics(stage, updates)
    found = []
    with tempfile.TemporaryDirectory(prefix=f"{run.resolve().name}.verify-", dir=run.resolve().parent) as scratch:
        for stage in chosen:
            where = base if base is not None else _base(run, stage)
            folder = Path(scratch) / stage["address"].removeprefix("stage.")
            found.append(_again(plan, stage, where, folder, show, updates))
            shutil.rmtree(folder, ignore_errors=True)
    return found


def _plan(run: Path) -> Json:
    """The plan of a run, with its outputs where the run lies now."""
    from rlhfdsl.planning.validate import validate_plan

    path = run / "plan.json"
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        validate_plan(plan)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            "E0756", f"`{run}` is not a run: it has no plan.json that can be read", place=str(path),
            help="give the folder that `rlhf run` wrote, e.g. runs/quickstart",
        ) from error  # fmt: skip
    return places.relocate(plan, str(run))


def _chosen(plan: Json, wanted: Sequence[str]) -> Iterator[Json]:
    """The stages to execute again: finished, and made by this plan."""
    made = keys.keys(plan)
    names = {f"stage.{name.removeprefix('stage.')}" for name in wanted}
    for name in sorted(names - set(made)):
        raise UserError("E0756", f"the run has no {name}", help=f"it has {', '.join(made)}")
    done = False
    for stage in plan["stages"]:
        if names and stage["address"] not in names:
            continue
        result = schedule.read_result(Path(stage["output"]))
        if result is None and not names:
            continue
        if result is None:
            raise UserError("E0756", f"{stage['address']} is not finished", help="finish it with `rlhf run`")
        if result.get("key") != made[stage["address"]]:
            raise UserError(
                "E0756", f"{stage['address']} was not made by the plan that is in the run's folder",
                place=stage["output"], help="run it again, or name other stages with --stage",
            )  # fmt: skip
        done = True
        yield stage
    if not done:
        raise UserError("E0756", "no stage of the run is finished", help="finish it with `rlhf run`")


def _has_metrics(stage: Json, updates: int) -> None:
    """Refuse a prefix in which the stage wrote nothing that could be compared."""
    unit, every = schedule.unit(stage), stage["settings"]["log"]
    if updates < min(every, stage["batch"][unit]):
        raise UserError(
            "E0756", f"{stage['address']} wrote its metrics every {every} {unit}, none of the first {updates}",
            help=f"--updates {every} or more, or only other stages with --stage",
        )  # fmt: skip


def _base(run: Path, stage: Json) -> Path:
    noted = (schedule.read_result(Path(stage["output"])) or {}).get("base")
    if noted is None:
        raise UserError("E0756", "the run did not note where its inputs are", help="name their folder: --base FOLDER")
    return run / noted


def _again(plan: Json, stage: Json, base: Path, folder: Path, show: Show, updates: int | None) -> Agreement:
    """Execute one stage with `folder` as its run, the stages that it needs being those of the run, and compare."""
    needed = _upstream(plan, stage)
    first = [before for before in plan["stages"] if before["address"] in needed]
    again = places.relocate({**plan, "stages": first}, str(folder))
    folder.mkdir()
    for before, there in zip(first[:-1], again["stages"][:-1], strict=True):
        # A link: whatever is done with the scratch folder, the run's own stays where and what it is.
        Path(there["output"]).symlink_to(Path(before["output"]).resolve(), target_is_directory=True)
    output = Path(again["stages"][-1]["output"])

    def follow(current: Json, event: Json) -> None:
        show(current, event)
        mine = current["address"] == stage["address"] and event["event"] == "update"
        if mine and updates is not None and event["update"] >= updates and event["update"] < event["of"]:
            raise _Enough

    try:
        execute(again, base, follow)
    except _Enough:
        output = schedule.partial_of(output)
    original = Path(stage["output"])
    events = read_metrics(original / "metrics.jsonl"), read_metrics(output / "metrics.jsonl")
    found = compare(stage["address"], *events, until=updates if output.suffix == schedule.PARTIAL else None)
    result = schedule.read_result(original) or {}
    if found.asked == "bits":
        then = result.get("files") or weights.hashes(stage, original)
        differs = weights.difference(weights.elsewhere(then), weights.elsewhere(weights.hashes(stage, output)))
        if differs is None and found.level == "metrics":
            found.level = "bits"
        found.first = found.first or differs
    versions = result.get("versions", {})
    here = lock.packages(versions)
    found.notes += [
        f"{name} {version} then, {here[name]} now" for name, version in versions.items() if here[name] != version
    ]
    return found


def _upstream(plan: Json, stage: Json) -> set[str]:
    """The address of a stage and of all that it needs."""
    by_address = {other["address"]: other for other in plan["stages"]}
    found: set[str] = set()
    waiting = [stage["address"]]
    while waiting:
        address = waiting.pop()
        if address in by_address and address not in found:
            found.add(address)
            waiting += by_address[address]["needs"]
    return found


def compare(stage: str, then: Sequence[Json], now: Sequence[Json], *, until: int | None = None) -> Agreement:
    """Compare the metrics of two executions of a stage.

    until: the last update of `now`, which was stopped there; None when it is whole, and its weights can be compared.
    """
    found = Agreement(stage, "bits" if until is None else "metrics", "metrics")
    old, new = _numbered(then, until), _numbered(now, until)
    for place in dict.fromkeys((*old, *new)):
        a, b = old.get(place), new.get(place)
        if a is None or b is None:
            if until is not None and b is None and place[1] == until:
                continue  # it was stopped at that update, before what follows it
            _differs(found, f"{_at(place)} is {'missing now' if b is None else 'new'}", "batches")
            continue
        found.events += 1
        for name in dict.fromkeys((*a, *b)):
            if _timed(name) or a.get(name) == b.get(name) or not known(name, a, b):
                continue
            level = "batches" if name in _COUNTS else "metrics"
            _differs(found, f"{_at(place)}: {name} {a.get(name)} then, {b.get(name)} now", level)
            if name not in BATCHES:
                found.largest = max(found.largest, _relative(a.get(name), b.get(name)))
    return found


def _differs(found: Agreement, text: str, level: str) -> None:
    """Note a difference that breaks `level`, and with it all that are stronger."""
    found.first = found.first or text
    below = LEVELS[LEVELS.index(level) - 1]
    found.level = min(found.level, below, key=LEVELS.index)


def _numbered(events: Sequence[Json], until: int | None) -> Mapping[tuple[str, int], Json]:
    """The events that are compared, by kind and update."""
    found = {}
    for event in events:
        update = event.get("update", 0)
        if event["event"] in _COMPARED and (until is None or update <= until):
            found[event["event"], update] = event
    return found


def _at(place: tuple[str, int]) -> str:
    return f"{place[0]} {place[1]}" if place[0] != "invariants" else "the check before the first update"


def _timed(name: str) -> bool:
    return name == "time" or name.startswith("seconds") or "_per_second" in name or "memory" in name


def _relative(a: Any, b: Any) -> float:
    if not all(isinstance(value, int | float) for value in (a, b)):
        return float("inf")
    return float(abs(a - b) / max(abs(a), abs(b), 1e-12))
