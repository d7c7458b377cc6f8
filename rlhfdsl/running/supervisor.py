"""Runs the stages of a plan in order, each in worker processes, and follows them through their metrics files.

A stage writes to `<output>.partial`; the folder takes its real name when the stage is complete, with `result.json`
in it, so a folder without the suffix is always whole. What is done with each stage is decided in schedule.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhfdsl.engines.checkpoint import store
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.language.files import write_whole
from rlhfdsl.planning import keys, measured
from rlhfdsl.planning.lock import PACKAGES, packages
from rlhfdsl.planning.places import make_output
from rlhfdsl.running import failure, launcher, schedule
from rlhfdsl.running.inputs import verify_inputs, verify_made
from rlhfdsl.running.metrics import MetricsFollower, read_metrics
from rlhfdsl.running.watch import Watch
from rlhfdsl.running.weights import hashes

POLL_SECONDS = 0.2
PATIENCE = 1800.0  # a step that takes longer has not been seen
APART_SECONDS = 1.0  # between two signals that were meant as two

Event = dict[str, Any]
Show = Callable[[dict[str, Any], Event], None]


class Interrupted(Exception):
    """The run was asked to end by a signal, and did. `message` says where it will go on."""

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal
        self.message = message


def execute(
    plan: dict[str, Any], base: Path, show: Show, *, anew: bool = False, patience: float = PATIENCE
) -> dict[str, dict[str, float]]:
    """Run every stage of a plan that is not complete yet. Returns each stage's evaluation by its address.

    base: the folder that the plan's input paths are relative to; outputs are relative to the working directory.
    show: called with a stage of the plan and each of its events, beside the metrics with those of the supervisor.
    anew: start unfinished stages at their beginning. patience: seconds without progress after which a stage is ended.
    On SIGINT, SIGTERM or SIGHUP the stage saves a checkpoint after the update that is running; at the second signal it
    ends at once. Raises UserError when a stage fails and Interrupted after a signal; what earlier stages made stays.
    """
    output = make_output(Path(plan["recipe"]["output"]))
    plan_path = output / "plan.json"
    results: dict[str, dict[str, float]] = {}
    fresh: list[str] = []
    with _alone(output), Signals() as signals:
        write_whole(plan_path, json.dumps(plan, indent=1, ensure_ascii=False) + "\n")
        for stage in plan["stages"]:
            stamp = keys.stamp(plan, stage)
            action = schedule.decide(plan, stage, stamp, thorough=True, anew=anew)
            for text in action.lost:
                show(stage, {"event": "lost", "reason": text})
            if action.do != "cached":
                verify_inputs(plan, stage, base)
                verify_made(plan, stage, fresh)
            checkpoint = schedule.settle(stage, action)
            if action.do == "cached":
                result = schedule.read_result(Path(stage["output"])) or {}
                show(stage, {"event": "cached", **result["evaluation"]})
            else:
                show(stage, {"event": "launch", "do": action.do, "reason": action.reason})
                result = Running(plan, plan_path, stage, base, stamp, show, signals, patience).run(checkpoint)
                show(stage, {"event": "done", **result["evaluation"], "seconds": result["seconds"]})
                fresh.append(stage["address"])
            results[stage["address"]] = result["evaluation"]
            signals.end_if_asked(f"{stage['address']} is complete")
    return results


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold a run's folder; the system lets it go when this process dies. Raises UserError when another run holds it."""
    with (output / ".running").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "E0796", f"another `rlhf run` is at work in {output}", at="recipe.output",
                help="wait for its end, or run into another folder with `--output`",
            ) from None  # fmt: skip
        except OSError:
            pass  # a file system without locks
        yield


def at_work(output: Path) -> bool:
    """Whether a `rlhf run` holds a run's folder now."""
    try:
        with (output / ".running").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # it never ran here, or on a file system without locks
    return False


