"""What the engines of a stage ask of a device, and how they lie on it; fit.py makes the second of the first."""

from __future__ import annotations

from dataclasses import dataclass

from rlhfdsl.language.recipe import Block, Reference
from rlhfdsl.planning import memory
from rlhfdsl.planning.adapters import Lora
from rlhfdsl.planning.catalog import Shape
from rlhfdsl.planning.deepspeed_config import LIVE


@dataclass(frozen=True, slots=True)
class Part:
    """One engine of a stage before it is placed. `group` is the block with its settings; `at` its address."""

    name: str
    role: str
    at: str
    group: Block | None
    reference: Reference
    head: str
    trains: bool
    per_rank: int
    sequences: int
    length: int
    shares: str | None = None  # the engine whose frozen base it is
    in_4_bits: bool = False  # its base, or the one that it shares


@dataclass(frozen=True, slots=True)
class Need:
    """What one engine asks of a device. None means `auto` (zero, offload, checkpointing, micro) or unknown (shape,
    count).

    per_rank: items of one step on one device, which the micro batch divides. An item is `sequences` sequences
    of `length` tokens: two for a pair. bucket, live: elements of a ZeRO bucket and parameters that ZeRO 3 may keep
    whole, where `deepspeed { }` says them.
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
    offload: str | None
    checkpointing: bool | None
    micro: int | None
    ema: bool  # an fp32 moving average of what trains, shared out over the devices
    bucket: int | None = None
    live: int = LIVE
    trained: int | None = None  # of `count`, what trains; None: all of an engine that does
    lora: Lora | None = None  # its adapters
    shares: str | None = None  # the engine whose frozen base this one is, without weights of its own
    packed: int = 0  # of `count`, weights that a base in 4 bits packs, its own or the one that it shares
    nvme: str | None = None  # folder on a drive of each node, where what is offloaded lives
    packing: bool = True  # whether rows may run without their padding

    @property
    def learns(self) -> int | None:
        """Parameters with a gradient and optimizer states."""
        return self.count if self.trained is None else self.trained

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True, slots=True)
class Rollout:
    """The generation of a PPO stage: `per_rank` sequences of `length` tokens from the engine `actor`, the first
    `prompt` of them given.

    engine: "eager" or "graph". spare: whether eager may stand in for a graph that has no room. free_cache: whether a
    graph gives its memory back after each rollout. tensor: devices that share a copy of the weights, None for `auto`.
    """

    per_rank: int
    prompt: int
    length: int
    engine: str = "eager"
    spare: bool = True
    free_cache: bool = False
    tensor: int | None = 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """`rows` sequences at once on each device: bytes of their cache, of all that generation needs, and of what stays
    after it. tensor: devices that share a copy of the weights and sample their rows together.
    """

    engine: str
    rows: int
    cache: int
    whole: int
    kept: int
    tensor: int = 1


@dataclass(frozen=True, slots=True)
class Placement:
    """One engine on a device. `states` is None when the model's numbers are unknown.

    reason: why the ZeRO stage is what it is. average: bytes of its moving average. room: bytes left for its micro
    batch. working: bytes that come and go, by phase. joint: whether an engine and the reference that shares its base
    read each micro batch in one forward, with its rows twice.
    """

    need: Need
    zero: int
    offload: str
    reason: str
    checkpointing: bool
    micro: int
    states: memory.States | None
    average: int
    room: int | None
    working: dict[str, int]
    joint: bool = False


@dataclass(frozen=True, slots=True)
class Phase:
    """The bytes of a device in one phase of a stage: what stays, what comes and goes, and whose that is."""

    name: str
    resident: int
    working: int
    engine: str

    @property
    def peak(self) -> int:
        return self.resident + self.working


@dataclass(frozen=True, slots=True)
class Fit:
    """A whole stage on a device, in bytes; no phases when a model's numbers are unknown.

    generate: sequences generated at once on one device. sampling: with what and in how many bytes, where known.
    usable, host_usable: what a plan may fill of a device and of the memory of a node, None where unknown.
    """

    engines: tuple[Placement, ...]
    generate: int | None
    sampling: Sampling | None
    phases: tuple[Phase, ...]
    usable: int | None
    host_usable: int | None

    @property
    def peak(self) -> int | None:
        return max((phase.peak for phase in self.phases), default=None)

    @property
    def host(self) -> int:
        """Bytes of the memory of each node that take what is offloaded from its devices."""
        return sum(p.states.host for p in self.engines if p.states is not None)

    @property
    def on_device(self) -> bool | None:
        """Whether a device has room for its part, None where unknown."""
        return None if self.peak is None or self.usable is None else self.peak <= self.usable

    @property
    def fits(self) -> bool | None:
        return self.on_device and (self.host_usable is None or self.host <= self.host_usable)
