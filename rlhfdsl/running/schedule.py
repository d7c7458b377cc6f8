"""What a run will do with each stage, and why: take the result that is there, go on from a checkpoint, or run it.

    ppo/            a finished stage, whole, with result.json
    ppo.1/          one that was replaced, by a run with other settings
    ppo.partial/    a stage that is running or was broken off, with its checkpoints
    ppo.1.partial/  one that was broken off and then run with other settings

`decide` looks and changes nothing, so `rlhf plan` tells what `rlhf run` does; `settle` puts the folders in order
for it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhfdsl.engines.checkpoint import store
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import keys
from rlhfdsl.running import watch

PARTIAL = ".partial"  # the suffix of a stage's folder until the stage is complete
RESULT = "result.json"
SHOWN = 3  # changes that a reason names

Json = dict[str, Any]


@dataclass(frozen=True)
class Action:
    """What a run does with a stage, and the reason as a sentence.

    folder: where the result or the checkpoint lies now. update: how many updates (PPO: rollouts) are done, of `of`.
    lost: checkpoints that cannot be used, each with why. A stage is refused for a checkpoint that does not fit the
    plan, rather than to leave what it cost unused without a word.
    """

    stage: str
    do: Literal["run", "rerun", "resume", "cached", "refused"]
    reason: str
    folder: Path | None = None
    checkpoint: str | None = None
    update: int = 0
    of: int = 0
    lost: tuple[str, ...] = ()


def actions(plan: Json) -> list[Action]:
    """What a run of the plan would do now, stage by stage. Reads names, sizes and manifests only."""
    return [decide(plan, stage, keys.stamp(plan, stage)) for stage in plan["stages"]]


def decide(plan: Json, stage: Json, stamp: Json, *, thorough: bool = False, anew: bool = False) -> Action:
    """What to do with one stage.

    stamp: of this stage in the plan (`keys.stamp`). thorough: compare every file of a checkpoint with its manifest.
    anew: leave checkpoints aside.
    """
    at, output = stage["address"], Path(stage["output"])
    for folder in (output, *_numbered(output, "")):
        result = read_result(folder)
        if result is not None and result.get("key") == stamp["key"] and _has_artifacts(stage, folder):
            return Action(at, "cached", "nothing that decides its result has changed", folder)
    why, do = _why_again(plan, stage, stamp, output)
    lost: list[str] = []
    misfit = None
    for folder in (partial_of(output), *_numbered(output, PARTIAL)) if not anew else ():
        for path in store.all_of(folder / store.FOLDER):
            manifest = store.read(path)
            if isinstance(manifest, str):
                lost.append(manifest)
                continue
            if manifest["key"] != stamp["key"]:
                if do == "run" and folder == partial_of(output):
                    do, why = "rerun", _changed(plan, stage, manifest, stamp)
                break
            if manifest["layout"] != stamp["layout"]:
                misfit = misfit or _misfit(manifest, stamp)
                break
            if thorough and (found := store.damage(path, manifest)) is not None:
                lost.append(found)
                continue
            update, of = manifest["update"], manifest["of"]
            reason = f"from a checkpoint after {update} of {of} {unit(stage)}"
            return Action(at, "resume", reason, folder, path.name, update, of, tuple(lost))
    if misfit is not None:
        return Action(at, "refused", f"it has a checkpoint that does not fit this plan: {misfit}", lost=tuple(lost))
    return Action(at, do, why, lost=tuple(lost))


def settle(stage: Json, action: Action) -> Path | None:
    """Put a stage's folders in order for an action; returns the checkpoint to go on from.

    A result or a checkpoint that another run may want is moved aside and never deleted. Raises UserError when the
    stage is refused.
    """
    output = Path(stage["output"])
    partial = partial_of(output)
    if action.do == "cached":
        if action.folder != output and action.folder is not None:
            _aside(output, "")
            action.folder.rename(output)
        # A run that was killed right after it finished the stage had no time to remove them.
        shutil.rmtree(output / store.FOLDER, ignore_errors=True)
        return None
    if action.do == "refused":
        raise UserError(
            "E0793", f"{stage['address']}: {action.reason}", at=stage["address"],
            help="plan it as it was to go on, or start the stage anew with `rlhf run --anew`",
        )  # fmt: skip
    _aside(output, "")
    if action.folder != partial:
        if _holds_checkpoint(partial):
            _aside(output, PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
    if action.folder is None or action.checkpoint is None:
        partial.mkdir(parents=True)
        return None
    if action.folder != partial:
        action.folder.rename(partial)
    chosen = partial / store.FOLDER / action.checkpoint
    _go_back_to(chosen)
    return chosen


def partial_of(output: Path) -> Path:
    """The folder of a stage until it is complete."""
    return output.with_name(output.name + PARTIAL)


def unit(stage: Json) -> str:
    """What a stage counts."""
    return "rollouts" if "rollouts" in stage["batch"] else "updates"


def read_result(folder: Path) -> Json | None:
    """The result.json of a finished stage, None when there is none that can be read."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def _why_again(plan: Json, stage: Json, stamp: Json, output: Path) -> tuple[str, Literal["run", "rerun"]]:
    if not output.exists():
        return "it has not run yet", "run"
    result = read_result(output)
    if result is None:
        return f"{output} has no {RESULT} that can be read", "rerun"
    if result.get("key") == stamp["key"]:
        return f"a model that it made is gone from {output}", "rerun"
    if "decisive" not in result:
        return f"{output} is of another version, which did not note what it was made from", "rerun"
    return _changed(plan, stage, result, stamp), "rerun"


