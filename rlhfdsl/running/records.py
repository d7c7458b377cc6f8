"""What runs left behind, and two of them side by side: versions, metrics, evaluation, the first update that differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import figures, measured
from rlhfdsl.running.metrics import BATCHES, known, read_metrics
from rlhfdsl.running.schedule import partial_of, read_result

Json = dict[str, Any]
# What another run of the same numbers measures anew.
_TIMED = ("time", "seconds", "tokens_per_second", "generated_per_second", "tflop_per_second", "peak_memory")


@dataclass(frozen=True, slots=True)
class Record:
    """One stage of a run: its folder, its result.json (None while it is not complete), and its metrics."""

    folder: Path
    result: Json | None
    events: list[Json]

    @property
    def updates(self) -> list[Json]:
        return [event for event in self.events if event["event"] == "update"]


@dataclass(frozen=True, slots=True)
class Run:
    """A folder that `rlhf run` wrote: the plan, and the stages that are complete or begun."""

    folder: Path
    plan: Json
    stages: Mapping[str, Record]

    @property
    def versions(self) -> Json:
        """Versions of packages and of Python, and the devices, of the last stage that is complete; what its result does
        not say is not there."""
        done = [record.result for record in self.stages.values() if record.result is not None]
        if not done:
            return {}
        found: Json = dict(done[-1].get("versions", {}))
        if "python" in done[-1]:
            found["python"] = done[-1]["python"]
        target = done[-1].get("target", {})
        return found | {f"target.{name}": target[name] for name in ("device", "gpu", "world") if name in target}


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder."""
    return (path / "plan.json").is_file()


def plan_of(folder: Path) -> Json:
    """The plan of a run, also of another version of this program. Raises UserError when it cannot be read."""
    path = folder / "plan.json"
    if not path.is_file():
        help = "give the folder that `rlhf run` wrote, e.g. runs/quickstart"
        if is_run(folder.parent):
            help = f"it lies in a run: give `{folder.parent}`"
        raise UserError("E0720", f"`{folder}` is not a run: it has no plan.json", help=help)
    try:
        plan: Json = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("E0720", f"the plan of the run is damaged: {error}", place=str(path)) from error
    if not isinstance(plan, dict) or "stages" not in plan:
        raise UserError("E0720", "the plan of the run holds no stages", place=str(path))
    return plan


def read(folder: Path) -> Run:
    """The record of a run; a stage that has not begun is not in it. Raises UserError for a plan that is damaged."""
    plan, stages = plan_of(folder), {}
    for stage in plan["stages"]:
        # Paths in the plan are relative to where the run was started; the folder may have been moved since.
        home = folder / Path(stage["output"]).name
        home = home if home.is_dir() else partial_of(home)
        if home.is_dir():
            stages[stage["address"]] = Record(home, read_result(home), read_metrics(home / "metrics.jsonl"))
    return Run(folder, plan, stages)


def truth(run: Run) -> str:
    """Predicted beside measured, for each stage of a run, as a table."""
    rows = [["stage", "", "predicted", "measured", "off by"]]
    for stage in run.plan["stages"]:
        record = run.stages.get(stage["address"])
        if record is None:
            continue
        for row in measured.rows(stage, measured.of_events(record.events)):
            rows.append([stage["address"], *truth_cells(stage, row)])
    return "\n".join(figures.table(rows)) + "\n"


def truth_cells(stage: Json, row: measured.Row) -> list[str]:
    """What is compared, predicted, measured and how far off, as a table shows it."""
    what = "GiB at most" if row.unit == "GiB" else "s for each " + measured.unit(stage)
    return [f"{row.phase or 'in all'}, {what}", *measured.cells(row)]


# ---- two runs


@dataclass(slots=True)
class Stages:
    """A stage in two runs. first: the update in which they part, with the metrics that differ, as (a, b); None when
    they never do in the updates that both have. batches: those of them that read the same rows, up to the first that
    does not; None when a run did not note what it read. final: evaluation, as (a, b)."""

    address: str
    updates: tuple[int, int]
    first: int | None = None
    batches: int | None = None
    differs: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    final: dict[str, tuple[Any, Any]] = field(default_factory=dict)


