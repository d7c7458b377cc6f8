"""How a stage's engines lie on the devices: ZeRO stage, offload, checkpointing and micro batch of each, derived where
`auto`.

A stage goes through phases. Weights, optimizer states, averages and the shards that ZeRO 3 keeps stay through all of
them; the rest comes and goes:

  generate   the KV cache, one layer's activations over the prompts or a draw over the vocabulary
  score      one engine's forward over a micro batch
  train      one engine's gradients, which live from its first backward to its step, its activations and buckets

So a stage fits when in every phase what stays and the largest of what comes and goes are under 90 % of a device, and
what is offloaded under 90 % of the memory of a node where that is known. The order of decisions, each the first that
fits; of those in 1 a later one that is faster by more than a tenth, since what barely fits leaves a rollout room for a
few sequences at once; the first with offload by a quarter:

  1. ZeRO of engines that train: 0 for fp32 on one device, 1 for 16-bit on one device, else 1, 2, 3.
     Engines that only infer: 0, and 3 when that does not fit or the actor is at 3.
     Engines without a `parallel` block: then, in stages that sample, those that only infer rest on the host between
     their phases; then offload of the optimizer, then of the parameters too.
  2. Checkpointing: off, unless the micro batch of step 3 would not fit without it.
  3. Micro batch: the largest divisor of the sequences of one device and step within the memory left and
     16 Ki tokens (4 Ki where the memory is unknown).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from rlhfdsl.planning import generation, memory, nvme
from rlhfdsl.planning.batches import divisors, largest_divisor
from rlhfdsl.planning.catalog import largest_layer
from rlhfdsl.planning.hardware import Target
from rlhfdsl.planning.layout import Fit, Need, Phase, Placement, Rollout

TOKENS_KNOWN = 16 * 1024
TOKENS_UNKNOWN = 4 * 1024
FASTER = 0.9  # of the time of the layout before it
FASTER_OFFLOADED = 0.75  # no time with offload was ever measured


def fit(
    needs: Sequence[Need], rollout: Rollout | None, target: Target, seconds: Callable[[Fit], float | None] | None = None
) -> Fit:
    """Place the engines of a stage; the result may not fit, which its `fits` tells: then it is the last that was tried,
    or of those that a device has room for the one that takes the least of the host.

    seconds: predicted for a layout, None where unknown; left out, the first layout that fits is taken.
    """
    chosen: Fit | None = None
    nearest: Fit | None = None
    best, offloaded = None, False
    for train, infer, offload in _levels(needs, target, rollout is not None):
        placed = _place(needs, rollout, target, train, infer, offload, "lowest" if chosen is None else "fastest")
        if placed.fits is None:
            return placed
        if not placed.fits:
            if nearest is None or not nearest.on_device or (placed.on_device and placed.host < nearest.host):
                nearest = placed
            continue
        took = None if seconds is None else seconds(placed)
        enough = FASTER if offload == "off" or offloaded else FASTER_OFFLOADED
        if chosen is None or (took is not None and best is not None and took < enough * best):
            chosen, best, offloaded = placed, took, offload != "off"
        if best is None:
            break
    found = chosen or nearest
    assert found is not None, "there is a layout to try"
    return found


def _levels(needs: Sequence[Need], target: Target, samples: bool) -> Iterator[tuple[int, int, str]]:
    """(train, infer, offload) to try; what an engine was given stands whatever comes here."""
    if target.world == 1:
        yield 1, 0, "off"
    else:
        for train, infer in ((1, 0), (2, 0), (2, 3), (3, 3)):
            yield train, infer, "off"
    if target.device == "cuda" and samples and any(n.offload is None and not n.trains for n in needs):
        for train in (1,) if target.world == 1 else (1, 2):
            yield train, 0, "idle"
    if target.device == "cuda" and any(need.offload is None for need in needs):
        yield 2, 0, "optimizer"
        yield 3, 3, "optimizer"
        yield 3, 3, "both"


def _place(
    needs: Sequence[Need], rollout: Rollout | None, target: Target, train: int, infer: int, offload: str, word: str
) -> Fit:
    needs = [replace(n, offload=offload_of(n, offload)) if n.offload is None else n for n in needs]
    needs = [replace(n, offload="optimizer") if n.packed and n.offload == "both" else n for n in needs]
    actor = next((n.zero for n in needs if n.name == "actor" and n.zero is not None), None)
    stages = {n.name: _stage(n, target, train, infer, actor, word) for n in needs}
    states = {n.name: _states(n, stages[n.name][0], target) for n in needs}
    for need in needs:
        if need.shares is not None:
            stages[need.name] = stages[need.shares][0], f"the {need.shares}'s base, with its adapters off"
    # One forward for an actor and the reference on its base where a forward gathers the weights (engines/base.py).
    pair = {x for n in needs if n.shares and rollout and stages[n.name][0] == 3 for x in (n.name, n.shares)}
    averages = {n.name: 4 * n.learns // target.world if n.ema and n.learns else 0 for n in needs}
    known = [s for s in states.values() if s is not None]
    resident = None
    if len(known) == len(needs):
        resident = sum(s.lasting for s in known) + sum(averages.values())
    usable, host = memory.usable(target.memory), memory.usable(target.host)
    room = usable - resident if usable is not None and resident is not None else None
    scores = any(not n.trains for n in needs)
    sampling = None
    if rollout is not None:
        actor_need = next(n for n in needs if n.name == "actor")
        sampling = generation.at_once(actor_need, stages["actor"][0], states["actor"], rollout, room, target)
    free = room if room is None or sampling is None else room - sampling.kept
    placed: list[Placement] = []
    for n in needs:
        if n.shares is not None:  # with the micro batches of its engine its numbers are those of the frozen base
            n = replace(n, micro=next(p.micro for p in placed if p.need.name == n.shares))
        used = states[n.shares or n.name]
        placed.append(_settle(n, *stages[n.name], states[n.name], used, averages[n.name], free, scores, target.device,
                              n.name in pair))  # fmt: skip
    generate = None if rollout is None else rollout.per_rank if sampling is None else sampling.rows
    kept = 0 if sampling is None else sampling.kept
    if resident is None:
        return Fit(tuple(placed), generate, sampling, (), usable, host)
    phases = [] if sampling is None else [Phase("generate", resident, sampling.whole, "actor")]
    for name in ("score", "train"):
        users = {p.need.name: p.working[name] for p in placed if name in p.working}
        if users:
            largest = max(users, key=lambda user: users[user])
            phases.append(Phase(name, resident + kept, users[largest], largest))
    return Fit(tuple(placed), generate, sampling, tuple(phases), usable, host)


def offload_of(need: Need, offload: str) -> str:
    """What an engine moves to the host where its stage, or its `parallel` block, says `offload`."""
    if need.trains:
        return "off" if offload == "idle" else offload
    return {"both": "params", "idle": "idle"}.get(offload, "off")


def _stage(need: Need, target: Target, train: int, infer: int, actor: int | None, word: str) -> tuple[int, str]:
    """The ZeRO stage of an engine and why; `actor` is the stage that the actor was given, if any."""
    if need.zero is not None:
        return need.zero, "as written"
    if need.offload in ("params", "both"):
        return 3, "derived: 3, which offload of the parameters needs"
    if need.nvme is not None and need.trains:
        return 3, "derived: 3, which offload to NVMe needs"
    if need.packed:  # which stage 3 does not partition
        train = min(train, 2)
    if need.offload == "idle":
        return 0, "derived: 0, whose weights rest on the host"
    if not need.trains:
        if actor == 3:
            return 3, "derived: 3, as the actor"
        return infer, f"derived: {infer}, since " + ("it does not train" if infer == 0 else "0 does not fit")
    if need.offload == "optimizer":
        return max(train, 2), f"derived: {max(train, 2)}, the lowest with optimizer offload"
    if target.world == 1:
        zero = 0 if need.dtype == "fp32" else 1
        return zero, f"derived: {zero} on one device" + (", whose gradients sum in fp32" if zero else "")
    fits = "" if target.memory is None else " that fits"
    return train, f"derived: {train}, the {word}{fits} on {target.world} {target.devices}"


def _states(need: Need, zero: int, target: Target) -> memory.States | None:
    if need.count is None or need.shape is None:
        return None
    if need.shares is not None:
        return memory.States(need.count, 0, 0, 0, 0)
    largest, offload = largest_layer(need.shape), need.offload or "off"
    found = memory.states(
        need.count, largest, dtype=need.dtype, zero=zero, offload=offload, trains=need.trains, gpus=target.gpus,
        nodes=target.nodes, trained=need.trained, packed=need.packed,
    )  # fmt: skip
    if need.nvme is None or offload == "off":
        return found
    return nvme.moved(
        found, dtype=need.dtype, offload=offload, learns=need.learns or 0, largest=largest, gpus=target.gpus,
        nodes=target.nodes,
    )  # fmt: skip


def _working(
    need: Need, zero: int, states: memory.States, device: str, checkpointing: bool, micro: int, train: bool
) -> int:
    """Bytes of one micro batch in the phase `train` or `score`, with what the phase needs beside activations."""
    assert need.shape is not None
    used = memory.activations(
        need.shape, sequences=micro * need.sequences, length=need.length, dtype=need.dtype, trains=train,
        checkpointing=checkpointing, head=need.head, eager=need.eager, device=device, lora=need.lora,
    )  # fmt: skip
    used += memory.gathered(states, dtype=need.dtype, zero=zero, live=need.live)
    used += memory.read_back(need.shape, need.dtype) if need.packed else 0
    if train or states.rests:
        used += states.passing
    if train:
        used += memory.buckets(need.learns or 0, dtype=need.dtype, zero=zero, elements=need.bucket)
    return used


def _settle(
    need: Need, zero: int, reason: str, states: memory.States | None, used_states: memory.States | None,
    average: int, room: int | None, scores: bool, device: str, joint: bool,
) -> Placement:  # fmt: skip
    """Checkpointing and micro batch of one engine with `room` bytes beside all that stays, None for unknown.

    used_states: of the engine whose weights it works with, its own or those that it shares. joint: whether both read a
    micro batch at once, twice its rows.
    """
    by_tokens = need.micro or largest_divisor(need.per_rank, token_limit(room) // need.tokens)

    def scored(micro: int) -> int:
        assert used_states is not None
        return _working(need, zero, used_states, device, False, micro * (2 if joint else 1), False)

    def used(checkpointing: bool, micro: int) -> int | None:
        if used_states is None:
            return None
        if not need.trains:
            return scored(micro)
        train = _working(need, zero, used_states, device, checkpointing, micro, True)
        return max(train, scored(micro)) if joint else train

    def fits(checkpointing: bool, micro: int) -> bool:
        bytes_used = used(checkpointing, micro)
        return room is None or bytes_used is None or bytes_used <= room

    checkpointing = need.checkpointing
    if checkpointing is None:
        checkpointing = need.trains and not fits(False, by_tokens)
    choices = [d for d in divisors(need.per_rank) if d <= by_tokens and fits(checkpointing, d)]
    micro = need.micro or max(choices, default=1)
    working = {}
    if used_states is not None:
        if scores:
            working["score"] = scored(micro)
        if need.trains:
            working["train"] = _working(need, zero, used_states, device, checkpointing, micro, True)
    offload = need.offload or "off" if need.shares is None else "off"
    return Placement(need, zero, offload, reason, checkpointing, micro, states, average, room, working, joint)


def token_limit(room: int | None) -> int:
    """The most tokens of a derived micro batch."""
    return TOKENS_UNKNOWN if room is None else TOKENS_KNOWN
