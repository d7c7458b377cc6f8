"""Thirty runs' worth of SIGKILL at random moments: what comes out has the bits of the run that nothing happened to.

Minutes; `make test-slow`. RLHFDSL_SEED picks other moments; each kill is printed with what it hit.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pipeline import RECIPE, write_recipe

from rlhfdsl.running.metrics import MetricsFollower, read_metrics

pytestmark = pytest.mark.slow

KILLS = 5  # in each of six settings
LONGER = RECIPE.replace("steps = 4", "steps = 30").replace("steps = 3,", "steps = 30,")
LONGER = LONGER.replace("rollouts = 3", "rollouts = 8")
SEED = int(os.environ.get("RLHFDSL_SEED", "0"))


def start(folder: Path, output: str, zero: int, ranks: int) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    sets = [f"parallel.shard.zero={zero}", f'recipe.output="runs/{output}"']
    sets += [f"stage.{stage}.every.checkpoint=1" for stage in ("sft", "reward", "ppo")]
    command = [sys.executable, "-m", "rlhfdsl", "run", "small.rlhf", "--gpu", "cpu", "--gpus", str(ranks)]
    for setting in sets:
        command += ["--set", setting]
    return subprocess.Popen(
        command, cwd=folder, env=environment | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def kill_at_random(process: subprocess.Popen, run: Path, chance: random.Random) -> str | None:
    """Kill the run, its launcher or a rank: at a random time, or a random time after the stage's first event."""
    before = {path: sum(1 for _ in path.open("rb")) for path in run.glob("*.partial/metrics.jsonl")}
    if chance.random() < 0.3:
        moment = chance.uniform(0, 20)
        deadline = time.time() + moment
    else:
        moment = chance.uniform(0, 4)
        deadline = None
    while process.poll() is None:
        if deadline is None:
            for path in run.glob("*.partial/metrics.jsonl"):
                if path.exists() and sum(1 for _ in path.open("rb")) > before.get(path, 0) + 1:
                    deadline = time.time() + moment
        if deadline is not None and time.time() >= deadline:
            break
        time.sleep(0.02)
    else:
        return None
    family = psutil.Process(process.pid).children(recursive=True)
    victim = chance.choice(["run", "any of its processes"])
    target = process.pid if victim == "run" or not family else chance.choice(family).pid
    try:
        os.kill(target, signal.SIGKILL)
    except ProcessLookupError:
        return None
    process.communicate(timeout=120)
    left = psutil.wait_procs(family, timeout=30)[1]
    assert not left, f"these outlive the run: {left}"
    reached = [f"{p.parent.name} {last(p)}" for p in run.glob("*.partial/metrics.jsonl")]
    return f"{victim} killed; {', '.join(reached) or 'before or between stages'}"


def last(path: Path) -> str:
    events = [e for e in MetricsFollower(path).new() if "update" in e]
    return f"after {events[-1]['event']} {events[-1]['update']}" if events else "before its first update"


def weights(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.safetensors")}


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_runs_end_with_the_bits_of_an_unbroken_one(tmp_path, zero, ranks):
    write_recipe(tmp_path, LONGER)
    whole = start(tmp_path, "whole", zero, ranks)
    output, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0, output
    expected = weights(tmp_path / "runs" / "whole")
    chance = random.Random(f"{SEED} {zero} {ranks}")
    run = tmp_path / "runs" / "killed"
    kills, resumed, runs = 0, 0, 0
    while kills < KILLS:
        shutil.rmtree(run, ignore_errors=True)  # the last run was complete before its next kill came
        kills += killed_until_complete(tmp_path, zero, ranks, chance, KILLS - kills)
        runs += 1
        found = weights(run)
        assert found.keys() == expected.keys() and len(found) == 6
        assert [name for name in expected if found[name] != expected[name]] == []
        for stage in ("sft", "reward", "ppo"):
            events = read_metrics(run / stage / "metrics.jsonl")
            resumed += sum(event["event"] == "resume" for event in events)
            updates = [event["update"] for event in events if event["event"] == "update"]
            assert updates == list(range(1, len(updates) + 1))
    kept = f"{resumed} resumes in what is left of the metrics"
    print(f"zero {zero}, {ranks} ranks: {kills} kills over {runs} runs, {kept}", flush=True)


def killed_until_complete(folder: Path, zero: int, ranks: int, chance: random.Random, most: int) -> int:
    """Run, be killed at most `most` times and run again, until all is complete. Returns how often it was killed."""
    kills = 0
    while True:
        process = start(folder, "killed", zero, ranks)
        hit = kill_at_random(process, folder / "runs" / "killed", chance) if kills < most else None
        if hit is None:
            break
        kills += 1
        print(f"zero {zero}, {ranks} ranks, kill: {hit}", flush=True)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return kills
