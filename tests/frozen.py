"""What a finished run measured, held to the numbers of a run that was kept: tests/running/frozen/NAME.json.

Such numbers say nothing about what is right; they tell that something changed. `pytest --update-goldens` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfdsl.running.metrics import read_metrics

Event = dict[str, Any]
Events = dict[str, list[Event]]
Tolerance = Callable[[str, Event], tuple[float, float] | None]
KEPT = ("update", "eval", "invariants")


def measured(run: Path) -> Events:
    """The updates, evaluations and invariants of each stage of a run, without times."""
    plan = json.loads((run / "plan.json").read_text())
    stages = [stage["address"].removeprefix("stage.") for stage in plan["stages"]]
    return {
        stage: [
            {key: value for key, value in event.items() if key != "time" and "second" not in key}
            for event in read_metrics(run / stage / "metrics.jsonl") if event["event"] in KEPT
        ]
        for stage in stages
    }  # fmt: skip


def held(found: Events, name: str, config: pytest.Config, tolerance: Tolerance) -> Events:
    """Compare `found` with the kept numbers `name`, or keep it with --update-goldens; returns the kept ones.

    tolerance: (relative, absolute) of the numbers of a stage's event, which add up; None leaves the event out.
    Counts, names and fingerprints of batches are equal.
    """
    path = Path(__file__).parent / "running" / "frozen" / f"{name}.json"
    if config.getoption("--update-goldens"):
        path.write_text(_lines(found))
    kept: Events = json.loads(path.read_text())
    assert {s: len(events) for s, events in found.items()} == {s: len(events) for s, events in kept.items()}
    apart = []
    for stage, events in kept.items():
        for event, other in zip(events, found[stage], strict=True):
            allowed = tolerance(stage, event)
            assert event.keys() == other.keys(), (stage, event)
            for key in event if allowed is not None else ():
                times = _apart(event[key], other[key], *allowed)
                if times > 1:
                    at = f"{stage} {event['event']} {event.get('update', '')} {key}"
                    apart.append((times, f"{at}: {event[key]} kept, {other[key]} found"))
    worst = [text for _, text in sorted(apart, reverse=True)[:10]]
    assert not apart, f"{len(apart)} numbers differ from {path.name}; --update-goldens writes it\n" + "\n".join(worst)
    return kept


def _lines(events: Events) -> str:
    """JSON with an event in each line."""
    stages = []
    for stage, own in events.items():
        lines = ",\n".join(f"  {json.dumps(event)}" for event in own)
        stages.append(f' "{stage}": [\n{lines}\n ]')
    return "{\n" + ",\n".join(stages) + "\n}\n"


def _apart(kept: Any, found: Any, relative: float, absolute: float) -> float:
    """How many times the tolerance two values are apart."""
    if isinstance(kept, float) and isinstance(found, float):
        return abs(kept - found) / (absolute + relative * abs(kept))
    return 0.0 if kept == found else float("inf")