def versions(a: Run, b: Run) -> dict[str, tuple[Any, Any]]:
    """What differs in packages, Python and devices."""
    return _pairs(a.versions, b.versions)


def compare(a: Run, b: Run) -> list[Stages]:
    """The stages that both runs have, in the order of the second."""
    out = []
    for address, theirs in b.stages.items():
        ours = a.stages.get(address)
        if ours is None:
            continue
        found = Stages(address, (len(ours.updates), len(theirs.updates)))
        both = list(zip(ours.updates, theirs.updates, strict=False))
        found.batches = _same_batches(both)
        for left, right in both:
            differs = _pairs(_numbers(left), _numbers(right))
            differs = {name: pair for name, pair in differs.items() if known(name, left, right)}
            if differs:
                found.first, found.differs = right["update"], differs
                break
        evaluations = [(record.result or {}).get("evaluation", {}) for record in (ours, theirs)]
        found.final = {
            name: (evaluations[0].get(name), evaluations[1].get(name))
            for name in dict.fromkeys((*evaluations[1], *evaluations[0]))
        }
        out.append(found)
    return out


def render(a: Run, b: Run) -> str:
    """Versions, and each stage: where the runs part, and what they came to."""
    lines = []
    different = versions(a, b)
    if different:
        lines += ["versions", *_rows(different)]
    for stage in compare(a, b):
        count = min(stage.updates)
        lines += ["", stage.address] if lines else [stage.address]
        if stage.first is not None:
            names = list(stage.differs)
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  part at update {stage.first}: {', '.join(names[:3])}{more}")
            lines += _rows({name: stage.differs[name] for name in names[:3]}, "    ")
            lines += _batches(stage, count)
        else:
            lines.append(f"  the same numbers in {figures.count(count, 'update')}")
        if stage.updates[0] != stage.updates[1]:
            lines.append(f"  updates: {stage.updates[0]} in A, {stage.updates[1]} in B")
        lines += _rows({name: pair for name, pair in stage.final.items() if pair[0] != pair[1]})
    return "\n".join(lines) + "\n" if lines else "Neither run has a stage that the other one has.\n"


def as_json(a: Run, b: Run) -> Json:
    """The comparison as data."""
    return {
        "versions": versions(a, b),
        "stages": [
            {
                "address": stage.address, "updates": stage.updates, "part_at": stage.first, "differs": stage.differs,
                "same_batches": stage.batches, "evaluation": stage.final,
            }
            for stage in compare(a, b)
        ],
    }  # fmt: skip


def _same_batches(pairs: list[tuple[Json, Json]]) -> int | None:
    """How many pairs of updates from the first on read the same; None when one of them does not say what it read."""
    if not pairs or not all("batch" in event for pair in pairs for event in pair):
        return None
    same = [all(left.get(name) == right.get(name) for name in BATCHES) for left, right in pairs]
    return same.index(False) if False in same else len(same)


def _batches(stage: Stages, count: int) -> list[str]:
    """Of a stage that parts in its numbers: whether it read the same all the while."""
    if stage.batches is None:
        return []
    if stage.batches == count:
        return [f"  the same batches in {figures.count(count, 'update')}"]
    return [f"  the same batches in {figures.count(stage.batches, 'update')} of {count}, and then others"]


def _numbers(event: Json) -> Json:
    return {name: value for name, value in event.items() if not name.startswith(_TIMED)}


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys((*b, *a))
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _rows(pairs: Mapping[str, tuple[Any, Any]], indent: str = "  ") -> list[str]:
    if not pairs:
        return []
    cells = [["", "A", "B"], *([name, _cell(left), _cell(right)] for name, (left, right) in pairs.items())]
    return [(indent + line).rstrip() for line in figures.table(cells)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
