"""Seconds by roofline: of each kind of kernel FLOPs over the achieved rate or bytes over the achieved bandwidth, of the
device and its host the slower; then the bytes that cross links, which are not hidden behind computing here.

The FLOPs of a forward pass are those of flops.py; a backward pass takes twice as many, beside frozen weights (LoRA) as
many; checkpointing one forward more. Norms, activations, adapters, losses and the optimizer are bound by their bytes
(traffic.py). Weights in 4 bits are read back, matrix by matrix, in every pass and decode step. A decode step reads all
weights and the live cache once. Rows of unequal lengths are cut into micro batches as trainers cut them (cut.py); an
answer is taken to have its full length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlhfdsl.planning import cut, flops, memory, nvme, shards, traffic
from rlhfdsl.planning.adapters import linears
from rlhfdsl.planning.catalog import Shape
from rlhfdsl.planning.cut import BACKWARD_HOOKS, HOOKS, Lengths, PassCost
from rlhfdsl.planning.hardware import Target
from rlhfdsl.planning.layout import Fit, Placement, Sampling
from rlhfdsl.planning.rates import BACKWARD_LAUNCHES, HOST_MEMORY, Rates

# Seconds of a captured decode step, a layer's beyond its bytes: of up to FEW sequences, whose products are kernels of
# `engines/rollout/kernels/dense.py`, and of more (H100: OPT-1.3B at 16, and at 128).
FEW, GRAPH_LAYER_OF_FEW, GRAPH_LAYER = 32, 0.026e-3, 0.042e-3
ADAPTER = 0.25  # of the launches of a layer, for each adapter in it (H100: Llama-3.2-3B with 7 under peft)
GRAPH_ADAPTER = 0.007e-3  # seconds of each adapter of a layer in a captured step (H100: rank 16, 4096 to 36 864 wide)
# A captured step of up to FEW sequences reads weights in 4 bits as they lie. What takes time is making values of them,
# seconds for each weight: of up to HALF sequences (H100: matrices of OPT-66B) and of more (of OPT-13B). Otherwise each
# matrix is written in the engine's type first.
HALF, UNPACKED_HALF, UNPACKED = 16, 0.50e-12, 0.86e-12
READ = 3 / traffic.LAYER_LAUNCHES  # of the launches of a layer, for each matrix in 4 bits: scales, their offset, itself
# Forward passes of launches that torch's checkpointing of a layer costs the host beside the one that it repeats, by its
# hooks at every tensor (H100: OPT-1.3B).
CHECKPOINT = 1.3
REDUCE, HOP = 6.6e-6, 0.6e-6  # seconds: of a small sum over devices on NVLink (NCCL's tuning.cc: ring, LL)


@dataclass(frozen=True, slots=True)
class Supervised:
    """One update of an sft, reward or dpo stage: how long its sequences are."""

    lengths: Lengths


@dataclass(frozen=True, slots=True)
class OnPolicy:
    """One rollout of a ppo, grpo or rloo stage on one device: `sequences` of prompts and of answers of `answer` tokens.

    updates: optimizer updates; passes: times that each sequence is trained on; ptx: rows of `length` tokens at the
    ptx batch of each update.
    """

    sequences: int
    prompts: Lengths
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
                times["train"] = _together(engine.update(rows, work.lengths, 1))
            else:
                times["score"] = _together(engine.passes(rows, work.lengths, train=False))
        return times
    if fit.sampling is None:
        return None
    whole = work.prompts.behind(work.answer)
    said = work.answer / whole.mean
    actor = engines["actor"]
    learning = [engine for engine in engines.values() if engine.placed.need.trains]
    train = [e.update(work.sequences * work.passes, whole, work.updates, said) for e in learning]
    if work.ptx:
        train.append(actor.passes(work.ptx * work.updates, Lengths(work.length), train=True, cuts=work.updates))
    return {
        "generate": actor.generate(work.sequences, fit.sampling, work.prompts.mean, work.answer),
        "score": _together(*(engine.score(work.sequences, whole, said) for engine in engines.values())),
        "train": _together(*train),
    }


def whole(work: Work, target: Target, placed: Fit) -> float | None:
    """Seconds of one update or rollout in all."""
    each = seconds(placed, work, target)
    return None if each is None else sum(each.values())


@dataclass(frozen=True, slots=True)
class _Passes:
    """Seconds of an engine's passes: of the device, of its host, which runs ahead of it, and of what waits for both."""

    device: float
    host: float
    after: float


