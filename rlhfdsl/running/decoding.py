"""How fast the rollout engines sample, beside the floor that memory sets: the measuring of `rlhf bench rollout`.

The actor is a real one, on a DeepSpeed engine, of random weights made on the device. No answer ends by itself unless
the row says so, so that every engine does the same work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from deepspeed.utils import logger
from transformers import AutoModelForCausalLM

from rlhfdsl.engines import distributed
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.engines.rollout.eager import EagerSampler
from rlhfdsl.engines.rollout.interface import Prompts, Sampler, Sampling
from rlhfdsl.engines.rollout.sampling import row_seeds
from rlhfdsl.models.scratch import scratch_config
from rlhfdsl.planning import catalog, deepspeed_config, memory

Json = dict[str, Any]
REPEATS = 2
ENDING, SLOTS = 512, 128  # answers of the row whose answers end by themselves, and in how many slots at most


def measure(
    arch: Json, device: str, copy: float, *, rows: list[int], prompt: int, answer: int, zero: int, eager: bool
) -> Iterator[Json]:
    """Rows of the table: engine, answers at once, tokens/s, seconds, step and floor in ms, first seconds, peak bytes.

    arch: the numbers of a model of the catalog. copy: bytes/s of the device's memory. eager: `generate` too.
    """
    logger.setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    actor = make_actor(arch, distributed.join(device), zero)
    shape = catalog.shape(arch)
    assert shape is not None
    width = 2 if device == "cuda" else 4
    samplers: list[Sampler] = [actor.sampler, *([EagerSampler(actor)] if eager else [])]
    for count in rows:
        live = memory.kv_cache(shape, sequences=count, length=1, dtype="bf16" if width == 2 else "fp32")
        read = width * (catalog.parameters(shape) or 0) + live * (prompt + answer / 2)
        for sampler in samplers:
            found = _timed(sampler, arch, count, prompt, answer)
            floor = read / copy * answer
            yield {"engine": sampler.name, "rows": count, "floor": floor, "share": floor / found["seconds"], **found}
            sampler.release()
    count = max((n for n in rows if n <= SLOTS), default=SLOTS)
    stops = tuple(range(3, arch["vocab"], 128))  # random weights stop at each token once in 128
    for name, given in (("full length", ()), ("ends at 128 in the mean", stops)):
        found = _timed(actor.sampler, arch, ENDING, prompt, answer, at_once=count, stops=given, repeats=1)
        yield {"engine": f"graph, {ENDING} answers in {count} slots, {name}", "rows": count, **found}


def make_actor(arch: Json, device: torch.device, zero: int) -> HybridEngine:
    """An actor of random weights with a graph rollout, ready to train."""
    cuda = device.type == "cuda"
    dtype = "bf16" if cuda else "fp32"
    config = scratch_config(arch, pad_id=1, bos_id=0, eos_id=2)
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if cuda else torch.float32, attn_implementation="sdpa"
        )
    module.config.use_cache = False
    schedule = {"kind": "constant", "lr": 1e-6, "warmup": 0, "updates": 1}
    optimizer = {"lr": 1e-6, "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.0}
    spec = {
        "trains": True, "zero": zero, "offload": "off", "packing": False, "micro": 1, "dtype": dtype, "lora": None,
        "shares": None, "schedule": schedule, "ema": None,
        "rollout": {"engine": "graph", "tensor": 1, "free_cache": False, "reason": "measured"},
        "deepspeed": deepspeed_config.config(
            dtype=dtype, zero=zero, offload="off", device=device.type, world=distributed.world(), micro=1,
            accumulation=1, parameters=None, trains=True, optimizer=optimizer,
        ),
    }  # fmt: skip
    return HybridEngine("actor", spec, module)


def _timed(
    sampler: Sampler, arch: Json, count: int, prompt: int, answer: int, *, at_once: int | None = None,
    stops: tuple[int, ...] = (), repeats: int = REPEATS,
) -> Json:  # fmt: skip
    device = sampler.engine.device
    draw = torch.Generator().manual_seed(count)
    ids = torch.randint(3, arch["vocab"], (count, prompt), generator=draw).to(device)
    request = Prompts(ids, torch.ones_like(ids), row_seeds(1, 0, torch.arange(count)).to(device))
    sampling = Sampling(max_new_tokens=answer, temperature=1.0, stop_ids=stops, pad_id=1, at_once=at_once)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first, rollout = _seconds(lambda: sampler.generate(request, sampling), cuda)
    seconds = min(_seconds(lambda: sampler.generate(request, sampling), cuda)[0] for _ in range(repeats))
    tokens = int(rollout.answer_lengths.sum())
    return {
        "answers_per_second": count / seconds, "tokens_per_second": tokens / seconds, "seconds": seconds,
        "first": first - seconds, "peak": torch.cuda.max_memory_allocated() if cuda else None,
    }  # fmt: skip


def _seconds(work: Callable[[], Any], cuda: bool) -> tuple[float, Any]:
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    out = work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, out
