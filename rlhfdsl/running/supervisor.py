"""Runs the stages of a plan in order, each in worker processes, and follows them through their metrics files.

A stage writes to `<output>.partial`; the folder takes its real name when the stage is complete, with `result.json`
in it, so a folder without the suffix is always whole. A complete stage whose key is the same is not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning.lock import packages
from rlhfdsl.running import launcher
from rlhfdsl.running.inputs import verify_inputs
from rlhfdsl.running.metrics import MetricsFollower
from rlhfdsl.running.worker import PARTIAL

POLL_SECONDS = 0.2

Event = dict[str, Any]
Show = Callable[[dict[str, Any], Event], None]


def execute(plan: dict[str, Any], base: Path, show: Show) -> dict[str, dict[str, float]]:
    """Run every stage of a plan that is not complete yet. Returns each stage's evaluation by its address.

    base: the folder that the plan's input paths are relative to; outputs are relative to the working directory.
    show: called with a stage of the plan and each of its events, beside the metrics with `cached` and `done`.
    Raises UserError when a stage fails; what earlier stages made stays.
    """
    output = Path(plan["recipe"]["output"])
    output.mkdir(parents=True, exist_ok=True)
    plan_path = output / "plan.json"
    plan_path.write_text(json.dumps(plan, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    results: dict[str, dict[str, float]] = {}
    keys: dict[str, str] = {}
    for stage in plan["stages"]:
        key = keys[stage["address"]] = stage_key(plan, stage, keys)
        result = _finished(stage, key)
        if result is None:
            result = _run(plan, plan_path, stage, base, key, show)
            show(stage, {"event": "done", **result["evaluation"], "seconds": result["seconds"]})
        else:
            show(stage, {"event": "cached", **result["evaluation"]})
        results[stage["address"]] = result["evaluation"]
    return results


def stage_key(plan: dict[str, Any], stage: dict[str, Any], upstream: dict[str, str]) -> str:
    """A hash over everything that decides what a stage makes: its engines, data, settings, and what it needs.

    How often it logs, what memory it was predicted to take and where it writes are not in it.
    """
    settings = {k: v for k, v in stage["settings"].items() if k not in ("log", "eval_every", "samples_every")}
    needs = {name: upstream.get(name) or plan["models"][name] for name in stage["needs"]}
    decisive = {
        "kind": stage["kind"],
        "seed": stage["seed"],
        "settings": settings,
        "batch": {k: v for k, v in stage["batch"].items() if k != "why"},
        "engines": stage["engines"],
        "edges": stage["edges"],
        "needs": needs,
        "world": plan["target"]["world"],
        "device": plan["target"]["device"],
    }
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _finished(stage: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The result of a complete stage with this key. One of another key is kept aside under a number."""
    output = Path(stage["output"])
    if not output.exists():
        return None
    result_path = output / "result.json"
    if result_path.exists():
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
        if result["key"] == key and all(Path(path).is_dir() for path in stage["artifacts"].values()):
            return result
    number = 1
    while (aside := output.with_name(f"{output.name}.{number}")).exists():
        number += 1
    output.rename(aside)
    return None


def _run(
    plan: dict[str, Any], plan_path: Path, stage: dict[str, Any], base: Path, key: str, show: Show
) -> dict[str, Any]:
    verify_inputs(plan, stage, base)
    partial = Path(stage["output"] + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    log = partial / "log.txt"
    started = time.time()
    show(stage, {"event": "launch"})
    process = launcher.start(plan, plan_path.resolve(), stage, base.resolve(), log)
    follower = MetricsFollower(partial / "metrics.jsonl")
    evaluation: dict[str, float] = {}
    try:
        running = True
        while running:
            running = process.poll() is None
            for event in follower.new():
                show(stage, event)
                if event["event"] == "eval":
                    evaluation |= {k: v for k, v in event.items() if k.startswith(("eval_", "ema_"))}
            if running:
                time.sleep(POLL_SECONDS)
    except BaseException:
        launcher.stop(process)
        raise
    if process.returncode != 0:
        raise _failure(stage, partial, process.returncode)
    seconds = round(time.time() - started, 1)
    result = {"key": key, "stage": stage["address"], "evaluation": evaluation, "seconds": seconds, **_record(plan)}
    (partial / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, stage["output"])
    return result


def _failure(stage: dict[str, Any], partial: Path, code: int) -> UserError:
    """What a failed stage says. A folder in which nothing was trained yet is not left behind."""
    path = partial / "error.json"
    log = (partial / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    else:
        found = {
            "code": None, "message": f"a rank ended with exit code {code} and left no message", "at": None,
            "place": None, "help": None, "rank": "?",
        }  # fmt: skip
    trained = any(event["event"] == "update" for event in MetricsFollower(partial / "metrics.jsonl").new())
    if not trained and found["code"] is not None:
        shutil.rmtree(partial)
    if found["code"] is None:
        message = f"{stage['address']} failed on rank {found['rank']}: {found['message']}"
        help = f"the whole output is in {partial / 'log.txt'}" + (f"; its last line: {log[-1][:200]}" if log else "")
        return UserError("E0791", message, at=stage["address"], help=help)
    return UserError(
        found["code"], found["message"], at=found["at"] or stage["address"], place=found["place"], help=found["help"]
    )


def _record(plan: dict[str, Any]) -> dict[str, Any]:
    """What a result depends on beside its key, for comparing runs."""
    return {"versions": packages(), "python": platform.python_version(), "target": plan["target"]}