class Signals:
    """Counts the signals that ask a run to end. Use as a context manager, in the main thread.

    `timeout` and `uv run` send each of theirs twice, to their child and to the group in which it is.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.at = 0.0
        self.held: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in launcher.ENDING:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays what it is
                    self.held[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.held.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        if self.asked is None:
            self.asked, self.at = number, time.monotonic()
        elif time.monotonic() - self.at >= APART_SECONDS:
            raise Interrupted(number, "stopped at once")

    def end_if_asked(self, where: str) -> None:
        """Raise Interrupted between two stages."""
        if self.asked is not None:
            raise Interrupted(self.asked, where)


class Running:
    """One stage while its ranks run."""

    def __init__(
        self, plan: dict[str, Any], plan_path: Path, stage: dict[str, Any], base: Path, stamp: dict[str, Any],
        show: Show, signals: Signals, patience: float,
    ):  # fmt: skip
        self.plan, self.plan_path, self.stage, self.base = plan, plan_path, stage, base
        self.stamp, self.show, self.signals, self.patience = stamp, show, signals, patience
        self.partial = schedule.partial_of(Path(stage["output"]))
        self.follower = MetricsFollower(self.partial / "metrics.jsonl")
        self.evaluation: dict[str, float] = {}
        self.trained = False
        self.stopped: Event | None = None

    def run(self, checkpoint: Path | None) -> dict[str, Any]:
        """Start the ranks, follow them to their end and publish what they made. Returns the result."""
        earlier = list(self.follower.new())
        for event in earlier:
            self._take(event, show=False)
        started = time.monotonic()
        process = launcher.start(
            self.plan, self.plan_path.resolve(), self.stage, self.base.resolve(), self.partial / "log.txt", checkpoint,
            timeout=2 * self.patience,  # what hangs is found here first, with a better word for it
        )  # fmt: skip
        watch = Watch(self.partial, self.patience)
        told = False
        try:
            running = True
            while running:
                running = process.poll() is None
                for event in self.follower.new():
                    self._take(event, show=True)
                if self.signals.asked is not None and not told:
                    (self.partial / store.STOP).touch()
                    self.show(self.stage, {"event": "stopping", "first": not self.trained})
                    told = True
                watch.look()
                if running and watch.hangs():
                    watch.dump()
                    raise failure.hangs(self.stage, self.partial, watch)
                if running:
                    watch.wait(POLL_SECONDS)
        finally:
            launcher.stop(process)
            watch.close()
        if process.returncode != 0:
            error = failure.explain(self.stage, self.partial, watch, process.returncode)
            if not self.trained and error.code not in failure.LOGGED:
                shutil.rmtree(self.partial)  # a mistake of the recipe or its data: there is nothing to look at
            raise error
        if self.stopped is not None:
            raise Interrupted(self.signals.asked or signal.SIGTERM, self._where())
        return self._publish(seconds_of(earlier) + time.monotonic() - started)

    def _take(self, event: Event, show: bool) -> None:
        if show:
            self.show(self.stage, event)
        match event["event"]:
            case "update":
                self.trained = True
            case "eval":
                self.evaluation |= {k: v for k, v in event.items() if k.startswith(("eval_", "ema_"))}
            case "stopped":
                self.stopped = event

    def _where(self) -> str:
        assert self.stopped is not None
        update, of = self.stopped["update"], self.stopped["of"]
        saved = "with a checkpoint" if self.stopped["saved"] else "without a new checkpoint"
        return f"{self.stage['address']} stopped after {update} of {of} {schedule.unit(self.stage)}, {saved}"

    def _publish(self, seconds: float) -> dict[str, Any]:
        """Give a complete stage its result and its name. Its checkpoints have served."""
        result = {**self.stamp, "evaluation": self.evaluation, "seconds": round(seconds, 1), **_record(self.plan)}
        result |= measured.record(self.stage, read_metrics(self.follower.path))
        # What `rlhf verify` and `rlhf cache verify` hold against: the inputs' folder seen from the run's, the models.
        run = Path(self.plan["recipe"]["output"]).resolve()
        result |= {"base": os.path.relpath(self.base.resolve(), run), "files": hashes(self.stage, self.partial)}
        write_whole(self.partial / schedule.RESULT, json.dumps(result, indent=1) + "\n")
        output = Path(self.stage["output"])
        os.replace(self.partial, output)
        shutil.rmtree(output / store.FOLDER, ignore_errors=True)
        return result


def seconds_of(events: list[Event]) -> float:
    """How long the starts of a stage ran that these events are of, each from its first to its last."""
    total, began, last = 0.0, None, 0.0
    for event in events:
        if event["event"] == "start":
            total += 0.0 if began is None else last - began
            began = event["time"]
        last = event["time"]
    return total + (0.0 if began is None else last - began)


def _record(plan: dict[str, Any]) -> dict[str, Any]:
    """What a result depends on beside its key, for comparing runs."""
    loras = [engine["lora"] or {} for stage in plan["stages"] for engine in stage["engines"].values()]
    names = (*PACKAGES, *(["bitsandbytes"] if any("base" in lora for lora in loras) else []))
    return {"versions": packages(names), "python": platform.python_version(), "target": plan["target"]}
