"""How a stage's engines lie on the devices: ZeRO stage, checkpointing and micro batch of each, derived where
`auto`.

All engines of a stage keep their model states at once; their working sets (activations of a micro batch, the
KV cache of a rollout) come one after another. So a stage fits when the sum of the states and the largest
working set stay under 90 % of a device. The order of decisions, each the first that fits:

  1. ZeRO of engines that train: 0 for fp32 on one device, 1 for 16-bit on one device, else 1, 2, 3.
     Engines that only infer: 0, and 3 when that does not fit or the actor is at 3.
  2. Checkpointing: off, unless the micro batch of step 3 would not fit without it.
  3. Micro batch: the largest divisor of the sequences of one device and step within the memory left and
     16 Ki tokens (4 Ki where the memory is unknown).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rlhfdsl.planning import memory
from rlhfdsl.planning.batches import divisors, largest_divisor
from rlhfdsl.planning.catalog import Shape, largest_layer
from rlhfdsl.planning.hardware import Target

TOKENS_KNOWN = 16 * 1024
TOKENS_UNKNOWN = 4 * 1024


@dataclass(frozen=True, slots=True)
class Need:
    """What one engine asks of a device. None means `auto` (zero, checkpointing, micro) or unknown (shape,
    count).

    per_rank: items of one step on one device, which the micro batch divides. An item is `sequences` sequences
    of `length` tokens: two for a pair.
    """

    name: str
    shape: Shape | None
    count: int | None
    head: str
    dtype: str
    eager: bool
    trains: bool
    per_rank: int
    sequences: int
    length: int
    zero: int | None
    offload: str
    checkpointing: bool | None
    micro: int | None
    ema: bool  # an fp32 moving average of the weights, shared out over the devices

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True, slots=True)
class Rollout:
    """The generation of a PPO stage: `per_rank` sequences of `length` tokens from the engine `actor`."""

    per_rank: int
    length: int


@dataclass(frozen=True, slots=True)
class Placement:
    """One engine on a device. `states` and `working` are None when the model's numbers are unknown.

    reason: why the ZeRO stage is what it is. room: bytes left beside all model states.
    """

    need: Need
    zero: int
    reason: str
    checkpointing: bool
    micro: int
    states: memory.States | None
    working: int | None
    room: int | None


@dataclass(frozen=True, slots=True)
class Fit:
    """A whole stage on a device, in bytes; `total` is None when a model's numbers are unknown."""

    engines: tuple[Placement, ...]
    generate: int | None  # sequences generated at once on one device
    cache: int | None  # bytes of their KV cache and logits
    states: int | None
    total: int | None
    usable: int | None

    @property
    def fits(self) -> bool | None:
        if self.total is None or self.usable is None:
            return None
        return self.total <= self.usable


def fit(needs: Sequence[Need], rollout: Rollout | None, target: Target) -> Fit:
    """Place the engines of a stage; the result may not fit, which its `fits` tells."""
    last = None
    for train, infer in _levels(needs, target):
        last = _place(needs, rollout, target, train, infer)
        if last.fits is not False:
            break
    assert last is not None
    return last


def alternatives(needs: Sequence[Need], rollout: Rollout | None, target: Target) -> str | None:
    """The nearest change of settings that makes a stage fit, in words, or None when none of these does.

    Tried in this order: checkpointing, a derived micro, ZeRO 2 and 3, offload of the optimizer, of
    everything.
    """

    def changed(zero: int | None = None, offload: str | None = None) -> list[Need]:
        out = []
        for need in needs:
            stage = need.zero if zero is None else max(zero, need.zero or 0)
            part = need.offload if offload is None or not need.trains else offload
            relaxed = replace(need, zero=stage, offload=part, checkpointing=need.trains, micro=None)
            out.append(relaxed if need.trains or zero == 3 else replace(need, micro=None))
        return out

    trial = [replace(need, checkpointing=True) if need.trains else need for need in needs]
    choices: list[tuple[str, list[Need]]] = [
        ("gradient_checkpointing = on", trial),
        ("gradient_checkpointing = on, micro = auto", changed()),
    ]
    if target.world > 1:
        choices += [("zero = 2", changed(2)), ("zero = 3", changed(3))]
    choices += [
        ("zero = 2, offload = optimizer", changed(2, "optimizer")),
        ("zero = 3, offload = optimizer", changed(3, "optimizer")),
        ("zero = 3, offload = both", changed(3, "both")),
    ]
    for words, variant in choices:
        if fit(variant, rollout, target).fits:
            return words
    return None


