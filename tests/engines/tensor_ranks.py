"""Rollouts over shards of the weights, on the ranks that start this script: `tensor_ranks.py FOLDER DEVICE`.

One launch of two ranks serves every case, and passes that gather the weights, since a launch takes longer than most of
them. FOLDER/RANK.json gets, for each case, what was not as it should be, or null. The cases are collective calls: both
ranks go through the same ones in the same order, and nothing is asserted before the calls of a case are over.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from deepspeed.runtime.zero import partition_parameters
from rollouts import LORA, joined, judged, learn, same, sampled, tiny
from small import spec

from rlhfdsl.engines import distributed
from rlhfdsl.engines.base import BasePolicy, BesideBase
from rlhfdsl.engines.rollout.eager import EagerSampler
from rlhfdsl.engines.rollout.graph import GraphSampler
from rlhfdsl.engines.rollout.interface import Rollout
from rlhfdsl.planning import shards

SIZE = 2
NAMES = shards.types()  # each the name of a tiny model
ADAPTED = ("llama", "gpt2", "phi3")  # plain, transposed, in pieces
# Each rank has prompts of its own, of other lengths.
PROMPTS = (
    [[10, 20, 30], [7], [1, 2, 3, 4, 5, 6, 7, 8]],
    [[200, 100], list(range(30, 47)), [5, 4, 3]],
)


def sample(sampler, **options) -> Rollout:
    rank = distributed.rank()
    return sampled(sampler, PROMPTS[rank % 2], seed=5 + rank, tokens=8, **options)


def equal(name: str, device: str, against: type = GraphSampler, **changes) -> None:
    """The answers of whole weights before and after an update, in slots for all answers and in two for each rank."""
    engine = tiny(name, device=device, **changes)
    sampler, whole = GraphSampler(engine, SIZE), against(engine)
    pairs = [(sample(sampler), sample(whole))]
    learn(engine)
    pairs.append((sample(sampler, at_once=2), sample(whole)))
    # the case is worth something: an update shows
    assert not torch.equal(pairs[0][0].input_ids, pairs[1][0].input_ids)
    for found, expected in pairs:
        same(found, expected, tolerance(device))
    assert sampler.capture_failure is None and (sampler.captured or device == "cpu")
    held(sampler, engine)


def held(sampler: GraphSampler, engine) -> None:
    """The copy is one buffer of a half of each matrix of a layer and the rest."""
    most = 0
    for name, parameter in engine.module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        inside = ".layers." in name or ".h." in name
        most += shape.numel() // (SIZE if inside and len(shape) == 2 and ".lora_" not in name else 1)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in sampler.model.parameters()}
    assert sum(storage.nbytes() for storage in storages.values()) <= 4 * most


def greedy(device: str) -> None:
    engine = tiny("qwen2", zero=3, device=device)
    found, expected = (sample(s, temperature=1e-4) for s in (GraphSampler(engine, SIZE), GraphSampler(engine)))
    same(found, expected, 0.1)  # of logits divided by 1e-4


def unequal_ranks(device: str) -> None:
    """A rank with one answer goes on until the other's four end; and a sampler that was released starts again."""
    engine = tiny("llama", zero=3, device=device)
    sampler, whole = GraphSampler(engine, SIZE), GraphSampler(engine)
    prompts = [[7]] if distributed.rank() == 0 else [[200, 100], list(range(30, 47)), [5, 4, 3], [9, 9]]
    pairs = []
    for _ in range(2):
        pairs.append([sampled(s, prompts, answers=1, tokens=40) for s in (sampler, whole)])
        sampler.release()
    for found, expected in pairs:
        same(found, expected, tolerance(device))


def gate(device: str) -> None:
    engine = tiny("llama", "bf16", zero=3, device=device)
    found = judged(engine, GraphSampler(engine, SIZE))
    assert found.holds, found


def gate_catches(device: str) -> None:
    """A group that forgets to sum does not sample from the policy."""
    engine = tiny("llama", zero=3, device=device)
    sampler = GraphSampler(engine, SIZE)
    sampler.group.total = lambda tensor: None
    found = judged(engine, sampler)
    assert not found.holds, found


def one_forward(name: str, device: str) -> None:
    """Policy and base in one forward at ZeRO 3, where that gathers the weights once instead of twice."""
    engine = tiny(name, zero=3, lr=0.1, device=device, lora=LORA, kept=0)
    learn(engine)
    joined(engine)
    base = BasePolicy(spec("ref", trains=False), engine)
    ids = torch.randint(0, 255, (4, 12), generator=torch.Generator().manual_seed(7)).to(device)
    lengths = torch.full((4,), 12, device=device)
    moved: list[int] = []
    gather = partition_parameters._dist_allgather_fn

    def counted(part, whole, group=None):
        moved.append(whole.numel())
        return gather(part, whole, group)

    def of(read: Callable[[], object]) -> int:
        moved.clear()
        with torch.no_grad():
            read()
        return sum(moved)

    partition_parameters._dist_allgather_fn = counted
    try:
        policy = of(lambda: engine.logits(ids, lengths))
        alone = of(lambda: base.logits(ids, lengths))
        first = torch.zeros(1, dtype=torch.int64, device=ids.device)
        both = of(lambda: BesideBase(base).logits_at(ids.repeat(2, 1), lengths.repeat(2), first, first))
    finally:
        partition_parameters._dist_allgather_fn = gather
    adapters = sum(p.ds_numel for p in engine.module.parameters() if p.requires_grad)
    assert 0 < adapters < policy / 10
    assert policy - adapters <= alone <= policy, (policy, alone, adapters)
    assert both == policy, (both, policy)


def tolerance(device: str) -> float:
    return 1e-4 if device == "cpu" else 1e-3


def cases(device: str) -> dict[str, Callable[[], None]]:
    found = {name: partial(equal, name, device, zero=3) for name in NAMES}
    found |= {f"{name} with adapters": partial(equal, name, device, zero=3, lr=0.1, lora=LORA) for name in ADAPTED}
    found["llama beside generate"] = partial(equal, "llama", device, EagerSampler, zero=3)
    found |= {f"{name} and its base in one forward": partial(one_forward, name, device) for name in ADAPTED}
    found |= {f"llama at ZeRO {zero}": partial(equal, "llama", device, zero=zero) for zero in (0, 2)}
    return found | {
        "greedy": partial(greedy, device), "unequal ranks": partial(unequal_ranks, device),
        "gate": partial(gate, device), "gate catches": partial(gate_catches, device),
    }  # fmt: skip


if __name__ == "__main__":
    folder, device = sys.argv[-2:]
    distributed.join(device)
    gc.freeze()  # DeepSpeed collects garbage for each engine, half a second over what imports have made
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, str | None] = {}
    for name, case in cases(device).items():
        try:
            case()
            found[name] = None
        except AssertionError:
            found[name] = traceback.format_exc()
    Path(folder, f"{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.barrier()
    os._exit(0)  # as a worker of the program ends: gloo's threads now and then abort a process that is taken down
