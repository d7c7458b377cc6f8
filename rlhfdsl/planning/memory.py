"""Bytes on a device: model states under ZeRO, activations of one micro batch, the KV cache of a rollout.

Model states follow DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs`,
`estimate_zero3_model_states_mem_needs`) for 16-bit weights at stages 2 and 3, and a test holds them equal;
stages 0 and 1, fp32 and engines that only infer extend the same bookkeeping. Activations are closed forms,
stated beside each function. They leave out the allocator's slack, the CUDA context and DeepSpeed's
communication buffers, for which `USABLE` leaves room.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhfdsl.planning.catalog import GATED, Shape

USABLE = 0.9  # the share of a device that a plan may fill
CHUNK = 1 << 26  # bytes of fp32 logits at once, as in training/losses.py
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class States:
    """Bytes of one engine's model states on each device, and on the host for each node."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    host: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def states(
    count: int, largest: int, *, dtype: str, zero: int, offload: str, trains: bool, gpus: int, nodes: int
) -> States:
    """Model states of an engine with `count` parameters, whose largest module has `largest`.

    gpus: devices of each node. Bytes for each parameter when 16-bit weights train: 2 weights, 2 gradients, 4
    fp32 gradients, 4 master weights, 8 Adam moments; in fp32 the weights are their own gradients' type (4 +
    4) and only ZeRO keeps a second copy as master weights. Stage 1 shards master weights and moments, stage 2
    the gradients too, stage 3 everything, with one module gathered at a time.
    """
    width, world = BYTES[dtype], gpus * nodes
    half = width == 2
    gathered = 2 * width * largest
    if not trains:
        if zero < 3:
            return States(count, width * count, 0, 0, 0)
        if offload in ("params", "both"):
            return States(count, gathered, 0, 0, width * count // nodes)
        return States(count, gathered + width * count // world, 0, 0, 0)
    grads = 6 if half else 4
    if zero == 0:
        return States(count, width * count, grads * count, (12 if half else 8) * count, 0)
    if zero < 3 and offload != "off":
        host = int(count * max(4 * world, 16) * 1.5)
        return States(count, width * count, width * count if zero == 1 else 0, 0, host)
    if zero == 1:
        return States(count, width * count, grads * count, 12 * count // world, 0)
    if zero == 2:
        gradients = grads * count // world
        return States(count, width * count, gradients, (grads + 12) * count // world - gradients, 0)
    if offload == "both":
        return States(count, gathered, 0, 0, int(count * (width + 16) * (1 / nodes) * 1.5))
    shard = width * count // world
    if offload == "optimizer":
        return States(count, gathered + shard, 0, 0, int(count * 16 * (1 / nodes) * 1.5))
    gradients = 4 * count // world
    optimizer = (width + 16) * count // world - shard - gradients
    if offload == "params":
        return States(count, gathered, gradients, optimizer, width * count // nodes)
    return States(count, gathered + shard, gradients, optimizer, 0)


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
) -> int:
    """Bytes that one micro batch of `sequences` x `length` tokens holds at its peak, besides model states.

    With e bytes for an element, each token keeps in each layer, to train:
      attention  e (4 hidden + 2 (hidden + 2 kv))  norm in and out, attention, projection; q k v twice
      MLP        e (3 hidden + g intermediate)     g = 4 with a gate (gate, up, activation, product), else 2
      norms      8 hidden                          two fp32 copies
    and with eager attention (heads x length) x (e + 4) scores. With checkpointing a layer keeps its input,
    e hidden, and one layer at a time is whole. Without training one layer's set is the peak.

    The output of a causal model adds, for each token, vocab x 2 e: the logits, and their copy without the
    last position; to train as much again for the gradients of both. The loss makes its fp32 copy in chunks of
    CHUNK bytes, of which three live at once.
    """
    e, tokens = BYTES[dtype], sequences * length
    gate = 4 if s.type in GATED else 2
    layer = e * (4 * s.hidden + 2 * (s.hidden + 2 * s.kv_width) + 3 * s.hidden + gate * s.intermediate)
    layer += 8 * s.hidden
    if eager:
        layer += s.heads * length * (e + 4)
    if not trains:
        kept = layer
    elif checkpointing:
        kept = s.layers * e * s.hidden + layer
    else:
        kept = s.layers * layer
    if head == "scalar":
        return tokens * kept
    output = s.vocab * e * (4 if trains else 2)
    return tokens * (kept + output) + 3 * min(CHUNK, 4 * tokens * s.vocab)


def kv_cache(s: Shape, *, sequences: int, length: int, dtype: str) -> int:
    """Bytes of the keys and values of `sequences` rows of `length` tokens."""
    return 2 * s.layers * s.kv_width * BYTES[dtype] * sequences * length