def _levels(needs: Sequence[Need], target: Target) -> Iterator[tuple[int, int]]:
    """(train, infer) ZeRO stages to try; a stage that an engine was given stands whatever comes here."""
    if target.world == 1:
        yield 1, 0
        return
    yield from ((1, 0), (2, 0), (2, 3), (3, 3))


def _place(needs: Sequence[Need], rollout: Rollout | None, target: Target, train: int, infer: int) -> Fit:
    actor = next((n.zero for n in needs if n.name == "actor" and n.zero is not None), None)
    stages = {n.name: _stage(n, target, train, infer, actor) for n in needs}
    states = {n.name: _states(n, stages[n.name][0], target) for n in needs}
    known = [s.total for s in states.values() if s is not None]
    whole = sum(known) if len(known) == len(needs) else None
    usable = int(target.memory * memory.USABLE) if target.memory is not None else None
    room = usable - whole if usable is not None and whole is not None else None
    placed = tuple(_settle(n, *stages[n.name], states[n.name], room) for n in needs)
    generate, cache = _generation(needs, rollout, room)
    working = [p.working for p in placed] + ([cache] if rollout else [])
    peak = None
    if whole is not None and all(w is not None for w in working):
        peak = whole + max(w for w in working if w is not None)
    return Fit(placed, generate, cache, whole, peak, usable)


def _stage(need: Need, target: Target, train: int, infer: int, actor: int | None) -> tuple[int, str]:
    """The ZeRO stage of an engine and why; `actor` is the stage that the actor was given, if any."""
    if need.zero is not None:
        return need.zero, "as written"
    if need.offload in ("params", "both"):
        return 3, "derived: 3, which offload of the parameters needs"
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
    return train, f"derived: {train}, the lowest{fits} on {target.world} {target.devices}"


def _states(need: Need, zero: int, target: Target) -> memory.States | None:
    if need.count is None or need.shape is None:
        return None
    states = memory.states(
        need.count, largest_layer(need.shape), dtype=need.dtype, zero=zero, offload=need.offload,
        trains=need.trains, gpus=target.gpus, nodes=target.nodes,
    )  # fmt: skip
    if need.ema:
        states = replace(states, optimizer=states.optimizer + 4 * need.count // target.world)
    return states


def _working(need: Need, checkpointing: bool, micro: int) -> int | None:
    if need.shape is None:
        return None
    return memory.activations(
        need.shape, sequences=micro * need.sequences, length=need.length, dtype=need.dtype,
        trains=need.trains, checkpointing=checkpointing, head=need.head, eager=need.eager,
    )  # fmt: skip


def _settle(need: Need, zero: int, reason: str, states: memory.States | None, room: int | None) -> Placement:
    """Checkpointing and micro batch of one engine in `room` bytes beside all model states, None for
    unknown."""
    by_tokens = need.micro or largest_divisor(need.per_rank, token_limit(room) // need.tokens)

    def fits(checkpointing: bool, micro: int) -> bool:
        used = _working(need, checkpointing, micro)
        return room is None or used is None or used <= room

    checkpointing = need.checkpointing
    if checkpointing is None:
        checkpointing = need.trains and not fits(False, by_tokens)
    choices = [d for d in divisors(need.per_rank) if d <= by_tokens and fits(checkpointing, d)]
    micro = need.micro or max(choices, default=1)
    working = _working(need, checkpointing, micro)
    return Placement(need, zero, reason, checkpointing, micro, states, working, room)


def _generation(
    needs: Sequence[Need], rollout: Rollout | None, room: int | None
) -> tuple[int | None, int | None]:
    """Sequences to generate at once and the bytes of their KV cache and one step's logits."""
    if rollout is None:
        return None, None
    actor = next(need for need in needs if need.name == "actor")
    shape = actor.shape
    if shape is None:
        return rollout.per_rank, None

    def used(rows: int) -> int:
        logits = rows * shape.vocab * (memory.BYTES[actor.dtype] + 4)
        return logits + memory.kv_cache(shape, sequences=rows, length=rollout.length, dtype=actor.dtype)

    if room is None:
        return rollout.per_rank, used(rollout.per_rank)
    rows = max((d for d in divisors(rollout.per_rank) if used(d) <= room), default=1)
    return rows, used(rows)


def token_limit(room: int | None) -> int:
    """The most tokens of a derived micro batch."""
    return TOKENS_UNKNOWN if room is None else TOKENS_KNOWN
