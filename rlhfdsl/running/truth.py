"""One stage of a plan for a few updates, with random weights made on the device: a row of `rlhf bench truth`.

The trainers, engines and micro batches are those of a run; only where the weights come from is another, and that
nothing is saved. A process of its own, started as `python -m rlhfdsl.running.truth`, since memory that one
configuration leaves behind would count for the next.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import statistics
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from rlhfdsl.models.exhausted import out_of_memory
from rlhfdsl.planning.measured import medians
from rlhfdsl.running.worker import find_stage, load

AT_LEAST = 2  # updates: the first warms up


class Enough(Exception):
    """There are as many updates as were asked for, or the time is up."""


class Gauge:
    """The peak memory of a device by phase, and the seconds of each update."""

    def __init__(self, updates: int, seconds: float, device: Any):
        self.most, self.until, self.device = updates, time.perf_counter() + seconds, device
        self.start = 0
        self.peaks: dict[str, int] = {}
        self.updates: list[dict[str, float]] = []
        self.gathers: list[float] = []  # seconds of each copy of the weights for a rollout

    def peak(self) -> int:
        """Bytes at most since the last call."""
        if self.device.type != "cuda":
            return 0
        import torch

        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    def clock(self) -> float:
        """Seconds, once the device has done what it was told."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def built(self) -> None:
        """An engine stands: what it took to make it is another number than what it takes to train."""
        self.start = max(self.start, self.peak())

    def phase(self, name: str) -> None:
        """What was reached since the last call belongs to a phase."""
        self.peaks[name] = max(self.peaks.get(name, 0), self.peak())

    def report(self, event: str, **values: Any) -> None:
        """Takes what trainers report; raises Enough after the last update."""
        if event != "update":
            return
        self.phase("train")
        ppo = {name.removeprefix("seconds_"): value for name, value in values.items() if name.startswith("seconds_")}
        self.updates.append(ppo or {"train": values["seconds"]})
        late = time.perf_counter() > self.until and len(self.updates) >= AT_LEAST
        if late or len(self.updates) >= self.most:
            raise Enough

    def result(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        peak = max(self.peaks.values(), default=0) if cuda else None
        return {
            "peak": peak, "peaks": self.peaks if cuda else {}, "start": self.start if cuda else None,
            "seconds": medians(self.updates), "updates": len(self.updates),
            "gather": statistics.median(self.gathers[1:] or self.gathers) if self.gathers else None,
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rlhfdsl.running.truth")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--local_rank", type=int, default=0)  # said by DeepSpeed's launcher
    options = parser.parse_args(arguments)
    plan = json.loads(options.plan.read_text(encoding="utf-8"))
    try:
        load(find_stage(plan, options.stage)["kind"])
        found = measure(plan, options.stage, options.plan.parent, options.updates, options.seconds)
    except Exception as error:
        import traceback

        traceback.print_exc()
        memory = out_of_memory(error)
        found = {"error": "out of memory" if memory else f"{type(error).__name__}: {error}"[:300]}
    if options.local_rank == 0 or "error" in found:
        (options.plan.parent / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    # Joining a broken group of ranks may wait for ever; the launcher ends the others when one fails.
    os._exit("error" in found)


def measure(plan: dict[str, Any], address: str, base: Path, updates: int, seconds: float) -> dict[str, Any]:
    """Peak bytes by phase and median seconds by phase of a stage on this process's device."""
    import logging

    import torch
    import transformers
    from deepspeed.utils import logger

    from rlhfdsl.engines import distributed
    from rlhfdsl.engines.rollout.weights import CopiedWeights
    from rlhfdsl.training import onpolicy

    logger.setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    stage = find_stage(plan, address)
    device = distributed.join(plan["target"]["device"])
    torch.manual_seed(stage["seed"])
    # ranks end after the same update, and their clocks are their own
    gauge = Gauge(updates, seconds if distributed.world() == 1 else math.inf, device)
    _random_weights(plan, base, device)
    _watch(onpolicy.OnPolicy, CopiedWeights, gauge)
    context = _context(plan, stage, base, device, gauge)
    with contextlib.suppress(Enough):
        importlib.import_module(f"rlhfdsl.training.{stage['kind']}").run(context)
    return gauge.result()


def _context(plan: dict[str, Any], stage: dict[str, Any], base: Path, device: Any, gauge: Gauge) -> Any:
    from rlhfdsl.training.context import Context

    class Bench(Context):
        def engine(self, name: str, kind: Any) -> Any:
            made = super().engine(name, kind)
            gauge.built()
            return made

        def _source(self, weights: dict[str, str]) -> tuple[str, str | None, list[str]]:
            return weights["model"], None, []

    return Bench(plan, stage, base, base, device, gauge.report)


def _random_weights(plan: dict[str, Any], base: Path, device: Any) -> None:
    """Let models/loading.py make what it would load: the source that it gets is a model's address in the plan."""
    import torch

    from rlhfdsl.models import loading, quantized
    from rlhfdsl.models.scratch import scratch_config
    from rlhfdsl.models.tokenizers import load_tokenizer

    def config(source: str, **_: Any) -> Any:
        entry = plan["models"][source]
        tokenizer = load_tokenizer(entry, base)
        ids = {"pad_id": tokenizer.pad_token_id, "bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id}
        return scratch_config(entry["arch"], **ids)

    class Made:
        def __init__(self, auto: Any, missing: list[str]):
            self.auto, self.missing = auto, missing

        def from_config(self, config: Any) -> Any:
            return self.auto.from_config(config)

        def from_pretrained(
            self, source: str, *, config: Any, dtype: Any, attn_implementation: str, quantization_config: Any = None,
            **_: Any,
        ) -> Any:  # fmt: skip
            torch.manual_seed(zlib.crc32(source.encode()))  # an actor and its reference are one model
            with torch.device(device if quantization_config is None else "meta"):
                model = self.auto.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
            if quantization_config is not None:
                quantized.draw(model, quantization_config, device)
            return model, {"missing_keys": self.missing, "mismatched_keys": []}

    class Configs:
        from_pretrained = staticmethod(config)

    loading.AutoConfig = Configs
    loading.AutoModelForCausalLM = Made(loading.AutoModelForCausalLM, [])
    loading.AutoModelForSequenceClassification = Made(loading.AutoModelForSequenceClassification, [loading.HEAD])


def _watch(on_policy: Any, copied: Any, gauge: Gauge) -> None:
    """Tell the gauge where sampling ends and training begins; a first rollout is not checked, which costs time."""
    sample, train = on_policy.sample, on_policy.train_step

    @functools.wraps(sample)
    def sampled(self: Any, *args: Any, **kwargs: Any) -> Any:
        gauge.peak()
        out = sample(self, *args, **kwargs)
        gauge.phase("generate")
        return out

    @functools.wraps(train)
    def trained(self: Any, *args: Any, **kwargs: Any) -> Any:
        gauge.phase("score")
        return train(self, *args, **kwargs)

    on_policy.sample, on_policy.train_step, on_policy.check = sampled, trained, lambda *_: {}
    refresh = copied.refresh

    @functools.wraps(refresh)
    def refreshed(self: Any) -> None:
        started = gauge.clock()
        refresh(self)
        gauge.gathers.append(gauge.clock() - started)

    copied.refresh = refreshed


if __name__ == "__main__":
    sys.exit(main())
