"""Bytes on a device: model states under ZeRO, activations of one micro batch, the KV cache of a rollout.

Model states follow DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs`,
`estimate_zero3_model_states_mem_needs`) for 16-bit weights at stages 2 and 3, but for the gradients of stage 2, and a
test holds them so; stages 0 and 1, fp32 and engines that only infer extend the same bookkeeping. Activations are closed
forms, stated beside each function. They leave out the allocator's slack and the CUDA context, for which `USABLE`
leaves room.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhfdsl.planning import families
from rlhfdsl.planning.adapters import Lora, linears
from rlhfdsl.planning.catalog import Shape
from rlhfdsl.planning.deepspeed_config import LIVE, bucket_size
from rlhfdsl.planning.families import Family

USABLE = 0.9  # the share of a device, and of the memory of a node, that a plan may fill
CHUNK = 1 << 26  # bytes of fp32 logits at once on a CPU, as in training/losses.py
DRAW = 36  # for each logit: fp32 scores three times, three int64 of the hash behind the noise (rollout/sampling.py)
COLUMNS, PREFILL = 64, 32_768  # of the graph rollout, as in engines/rollout/graph.py
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Bytes of a weight in 4 bits: a half, a scale of 8 bits for each block of 64, and one in fp32 for each 256 of those.
PACKED = 0.5 + 1 / 64 + 4 / (64 * 256)
SCALES = 2 * 4 / 64  # for each weight that is read back: its scales in fp32, before and after their offset


@dataclass(frozen=True, slots=True)
class States:
    """Bytes of one engine's model states on each device, and on the host (and the drive) of each node."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    host: int

    sums: int = 0  # of the gradients, the fp32 sums that stay from step to step
    disk: int = 0  # of the NVMe drive of each node
    rests: bool = False  # whether its weights leave the device while it is not in use

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def lasting(self) -> int:
        """What stays when the engine is not in use."""
        return self.total - self.passing

    @property
    def passing(self) -> int:
        """What comes and goes with the engine's use: gradients from the first backward of a step to its end."""
        return self.total if self.rests else self.gradients - self.sums


def usable(whole: int | None) -> int | None:
    """What of so many bytes a plan may fill, None for unknown."""
    return None if whole is None else int(whole * USABLE)


