"""What a stage was predicted to need and take, beside what was measured of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = Mapping[str, Any]
_PPO = ("generate", "score", "train")


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of one device at most, whole and by phase where known; seconds of one update or rollout by phase."""

    peak: int | None
    peaks: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: `phase` is "" for the whole; `unit` is "GiB" or "s"."""

    phase: str
    unit: str
    predicted: float | None
    measured: float | None

    @property
    def off(self) -> float | None:
        """(predicted - measured) / measured; None when one of them is unknown."""
        return self.predicted / self.measured - 1 if self.predicted is not None and self.measured else None


def of_events(events: Iterable[Json]) -> Measured:
    """Of a stage's metrics: the peak of its end, medians of its updates, the first apart, which warms up."""
    updates, peak = [], None
    for event in events:
        if event["event"] == "update":
            updates.append(event)
        elif event["event"] == "end":
            peak = event.get("peak_memory")
    return Measured(peak, {}, medians([_seconds(event) for event in updates]))


def medians(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each phase's seconds, without the first update where there are more."""
    kept = updates[1:] or updates
    return {phase: statistics.median(update[phase] for update in kept) for phase in (kept[0] if kept else ())}


def _seconds(event: Json) -> dict[str, float]:
    if "seconds_train" in event:
        return {phase: event[f"seconds_{phase}"] for phase in _PPO}
    return {"train": event["seconds"]} if "seconds" in event else {}


def rows(stage: Json, measured: Measured) -> list[Row]:
    """A stage of a plan beside what was measured, GiB and seconds: the whole, then each phase that was measured."""
    memory, each = stage["memory"], (stage["time"] or {}).get("each", {})
    out = [
        Row("", "GiB", _gib(memory["peak"]), _gib(measured.peak)),
        Row("", "s", sum(each.values()) if each else None, sum(measured.seconds.values()) or None),
    ]
    for phase in _PPO if "rollouts" in stage["batch"] else ():
        predicted = memory["phases"].get(phase)
        bytes_ = None if predicted is None else predicted["peak"]
        if phase in measured.peaks or phase in measured.seconds:
            out.append(Row(phase, "GiB", _gib(bytes_), _gib(measured.peaks.get(phase))))
            out.append(Row(phase, "s", each.get(phase), measured.seconds.get(phase)))
    return out


def unit(stage: Json) -> str:
    """What the seconds of a stage are of."""
    return "rollout" if "rollouts" in stage["batch"] else "update"


def record(stage: Json, events: Iterable[Json]) -> dict[str, Any]:
    """Peak bytes of a device and seconds of an update or rollout by phase, predicted and measured."""
    found, time = of_events(events), stage["time"]
    return {
        "predicted": {"peak_memory": stage["memory"]["peak"], "seconds_each": time["each"] if time else None},
        "measured": {"peak_memory": found.peak, "seconds_each": dict(found.seconds) or None},
    }


def cells(row: Row) -> list[str]:
    """Predicted, measured and how far off, as a table shows them."""
    off = "-" if row.off is None else f"{'+' if row.off >= 0 else '-'}{abs(row.off):.0%}"
    return [*(_cell(value, row.unit) for value in (row.predicted, row.measured)), off]


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if unit == "GiB" and value >= 10 else f"{value:.2f}" if unit == "GiB" else f"{value:.3f}"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _gib(count: int | None) -> float | None:
    return None if count is None else count / 2**30
