"""Seconds by roofline: for each phase the larger of FLOPs over the achieved rate and bytes over the achieved bandwidth,
then the bytes that cross links, which are not hidden behind computing here.

For each token a forward pass takes 2 FLOPs for each parameter of its matrices (the input embedding is a lookup) and
4 x layers x width for each token that it attends to; a backward pass takes twice that, beside frozen weights (LoRA) as
much; checkpointing one forward more.
No pass is faster than launching its layers one by one. A decode step reads all weights and the live cache once. Batches
are padded to their longest row, which is left out; an answer is taken to have its full length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhfdsl.planning import memory, nvme, shards
from rlhfdsl.planning.catalog import Shape
from rlhfdsl.planning.hardware import Target
from rlhfdsl.planning.layout import Fit, Placement, Sampling
from rlhfdsl.planning.rates import HOST_MEMORY, Rates

LOSS_BYTES = 80  # for each logit: written, log-softmax and entropy in fp32, softmax again and its gradient
UPDATE_BYTES = 28  # for each parameter: gradient, master weight and two moments read, the last three written
GRAPH_LAYER = 0.055e-3  # seconds: of a captured decode step, a layer's beyond its bytes (H100: OPT-1.3B at 16 to 256)
ADAPTER = 0.14  # of the launches of a layer, for each adapter in it (OPT and Llama under peft, counted in CPU time)
BESIDE = 6  # elements read or written for each output of a layer with an adapter: its own written, scaled, added
REDUCE, HOP = 6.6e-6, 0.6e-6  # seconds: of a small sum over devices on NVLink (NCCL's tuning.cc: ring, LL)
SUM_BYTES = 10  # for each parameter and micro batch: a gradient added to its fp32 sum


@dataclass(frozen=True, slots=True)
class Supervised:
    """One update of an sft, reward or dpo stage: rows of `length` tokens on average."""

    length: float


@dataclass(frozen=True, slots=True)
class OnPolicy:
    """One rollout of a ppo, grpo or rloo stage on one device: `sequences` of `prompt` + `answer` tokens on average.

    updates: optimizer updates; passes: times that each sequence is trained on; ptx: rows of `length` tokens at the
    ptx batch of each update.
    """

    sequences: int
    prompt: float
    answer: int
    updates: int
    passes: int
    ptx: int
    length: int


Work = Supervised | OnPolicy


def seconds(fit: Fit, work: Work, target: Target) -> dict[str, float] | None:
    """Seconds by phase of one update or, of a policy that learns from its own answers, one rollout.

    None when a number or rate is unknown.
    """
    engines = {}
    for placement in fit.engines:
        rates = target.rates(placement.need.dtype)
        if rates is None or placement.states is None or placement.need.shape is None:
            return None
        engines[placement.need.name] = _Clock(placement, placement.need.shape, rates, target)
    if isinstance(work, Supervised):
        times = {}
        for engine in engines.values():
            need = engine.placed.need
            rows = need.per_rank * need.sequences
            if need.trains:
                times["train"] = engine.update(rows, work.length, 1)
            else:
                times["score"] = engine.passes(rows, work.length, train=False)
        return times
    if fit.sampling is None:
        return None
    whole = work.prompt + work.answer
    actor = engines["actor"]
    learning = [engine for engine in engines.values() if engine.placed.need.trains]
    train = sum(e.update(work.sequences * work.passes, whole, work.updates) for e in learning)
    if work.ptx:
        train += actor.passes(work.ptx * work.updates, work.length, train=True)
    return {
        "generate": actor.generate(work.sequences, fit.sampling, work.prompt, work.answer),
        "score": sum(engine.passes(work.sequences, whole, train=False) for engine in engines.values()),
        "train": train,
    }


def whole(work: Work, target: Target, placed: Fit) -> float | None:
    """Seconds of one update or rollout in all."""
    each = seconds(placed, work, target)
    return None if each is None else sum(each.values())


@dataclass(frozen=True, slots=True)
class _Clock:
    """One placed engine and the rates of its device."""

    placed: Placement
    shape: Shape
    rates: Rates
    target: Target

    @property
    def count(self) -> int:
        return self.placed.need.count or 0

    @property
    def learns(self) -> int:
        return self.placed.need.learns or 0

    @property
    def layers(self) -> float:
        """Layers to launch, their adapters counted in."""
        lora = self.placed.need.lora
        return self.shape.layers * (1 + ADAPTER * len(lora.layers or ()) if lora is not None else 1)

    @property
    def width(self) -> int:
        return memory.BYTES[self.placed.need.dtype]

    @property
    def causal(self) -> bool:
        return self.placed.need.head == "none"

    def flops(self, length: float, tensor: int = 1) -> float:
        """FLOPs of a forward pass for one token of a sequence of `length`, on one device of those that share it."""
        lookup = 0 if self.causal and self.shape.tied else self.shape.vocab * self.shape.embed
        held = shards.held(self.shape, self.count, tensor)
        return 2.0 * (held - lookup) + 4.0 * self.shape.layers * self.shape.q_width / tensor * length

    def passes(self, sequences: float, length: float, *, train: bool) -> float:
        """Seconds of forward (and backward) passes over `sequences`, in micro batches."""
        need, tokens = self.placed.need, sequences * length
        backward = 2 if need.lora is None else 1  # frozen weights need no gradient, their inputs do
        forwards = 1 + backward + self.placed.checkpointing if train else 1
        compute = forwards * tokens * self.flops(length) / (self.rates.matmul * self.rates.train)
        micros = sequences / (self.placed.micro * need.sequences)
        launch = forwards * micros * self.layers * self.rates.forward
        out = max(compute, launch)
        if need.lora is not None and need.lora.layers is not None:
            outputs = self.shape.layers * sum(layer.outputs for layer in need.lora.layers)
            times = 1 + (self.placed.checkpointing + 2 / BESIDE if train else 0)  # scaling has a backward
            out += times * tokens * outputs * BESIDE * self.width / self.rates.copy
        if self.causal:
            out += tokens * self.shape.vocab * (LOSS_BYTES if train else LOSS_BYTES / 4) / self.rates.copy
        shared = self.target.world if self.placed.zero >= 2 else 1
        if train and self.placed.need.dtype != "fp32":
            out += micros * SUM_BYTES * self.learns / shared / self.rates.copy
        return out + micros * self.links(train)

    def links(self, train: bool) -> float:
        """Seconds of what a micro batch moves over links."""
        out = 0.0
        if self.placed.zero == 3:
            out += self.across((2 if train else 1) * self.width * self.count)
            if self.placed.offload in ("params", "both"):
                shard = self.width * self.count / self.target.world
                out += (2 if train else 1) * shard / self.rates.host
                if self.placed.need.nvme is not None:
                    read = nvme.pass_seconds(self.count, self.placed.need.dtype, self.target.nodes)
                    out += (2 if train else 1) * read
        if train and self.placed.zero >= 2:
            out += self.across(self.width * self.learns)
        return out

    def across(self, size: float) -> float:
        """Seconds in which `size` bytes, shared out over the devices, are gathered on or reduced from each."""
        world = self.target.world
        bandwidth = self.rates.link if self.target.nodes == 1 else self.rates.network
        return size * (world - 1) / world / bandwidth

    def update(self, sequences: float, length: float, updates: int) -> float:
        """Seconds of `updates` optimizer updates over `sequences`."""
        zero, world = self.placed.zero, self.target.world
        size = self.width * self.learns
        step = UPDATE_BYTES * self.learns / (world if zero else 1) / self.rates.copy
        if self.placed.offload in ("optimizer", "both"):
            moved = (4 + self.width) * self.learns / world / self.rates.host
            step = moved + UPDATE_BYTES * self.learns / self.target.nodes / HOST_MEMORY
            if self.placed.need.nvme is not None:
                step += nvme.step_seconds(self.learns, self.target.nodes)
        if zero == 0:
            step += self.across(2 * size)
        elif zero == 1:
            step += self.across(2 * size)  # gradients to their owners, weights back
        elif zero == 2:
            step += self.across(size)
        return self.passes(sequences, length, train=True) + updates * step

    def generate(self, sequences: int, sampling: Sampling, prompt: float, answer: int) -> float:
        """Seconds of sampling, by `generate` or by a captured step over a static cache.

        With shards a device reads its part of the weights for the sequences of all that share them.
        """
        tensor, rounds, slots = sampling.tensor, sequences / sampling.rows, sampling.rows * sampling.tensor
        prefill = max(
            slots * prompt * self.flops(prompt, tensor) / (self.rates.matmul * self.rates.train),
            self.layers * self.rates.forward,
        ) + self.totals(slots * prompt, tensor)  # fmt: skip
        cache = memory.kv_cache(self.shape, sequences=sampling.rows, length=1, dtype=self.placed.need.dtype)
        read = self.width * shards.held(self.shape, self.count, tensor) + cache * (prompt + answer / 2)
        compute = slots * self.flops(prompt + answer / 2, tensor) / self.rates.matmul
        if sampling.engine == "graph":
            step = max(read / self.rates.copy, compute) + self.layers * GRAPH_LAYER + self.totals(slots, tensor)
            return rounds * (prefill + answer * step) + self.links(train=False)
        step = max(self.layers * self.rates.decode, read / self.rates.copy, compute)
        step += slots * self.shape.vocab * memory.DRAW / self.rates.copy
        if self.placed.zero == 3 and self.count > self.placed.need.live:
            step += self.links(train=False)
        return rounds * (prefill + self.links(train=False) + answer * step)

    def totals(self, tokens: float, devices: int) -> float:
        """Seconds of a forward's sums over the devices that share the weights: two for each layer, `tokens` wide."""
        if devices == 1:
            return 0.0
        hops = 2 * (devices - 1)
        moved = tokens * self.shape.hidden * self.width * hops / devices
        return 2 * self.shape.layers * (REDUCE + hops * HOP + moved / self.rates.link)


def assumptions(target: Target, dtypes: Mapping[str, None]) -> list[str]:
    """What the seconds of a plan rest on, one sentence for each thing."""
    out = []
    for dtype in dtypes:
        rates = target.rates(dtype)
        if rates is None:
            continue
        link = rates.link if target.nodes == 1 else rates.network
        speed = f"{dtype}: matmul {rates.matmul / 1e12:.3g} TFLOP/s, of which passes reach {rates.train:.0%}"
        speed += f"; memory {rates.copy / 1e9:.4g} GB/s"
        if target.world > 1:
            speed += f"; links {link / 1e9:.3g} GB/s"
        out.append(f"{speed} ({rates.origin})")
        if len(out) == 1:
            out.append(
                f"a decode step takes at least {rates.decode * 1e3:.2f} ms for each layer, a forward pass "
                f"{rates.forward * 1e3:.2f} ms"
            )
    return out
