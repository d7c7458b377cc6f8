"""One rank of one stage: joins its ranks, runs the stage of the plan, leaves its files.

Started by running/launcher.py as `python -m rlhfdsl.running.worker`; it reads the plan and nothing else of the recipe.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rlhfdsl.running import failure, strict
from rlhfdsl.running.launcher import die_with_parent, end_only_for
from rlhfdsl.running.metrics import MetricsWriter
from rlhfdsl.running.schedule import partial_of
from rlhfdsl.running.watch import Pulse


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rlhfdsl.running.worker")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--timeout", type=float, default=1800.0)
    parser.add_argument("--supervisor", type=int)
    parser.add_argument("--local_rank", type=int, default=0)  # DeepSpeed's launcher adds it
    options = parser.parse_args(arguments)
    die_with_parent()
    if options.supervisor is not None:
        end_only_for(options.supervisor)
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # where this rank stands, to the log
    plan = json.loads(options.plan.read_text(encoding="utf-8"))
    stage = find_stage(plan, options.stage)
    directory = partial_of(Path(stage["output"]))
    rank = int(os.environ.get("RANK", 0))
    pulse = Pulse(directory, rank)
    try:
        load(stage["kind"])
        from rlhfdsl.engines import distributed

        report = MetricsWriter(directory / "metrics.jsonl")
        building = partial(report, "building") if rank == 0 else None
        distributed.join(plan["target"]["device"], options.timeout, building)
        run_stage(plan, stage, options.base, options.checkpoint, pulse)
        from deepspeed import comm

        comm.destroy_process_group()
    except Exception as error:
        traceback.print_exc()
        failure.leave(directory, stage, rank, error, pulse.doing)
        return 1
    return 0


def load(kind: str) -> None:
    """Import all that a stage of this kind runs on; at the start of a process.

    The collector rests meanwhile, and leaves what was imported alone from then on: modules stay to the end, and looking
    through half a million of their objects again and again was a second of the five that a start took.
    """
    gc.disable()
    importlib.import_module(f"rlhfdsl.training.{kind}")
    gc.freeze()
    gc.enable()


def run_stage(
    plan: dict[str, Any],
    stage: dict[str, Any],
    base: Path,
    checkpoint: Path | None = None,
    pulse: Callable[[str], None] | None = None,
) -> dict[str, float] | None:
    """Run one stage on this rank, in this process. Writes to the stage's partial folder.

    checkpoint: the one to go on from. pulse: called with what this rank begins to do. Returns the evaluation, None
    when the stage was asked to stop.
    """
    import logging

    import torch
    import transformers
    from deepspeed.utils import logger

    from rlhfdsl.engines import distributed
    from rlhfdsl.engines.checkpoint.keeper import Stopped
    from rlhfdsl.training.context import Context

    logger.setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    device = distributed.join(plan["target"]["device"])
    directory = partial_of(Path(stage["output"]))
    directory.mkdir(parents=True, exist_ok=True)
    main_rank = distributed.rank() == 0
    report = MetricsWriter(directory / "metrics.jsonl") if main_rank else _ignore
    strict.enforce(plan)
    torch.manual_seed(stage["seed"] + 100_003 * distributed.rank())
    context = Context(plan, stage, base, directory, device, report, checkpoint, pulse)
    run = importlib.import_module(f"rlhfdsl.training.{stage['kind']}").run
    report("start", stage=stage["address"], world=distributed.world(), device=str(device))
    result = None
    try:
        result = run(context)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        report("end", peak_memory=memory)
    except Stopped as stopped:
        report("stopped", update=stopped.update, of=stopped.of, saved=stopped.saved)
    distributed.barrier()  # none leaves while another waits for it in a collective call
    return result


def find_stage(plan: dict[str, Any], address: str) -> dict[str, Any]:
    return next(stage for stage in plan["stages"] if stage["address"] == address)


def _ignore(event: str, **values: Any) -> None:
    """The report of every rank but the first."""


if __name__ == "__main__":
    ended = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's own end: gloo's threads now and then abort a process that is taken down, and after a
    # failure the other ranks may wait for this one in a collective call.
    os._exit(ended)
