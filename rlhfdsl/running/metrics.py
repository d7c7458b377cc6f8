"""A stage's metrics file: one JSON object a line, written by rank 0, followed by the supervisor."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from rlhfdsl.language.diagnostics import UserError

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
    """Reads a growing metrics file: each `new` returns the events that were completed since the last call.

    Raises UserError for a line that is none of an event: the file was cut, or something else wrote into it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.position = 0
        self.lines = 0

    def new(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self.position += len(line)
                self.lines += 1
                yield self._event(line)

    def _event(self, line: bytes) -> dict[str, Any]:
        return _object(line, {"event"}, f"{self.path}:{self.lines}", "metrics")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a finished stage."""
    return list(MetricsFollower(path).new())


def read_texts(path: Path, names: Set[str]) -> list[dict[str, Any]]:
    """The lines of a stage's samples.jsonl or answers.jsonl, each with `names`; none where the stage wrote none.

    Raises UserError for a line that is damaged; the last one may still be written.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        lines = [line for line in file if line.endswith(b"\n")]
    return [_object(line, names, f"{path}:{number}", "texts") for number, line in enumerate(lines, 1)]


def _object(line: bytes, names: Set[str], place: str, what: str) -> dict[str, Any]:
    """A line as the object that it holds, which has `names`."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not names <= found.keys():
        raise UserError("E0720", f"a line of the {what} is damaged", place=place,
                        help="take the line out, or delete the stage's folder to run it again")  # fmt: skip
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(f"{value:.8g}") if isinstance(value, float) else value
