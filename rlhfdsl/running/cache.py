"""What runs have left on the disk: finished stages, replaced ones, broken-off ones; what may go, and what is whole.

A finished stage is kept in its run's folder with its key (result.json), so the folders themselves are the cache and
nothing else has to agree with them. Nothing is looked for outside the runs, and no link is followed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhfdsl.engines.checkpoint import store
from rlhfdsl.planning import keys
from rlhfdsl.running import schedule, weights

Json = dict[str, Any]
State = Literal["current", "other", "aside", "partial", "inputs", "models"]
QUIET_SECONDS = 3600.0  # what was written to later than this may be running, here or on another machine
_FOLDER = re.compile(r"(?P<stage>.+?)(\.(?P<number>\d+))?(?P<partial>\.partial)?")
_DOOMED = ".removed"
_DEPTH = 6  # folders below the one that is given


@dataclass(frozen=True, slots=True)
class Entry:
    """A folder of a run. state: "current" (finished, of the run's plan), "other" (finished, of another plan), "aside"
    (finished and replaced), "partial" (broken off or running), "inputs" (of a bundle), "models" (made from scratch).

    number: of a folder that was moved aside. changed: when it was last written to, seconds of the epoch.
    """

    run: Path
    stage: str
    folder: Path
    state: State
    number: int | None
    key: str | None
    bytes: int
    changed: float


def entries(root: Path) -> list[Entry]:
    """Everything that the runs in `root` (a run, or a folder of runs) hold, in the order of their folders."""
    return [entry for run in runs(root) for entry in _of_run(run)]


def runs(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The runs in a folder: folders with a plan.json. Nothing in a run is a run."""
    if (root / "plan.json").is_file():
        yield root
    elif depth and root.is_dir():
        for path in sorted(root.iterdir()):
            if path.is_dir() and not path.is_symlink():
                yield from runs(path, depth - 1)


def _of_run(run: Path) -> Iterator[Entry]:
    made = keys_of(run)
    for folder in sorted(run.iterdir(), key=_order):
        if folder.is_symlink() or not folder.is_dir():
            continue
        match = _FOLDER.fullmatch(folder.name)
        assert match is not None  # any name matches
        number = None if match["number"] is None else int(match["number"])
        result = schedule.read_result(folder)
        key = None if result is None else str(result.get("key"))
        state: State
        if folder.name.startswith(".") and folder.name.endswith(_DOOMED):
            state, number = "aside", 0
        elif match["partial"]:
            state = "partial"
        elif result is not None:
            same = key == made.get(f"stage.{match['stage']}")
            state = "aside" if number is not None else "current" if same or not made else "other"
        elif folder.name.startswith("bundle-"):
            state = "inputs"
        elif folder.name == "models":
            state = "models"
        else:
            continue  # not what a run writes
        size, changed = _measure(folder)
        yield Entry(run, match["stage"], folder, state, number, key, size, changed)


def _order(folder: Path) -> tuple[str, int, str]:
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None
    return match["stage"], int(match["number"] or 0), folder.name


def keys_of(run: Path) -> dict[str, str]:
    """The keys of a run's plan; none when it is of a form that this program does not read."""
    try:
        return keys.keys(json.loads((run / "plan.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _measure(folder: Path) -> tuple[int, float]:
    """Bytes and the latest change of all in a folder; links count as themselves."""
    total, latest = 0, folder.lstat().st_mtime
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = Path(parent, name).lstat()
            except OSError:
                continue  # it is gone meanwhile
            total, latest = total + status.st_size, max(latest, status.st_mtime)
    return total, latest


def garbage(found: Sequence[Entry], *, keep: int = 0, partial: bool = False) -> tuple[list[Entry], list[Entry]]:
    """What may be removed, and what would be but for signs of life.

    keep: so many of the newest replaced results of each stage stay. partial: broken-off stages with their checkpoints
    go too. What no run has replaced, inputs and models always stay.
    """
    asides: dict[tuple[Path, str], list[Entry]] = {}
    chosen = [entry for entry in found if partial and entry.state == "partial"]
    for entry in found:
        if entry.state == "aside" and entry.number == 0:
            chosen.append(entry)  # a removal that was broken off
        elif entry.state == "aside":
            asides.setdefault((entry.run, entry.stage), []).append(entry)
    for several in asides.values():
        several.sort(key=lambda entry: entry.number or 0)
        chosen += several[: len(several) - keep] if keep else several
    chosen.sort(key=lambda entry: (entry.run, _order(entry.folder)))
    alive = [entry for entry in chosen if entry.state == "partial" and time.time() - entry.changed < QUIET_SECONDS]
    return [entry for entry in chosen if entry not in alive], alive


def remove(entry: Entry) -> None:
    """Delete a folder that `garbage` named. Raises OSError when it cannot be."""
    if entry.folder.is_symlink() or entry.folder.parent != entry.run:
        return
    # First another name: a folder that is half deleted must not look like a result.
    doomed = entry.folder
    if not doomed.name.endswith(_DOOMED):
        doomed = doomed.rename(doomed.with_name(f".{doomed.name}{_DOOMED}"))
    shutil.rmtree(doomed)


def damage(entry: Entry) -> str | None:
    """What is wrong with the files of an entry, as a sentence; "" when nothing says what they must be, None when whole.

    Every file of a result's models, or of each checkpoint of a partial stage, is read and compared with its hash.
    """
    if entry.state == "partial":
        checkpoints = store.all_of(entry.folder / store.FOLDER)
        for path in checkpoints:
            manifest = store.read(path)
            found = manifest if isinstance(manifest, str) else store.damage(path, manifest)
            if found is not None:
                return found
        return None if checkpoints else ""
    noted = (schedule.read_result(entry.folder) or {}).get("files")
    if not isinstance(noted, dict):
        return ""
    tops = {name.split("/")[0] for name in noted}
    return weights.difference(noted, weights.hashes({"artifacts": {top: top for top in tops}}, entry.folder))
