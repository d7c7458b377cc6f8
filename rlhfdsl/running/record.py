"""The record of a run in a bundle: metrics and hashes of what it made, for whoever runs the bundle elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import archive, keys
from rlhfdsl.running import schedule, weights
from rlhfdsl.running.metrics import read_metrics
from rlhfdsl.running.verify import Agreement, compare

Json = dict[str, Any]
METRICS = "metrics.jsonl"
# Of a result: where the inputs were is the maker's own matter.
_KEPT = ("key", "stage", "evaluation", "seconds", "versions", "python", "target", "files")


def collect(plan: Json, run: Path) -> dict[str, bytes]:
    """`sft/metrics.jsonl`, `sft/result.json` of every finished stage of a run of this plan.

    Raises UserError when a stage was made by another plan, when its metrics are damaged, and when none is finished.
    """
    made, found = keys.keys(plan), {}
    for stage in plan["stages"]:
        name = stage["address"].removeprefix("stage.")
        result = schedule.read_result(run / name)
        if result is None:
            continue
        if result.get("key") != made[stage["address"]]:
            raise UserError("E0756", f"{stage['address']} in `{run}` was made by another plan", place=str(run / name),
                            help="run the recipe as it is bundled, with the same --set, -p and lock")  # fmt: skip
        kept = {key: result[key] for key in _KEPT if key in result}
        found[f"{name}/{schedule.RESULT}"] = (json.dumps(kept, indent=1, sort_keys=True) + "\n").encode()
        read_metrics(run / name / METRICS)  # raises for a damaged one, here and not where it is compared
        found[f"{name}/{METRICS}"] = (run / name / METRICS).read_bytes()
    if not found:
        raise UserError("E0756", f"no stage of `{run}` is finished", help="finish it with `rlhf run`")
    return found


def against(run: Path, record: Mapping[str, bytes], name: str) -> list[Agreement]:
    """How far a run agrees with the record of another, stage by stage; nothing is executed.

    name: of the bundle, for messages. Raises UserError when the record is none, and when the two have no stage in
    common that is of one plan.
    """
    found = []
    for stage in sorted({path.split("/")[0] for path in record}):
        try:
            result = json.loads(record[f"{stage}/{schedule.RESULT}"])
            events = [json.loads(line) for line in record[f"{stage}/{METRICS}"].splitlines()]
            key, files, versions = result["key"], dict(result["files"]), dict(result["versions"])
            now = schedule.read_result(run / stage)
            if now is None:
                continue
            if now.get("key") != key:
                raise UserError("E0756", f"stage.{stage} in `{run}` was made by another plan than in `{name}`",
                                place=str(run / stage), help=f"run it with `rlhf run {name}`")  # fmt: skip
            one = compare(f"stage.{stage}", events, read_metrics(run / stage / METRICS))
            made = now.get("files") or weights.hashes({"artifacts": _tops(files)}, run / stage)
            differs = weights.difference(weights.elsewhere(files), weights.elsewhere(made))
        except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise archive.unusable(name, "has a record that cannot be read") from error
        if differs is None and one.level == "metrics":
            one.level = "bits"
        one.first = one.first or differs
        here = now.get("versions", {})
        one.notes += [f"{k} {v} there, {here[k]} here" for k, v in versions.items() if here.get(k, v) != v]
        one.notes += [f"{_device(result)} there, {_device(now)} here"] if _device(result) != _device(now) else []
        found.append(one)
    if not found:
        raise UserError("E0756", f"`{run}` and the record in `{name}` have no finished stage in common", place=name,
                        help=f"make one with `rlhf run {name}`")  # fmt: skip
    return found


def _tops(files: Mapping[str, Any]) -> dict[str, str]:
    return {path.split("/")[0]: path.split("/")[0] for path in files}


def _device(result: Mapping[str, Any]) -> str:
    target = result.get("target") or {}
    return f"{target.get('world')} x {target.get('gpu') or target.get('device')}"
