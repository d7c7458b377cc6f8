"""A stage's metrics file: one JSON object a line, written by rank 0, followed by the supervisor."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BATCHES = ("batch", "ptx_batch")  # fingerprints of what an update read; versions before them wrote none


def known(name: str, *events: Mapping[str, Any]) -> bool:
    """Whether two runs can be compared by a metric: by a fingerprint of a batch only where both have it."""
    return name not in BATCHES or all(name in event for event in events)


class MetricsWriter:
    """Appends events to a file, each line whole: {"event", "time", …numbers}; a number that is not finite is null."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, event: str, **values: Any) -> None:
        line = {"event": event, "time": round(time.time(), 3)} | {key: _plain(v) for key, v in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


class MetricsFollower:
    """Reads a growing metrics file: each `new` returns the events that were completed since the last call."""

    def __init__(self, path: Path):
        self.path = path
        self.position = 0

    def new(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self.position += len(line)
                yield json.loads(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a finished stage."""
    return list(MetricsFollower(path).new())


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(f"{value:.8g}") if isinstance(value, float) else value