def states(
    count: int, largest: int, *, dtype: str, zero: int, offload: str, trains: bool, gpus: int, nodes: int,
    trained: int | None = None, packed: int = 0,
) -> States:  # fmt: skip
    """Model states of an engine with `count` parameters, whose largest module has `largest`.

    trained: of the parameters, those that train (adapters and a head); None means all. Frozen ones have a weight in
    the engine's type, and neither gradient nor optimizer states. packed: of those, the ones in 4 bits (not at ZeRO 3).
    gpus: devices of each node. Bytes for each parameter when 16-bit weights train: 2 weights, 2 gradients, 4
    fp32 gradients, 4 master weights, 8 Adam moments; in fp32 the weights are their own gradients' type (4 +
    4) and only ZeRO keeps a second copy as master weights. Stage 1 shards master weights and moments, stage 2
    the gradients too, stage 3 everything, with one module gathered at a time.

    At stage 2 a 16-bit gradient goes when its bucket is reduced into the fp32 sums of the device's part, which stay on
    the device where the optimizer is offloaded too; at stage 1 with offload there are fp32 sums of all parameters, and
    of the part at the step. (DeepSpeed's estimator has the 16-bit gradients, and no gradient beside offload.)

    The fp32 gradients of bf16 at stage 1 and those of stage 3 are buffers that an engine has from its start, and
    sets to 0 after each step (`runtime/bf16_optimizer.py`, `runtime/zero/stage3.py` of DeepSpeed 0.19.8); the others
    are given back with the step (`runtime/zero/stage_1_and_2.py`). Of bf16 at stage 1 a gradient is added to its sum
    as soon as it is there, and is there for one module at a time.
    """
    width, world = BYTES[dtype], gpus * nodes
    half = width == 2
    gathered = 2 * width * largest
    if not trains:
        if zero < 3 and offload == "idle":  # each device of a node has its copy on the host
            return States(count, width * count, 0, 0, width * count * gpus, rests=True)
        if zero < 3:
            return States(count, width * count, 0, 0, 0)
        if offload in ("params", "both"):
            return States(count, gathered, 0, 0, width * count // nodes)
        return States(count, gathered + width * count // world, 0, 0, 0)
    learns = count if trained is None else trained
    held = width * count - int((width - PACKED) * packed)
    grads = 6 if half else 4
    if zero == 0:
        return States(count, held, grads * learns, (12 if half else 8) * learns, 0)
    if zero < 3 and offload != "off":
        host = int(learns * max(4 * world, 16) * 1.5)
        part = 4 * learns // world if half else 0
        return States(count, held, part + (4 * learns if zero == 1 else 0), 0, host)
    if zero == 1 and dtype == "bf16":
        sums = 4 * learns
        return States(count, held, sums + width * min(largest, learns), 12 * learns // world, 0, sums)
    if zero == 1:
        return States(count, held, grads * learns, 12 * learns // world, 0)
    if zero == 2:
        return States(count, held, 4 * learns // world, 12 * learns // world, 0)
    if offload == "both":
        return States(count, gathered, 0, 0, int((count * width + learns * 16) * (1 / nodes) * 1.5))
    shard = width * count // world
    if offload == "optimizer":
        return States(count, gathered + shard, 0, 0, int(learns * 16 * (1 / nodes) * 1.5))
    gradients = 4 * learns // world
    optimizer = (width + 16) * learns // world - width * learns // world - gradients
    if offload == "params":
        return States(count, gathered, gradients, optimizer, width * count // nodes, gradients)
    return States(count, gathered + shard, gradients, optimizer, 0, gradients)


def read_back(s: Shape, dtype: str) -> int:
    """Bytes of the largest matrix of a base in 4 bits while a product reads it: in the engine's type, and its scales.

    The products of up to a few rows have a kernel of bitsandbytes' own that does without.
    """
    return int((BYTES[dtype] + SCALES) * max(layer.inputs * layer.outputs for layer in linears(s) or ()))


def gathered(states: States, *, dtype: str, zero: int, live: int = LIVE) -> int:
    """Bytes of parameters that ZeRO 3 keeps whole in use, beyond the one module that `states` counts.

    DeepSpeed releases a parameter after use only when `live` parameters are whole or its next use is as far away.
    """
    return 0 if zero < 3 else max(0, BYTES[dtype] * min(states.parameters, live) - states.weights)


def buckets(count: int, *, dtype: str, zero: int, elements: int | None = None) -> int:
    """Bytes of the buffers in which ZeRO collects gradients for the other ranks: one, at stage 2 one more.

    elements: of one, where the recipe says it.
    """
    return 0 if zero == 0 else (elements or bucket_size(count)) * BYTES[dtype] * (2 if zero == 2 else 1)


def layer_tokens(s: Shape, length: int, dtype: str, eager: bool, device: str, lora: Lora | None = None) -> int:
    """Bytes that one layer keeps for the backward pass of each token of sequences of `length`.

    With e bytes for an element: e for each of the queries, the keys (both after rotation), the values and the
    attention's result, and what the family's norms and MLP keep (families.py). Eager attention keeps keys and values
    repeated to the queries' width, and its scores; other attention has no mask (engines/passes.py).
    """
    e = BYTES[dtype]
    family = families.on(device, s.type)

    def bytes_of(pair: tuple[int, int]) -> int:
        return pair[0] * e + pair[1]

    kept = 2 * e * (s.q_width + (s.q_width if eager else s.kv_width))
    kept += bytes_of(family.kept_hidden) * s.hidden + family.kept_mlp * e * s.intermediate
    kept += bytes_of(family.kept_heads) * (s.q_width + s.kv_width)
    kept += s.heads * length * bytes_of(family.scores) if eager else 0
    return kept if lora is None or lora.layers is None else kept + _beside_frozen(s, family, lora, e)


def _beside_frozen(s: Shape, family: Family, lora: Lora, e: int) -> int:
    """What the layer of a frozen model keeps more (or less, below 0) for each token than one that trains.

    The gradients of frozen weights are not there, nor what only they need: what norms kept for theirs, and the input
    of every matrix without an adapter. An adapter keeps its inner values, and with dropout an input of its own and a
    mask of a byte.
    """
    roles = {} if lora.entry["dropout"] else {layer.role for layer in lora.layers or ()}
    more = -(family.norm_hidden[0] * e + family.norm_hidden[1]) * s.hidden
    more -= (family.norm_heads[0] * e + family.norm_heads[1]) * (s.q_width + s.kv_width)
    more -= e * s.hidden * (("in" not in roles) + ("up" not in roles))
    more -= e * s.q_width * (family.joined and "out" not in roles)
    more -= e * s.intermediate * (not family.shared_mlp and "down" not in roles)
    for layer in lora.layers or ():
        more += lora.rank * e + ((e + 1) * layer.inputs if lora.entry["dropout"] else 0)
    return more


def activations(
    s: Shape,
    *,
    sequences: int,
    length: int,
    dtype: str,
    trains: bool,
    checkpointing: bool,
    head: str,
    eager: bool,
    device: str,
    lora: Lora | None = None,
) -> int:
    """Bytes that one micro batch of `sequences` x `length` tokens holds at its peak, besides model states.

    To train every layer keeps its set (`layer_tokens`); with checkpointing a layer keeps its input, and one layer at
    a time is whole. Without training one layer's set is the peak.

    The output of a causal model adds, for each token, vocab x e: the logits; to train as much again, their gradient.
    On a CPU the loss makes its fp32 copy in chunks of CHUNK bytes, of which three live at once.
    """
    e, tokens = BYTES[dtype], sequences * length
    layer = layer_tokens(s, length, dtype, eager, device, lora if trains else None)
    if not trains:
        kept = layer
    elif checkpointing:
        kept = s.layers * e * s.hidden + layer
    else:
        kept = s.layers * layer
    if head == "scalar":
        return tokens * kept
    output = s.vocab * e * (2 if trains else 1)
    chunks = 3 * min(CHUNK, 4 * tokens * s.vocab) if device == "cpu" else 0
    return tokens * (kept + output) + chunks


def kv_cache(s: Shape, *, sequences: int, length: int, dtype: str) -> int:
    """Bytes of the keys and values of `sequences` rows of `length` tokens."""
    return 2 * s.layers * s.kv_width * BYTES[dtype] * sequences * length


def generation(
    s: Shape, *, rows: int, prompt: int, length: int, dtype: str, eager: bool, graph: bool, device: str
) -> tuple[int, int]:
    """(cache, all) bytes of sampling `rows` sequences at once, from `prompt` tokens to `length`.

    With `generate` the cache grows by joining each step's keys and values to it, which holds one layer twice; beside
    it comes the larger of one layer's set over the prompts and a draw over the vocabulary: the logits twice, DRAW bytes
    more. Left-padded prompts have an additive mask, beside which keys and values are repeated to the queries' width.
    With `graph` the cache has room for every sequence's `length` from the start (in columns of COLUMNS), prompts are
    read PREFILL tokens at a time, and a draw reads the logits once.
    """
    if not graph:
        cache = kv_cache(s, sequences=rows, length=length, dtype=dtype)
        cache += cache // s.layers
        masked = 0 if eager else BYTES[dtype] * (prompt + 2 * (s.q_width - s.kv_width))
        prefill = rows * prompt * (layer_tokens(s, prompt, dtype, eager, device) + masked)
        draw = rows * s.vocab * (2 * BYTES[dtype] + DRAW)
        return cache, cache + max(prefill, draw)
    cache = kv_cache(s, sequences=rows, length=-(-length // COLUMNS) * COLUMNS, dtype=dtype)
    prefill = min(rows * prompt, max(PREFILL, prompt)) * layer_tokens(s, prompt, dtype, False, device)
    return cache, cache + max(prefill, 2 * rows * s.vocab * BYTES[dtype])