def _changed(plan: Json, stage: Json, old: Json, stamp: Json) -> str:
    """What differs from what a result or a checkpoint was made from, in words."""
    changes = keys.changes(stage, old["decisive"], stamp["decisive"], plan["origins"])
    more = f", and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return "; ".join(changes[:SHOWN]) + more if changes else "what it is made from changed"


def _misfit(manifest: Json, stamp: Json) -> str:
    """Why a checkpoint cannot be loaded as the plan lies, in words."""
    old, new = manifest["layout"], stamp["layout"]
    words = []
    if old["world"] != new["world"]:
        words.append(f"it is of {_ranks(old['world'])}, and the plan has {_ranks(new['world'])}")
    if old["device"] != new["device"]:
        words.append(f"it was made on {old['device']}, and the plan is for {new['device']}")
    for name, engine in new["engines"].items():
        for key, value in engine.items():
            was = old["engines"].get(name, {}).get(key)
            if was != value:
                words.append(f"`{name}` had {key} = {was}, and now has {value}")
    return f"after {manifest['update']} of {manifest['of']}, " + "; ".join(words)


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _has_artifacts(stage: Json, folder: Path) -> bool:
    return all((folder / Path(path).name).is_dir() for path in stage["artifacts"].values())


def _numbered(output: Path, suffix: str) -> Iterator[Path]:
    """The folders of a stage that were moved aside, newest first."""
    found = []
    for path in output.parent.glob(f"{output.name}.*{suffix}") if output.parent.is_dir() else ():
        number = path.name.removeprefix(output.name + ".").removesuffix(suffix)
        if number.isdigit() and path.name == f"{output.name}.{number}{suffix}":
            found.append((int(number), path))
    yield from (path for _, path in sorted(found, reverse=True))


def _aside(output: Path, suffix: str) -> None:
    """Give a folder of a stage the next free number, if it is there."""
    folder = output.with_name(output.name + suffix)
    if not folder.exists():
        return
    number = 1
    while (free := output.with_name(f"{output.name}.{number}{suffix}")).exists():
        number += 1
    folder.rename(free)


def _holds_checkpoint(partial: Path) -> bool:
    return any(not isinstance(store.read(path), str) for path in store.all_of(partial / store.FOLDER))


def _go_back_to(checkpoint: Path) -> None:
    """Make a stage's folder what it was when the checkpoint was made: later events and samples are dropped."""
    root = checkpoint.parent
    for path in store.all_of(root):
        if path.name > checkpoint.name:
            shutil.rmtree(path)
    manifest = store.read(checkpoint)
    assert not isinstance(manifest, str)
    for name, size in manifest["continued"].items():
        path = root.parent / name
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)
    (root.parent / store.STOP).unlink(missing_ok=True)
    shutil.rmtree(root.parent / watch.FOLDER, ignore_errors=True)
