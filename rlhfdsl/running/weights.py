"""The files of a stage's models by their hashes: noted when the stage is complete, compared later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhfdsl.planning import lock

Json = dict[str, Any]


def hashes(stage: Mapping[str, Any], folder: Path) -> dict[str, Json]:
    """`model/model.safetensors` -> {"bytes", "sha256"} of every file of a stage's artifacts in `folder`."""
    found = {}
    for name in sorted(Path(path).name for path in stage["artifacts"].values()):
        for path in sorted((folder / name).rglob("*")):
            if path.is_file():
                pin = lock.pin(path)
                found[path.relative_to(folder).as_posix()] = {"bytes": pin["bytes"], "sha256": pin["sha256"]}
    return found


def elsewhere(files: Mapping[str, Json]) -> dict[str, Json]:
    """Of `hashes`, what a run in another folder makes too.

    The configuration of adapters names the folder of their base; what else it says is the plan's.
    """
    return {name: pin for name, pin in files.items() if Path(name).name != "adapter_config.json"}


def difference(then: Mapping[str, Json], now: Mapping[str, Json]) -> str | None:
    """The first file of two sets of `hashes` that differs, as a sentence; None when they are the same."""
    for name in sorted({*then, *now}):
        if name not in then or name not in now:
            return f"{name} is {'gone' if name in then else 'new'}"
        if then[name]["sha256"] != now[name]["sha256"]:
            return f"{name} is {then[name]['sha256'][:23]}… then, {now[name]['sha256'][:23]}… now"
    return None