def _together(*parts: _Passes) -> float:
    """Seconds of passes of several engines in turn: while a host launches one's, the device computes another's."""
    device, host = sum(part.device for part in parts), sum(part.host for part in parts)
    return max(device, host) + sum(part.after for part in parts)


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
    def reading(self) -> float:
        """As many layers as what reads weights in 4 bits back takes to launch."""
        return self.shape.layers * READ * len(linears(self.shape) or ()) if self.placed.need.packed else 0.0

    @property
    def launch(self) -> float:
        """Seconds in which the host launches one kernel."""
        return self.rates.forward / traffic.LAYER_LAUNCHES

    @property
    def launches(self) -> tuple[int, int]:
        """Launches for each tensor that trains, of a micro batch and of a step."""
        return traffic.launches(self.placed.need.dtype, self.placed.zero)

    @property
    def tensors(self) -> int:
        """Parameter tensors."""
        return traffic.tensors(self.shape, not self.causal)

    @property
    def trained_tensors(self) -> int:
        return traffic.trained_tensors(self.shape, not self.causal, self.placed.need.lora)

    @property
    def width(self) -> int:
        return memory.BYTES[self.placed.need.dtype]

    @property
    def causal(self) -> bool:
        return self.placed.need.head == "none"

    def flops(self, length: float, tensor: int) -> float:
        """FLOPs of a forward pass for one token of a sequence of `length`, its logits among them, on one device of the
        `tensor` that share it."""
        each = flops.forward(self.shape, self.count, causal=self.causal, tensor=tensor)
        return each.token + each.said + length * each.attended

    def score(self, sequences: float, lengths: Lengths, said: float) -> _Passes:
        """Reading `sequences`: of a joint pass of actor and reference all is the actor's."""
        if not self.placed.joint:
            read = self.passes(sequences, lengths, said, train=False)
            return replace(read, after=read.after + self.woken)
        if self.placed.need.shares:
            return _Passes(0.0, 0.0, 0.0)
        return self.passes(sequences, lengths, said, train=False, copies=2)

    def passes(
        self, sequences: float, lengths: Lengths, said: float = 1.0, *, train: bool, copies: int = 1, cuts: int = 1
    ) -> _Passes:
        """Forward (and backward) passes over `sequences`, in `cuts` minibatches that are cut into micro batches.

        said: the share of tokens whose logits are needed, those of answers where a policy reads its own. copies: times
        that each row is in its micro batch.
        """
        need, causal = self.placed.need, self.causal
        items = sequences / need.sequences / cuts
        cost = PassCost.of(
            self.target.device, self.shape.layers, self.count, need.packing and not need.eager,
            self.tensors if self.placed.zero == 3 else 0,
        )  # fmt: skip
        one = cut.passes(lengths, items, self.placed.micro * need.length, cost.over(need.sequences))
        each = flops.forward(self.shape, self.count, causal=causal)
        times = copies * need.sequences * cuts
        tokens, logits = times * one.computed, said * times * one.real
        forwards = 1 + self.placed.checkpointing if train else 1
        products = forwards + (1 if need.lora else 2) * train  # frozen weights need no gradient, their inputs do
        work = tokens * each.token + logits * each.said + times * one.attended * each.attended
        compute = products * work / (self.rates.matmul * self.rates.train)
        moved = tokens * self.moved(one.attended / one.computed, forwards, train)
        moved += logits * self.lost(train) * causal
        micros, launched = one.count * cuts, one.launched * cuts
        moved += micros * (self.summed(train) + (forwards + train) * self.read_back)
        after = micros * (self.links(train) + self.hooks(forwards, train))
        return _Passes(compute + moved / self.rates.copy, self.host(micros, launched, forwards, train), after)

    def moved(self, length: float, forwards: int, train: bool) -> float:
        """Bytes for each token of passes, beside matrix products and the loss. length: columns that it sees."""
        need = self.placed.need
        layer = (forwards + traffic.BACKWARD * train) * traffic.layer(
            self.shape, length, need.dtype, need.eager, self.target.device
        )
        if need.lora is not None:
            layer += forwards * traffic.adapters(need.lora, need.dtype, backward=False)
            layer += traffic.adapters(need.lora, need.dtype, backward=True) * train
        return self.shape.layers * layer

    def lost(self, train: bool) -> float:
        """Bytes of the loss for each token whose logits it reads."""
        device, dtype = self.target.device, self.placed.need.dtype
        moved = traffic.loss(device, dtype, backward=False) + traffic.loss(device, dtype, backward=True) * train
        return self.shape.vocab * moved

    def summed(self, train: bool) -> float:
        """Bytes of adding a micro batch's gradients to their sums."""
        return traffic.sums(self.placed.need.dtype, self.placed.zero, self.target.world) * self.learns * train

    def host(self, micros: float, launched: float, forwards: int, train: bool) -> float:
        """Seconds in which the host launches micro batches. launched: how many plain ones would take it as long."""
        layers = (forwards + BACKWARD_LAUNCHES * train) * self.layers + (forwards - 1) * CHECKPOINT * self.shape.layers
        reading = (forwards + train) * self.reading
        out = (launched * layers + micros * reading) * self.rates.forward
        return out + micros * self.launches[0] * self.trained_tensors * self.launch * train

    def hooks(self, forwards: int, train: bool) -> float:
        """Seconds of a micro batch that ZeRO 3 takes the host, which waits for the device in them."""
        if self.placed.zero != 3:
            return 0.0
        return (forwards * HOOKS + train * BACKWARD_HOOKS) * self.tensors

    @property
    def read_back(self) -> float:
        """Bytes of reading all that is in 4 bits and writing it in the engine's type, once."""
        return (memory.PACKED + self.width) * self.placed.need.packed

    @property
    def woken(self) -> float:
        """Seconds in which weights that rest on the host come to the device."""
        rests = self.placed.states is not None and self.placed.states.rests
        return self.width * self.count / self.rates.host if rests else 0.0

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

    def update(self, sequences: float, lengths: Lengths, updates: int, said: float = 1.0) -> _Passes:
        """`updates` optimizer updates over `sequences`."""
        zero, world = self.placed.zero, self.target.world
        size, dtype = self.width * self.learns, self.placed.need.dtype
        step = traffic.STEP[dtype] * self.learns / (world if zero else 1) / self.rates.copy
        if traffic.at_once(dtype, zero):
            step += (traffic.STEP_SUMS + traffic.STEP_WHOLE * (1 - 1 / world)) * self.learns / self.rates.copy
        if self.placed.offload in ("optimizer", "both"):
            moved = (4 + self.width) * self.learns / world / self.rates.host
            step = moved + traffic.STEP[dtype] * self.learns / self.target.nodes / HOST_MEMORY
            if self.placed.need.nvme is not None:
                step += nvme.step_seconds(self.learns, self.target.nodes)
        step += self.launches[1] * self.trained_tensors * self.launch
        if zero == 0:
            step += self.across(2 * size)
        elif zero == 1:
            step += self.across(2 * size)  # gradients to their owners, weights back
        elif zero == 2:
            step += self.across(size)
        passes = self.passes(sequences, lengths, said, train=True, cuts=updates)
        return replace(passes, after=passes.after + updates * step)

    def generate(self, sequences: int, sampling: Sampling, prompt: float, answer: int) -> float:
        """Seconds of sampling, by `generate` or by a captured step over a static cache.

        With shards a device reads its part of the weights for the sequences of all that share them.
        """
        tensor, rounds, slots = sampling.tensor, sequences / sampling.rows, sampling.rows * sampling.tensor
        prefill = max(
            slots * prompt * self.flops(prompt, tensor) / (self.rates.matmul * self.rates.train),
            (self.layers + self.reading) * self.rates.forward,
        ) + self.totals(slots * prompt, tensor)  # fmt: skip
        cache = memory.kv_cache(self.shape, sequences=sampling.rows, length=1, dtype=self.placed.need.dtype)
        read = self.width * shards.held(self.shape, self.count, tensor) + cache * (prompt + answer / 2)
        compute = slots * self.flops(prompt + answer / 2, tensor) / self.rates.matmul
        need, graph = self.placed.need, sampling.engine == "graph"
        few = graph and slots <= FEW and need.dtype != "fp32"
        as_they_lie = few and need.dtype == "bf16"
        made = 0.0  # seconds beside those of what is read
        if as_they_lie:
            read -= self.width * need.packed
            made = need.packed * max(memory.PACKED / self.rates.copy, UNPACKED_HALF if slots <= HALF else UNPACKED)
        else:
            read += self.read_back
        if graph:
            step = max(read / self.rates.copy + made, compute) + self.totals(slots, tensor)
            layers = self.shape.layers + (0.0 if as_they_lie else self.reading)
            step += layers * (GRAPH_LAYER_OF_FEW if few else GRAPH_LAYER)
            if need.lora is not None:
                step += self.shape.layers * len(need.lora.layers or ()) * GRAPH_ADAPTER
            return rounds * (prefill + answer * step) + self.links(train=False)
        step = max((self.layers + self.reading) * self.rates.decode, read / self.rates.copy, compute)
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
        speed = f"{dtype}: matmul {rates.matmul / 1e12:.3g} TFLOP/s"
        speed += f", of which products of passes reach {rates.train:.0%}"
        speed += f"; memory {rates.copy / 1e9:.4g} GB/s"
        if target.world > 1:
            speed += f"; links {link / 1e9:.3g} GB/s"
        out.append(f"{speed} ({rates.origin})")
        if len(out) == 1:
            out.append(
                f"for each layer a forward pass takes at least {rates.forward * 1e3:.2f} ms, a decode step of "
                f"`generate` {rates.decode * 1e3:.2f} ms, and a captured one {GRAPH_LAYER * 1e3:.3f} ms "
                f"({GRAPH_LAYER_OF_FEW * 1e3:.3f} ms up to {FEW} sequences) beside its bytes"
            )
    return out
