"""Bytes that a device reads and writes beside matrix products, and how often its host launches kernels.

The counts follow transformers' layers (families.py), the loss of training/losses.py, peft's adapters, and the
optimizers of DeepSpeed 0.19.8; each says what it counts. An operator reads its inputs and writes its outputs once.
"""

from __future__ import annotations

from rlhfdsl.planning import families
from rlhfdsl.planning.adapters import Lora, linears
from rlhfdsl.planning.catalog import Shape
from rlhfdsl.planning.families import FAMILIES
from rlhfdsl.planning.memory import BYTES

BACKWARD = 2.1  # times what the forward pass of a layer moves: 1.7 (GPT-2) to 2.5 (Gemma 3), counted
SCORES = 40  # bytes for each score of eager attention
# Bytes for each logit on a CPU, in chunks. Forward: gathered (4), to fp32 (6), log-softmax (12, it reads
# twice), exp (8), clamped (8), product and sum (16). Backward: gathered (4), to fp32 (6), norm
# taken off (8), exp (8), scaled (8), to 16 bits (6), put in its row (4), zeros (2).
CHUNKED, CHUNKED_BACKWARD = 54, 46
# Elements for each logit in the kernels of a GPU (training/kernels.py). Forward: read. Backward: zeros, read, written.
FUSED, FUSED_BACKWARD = 1, 3
# Bytes for each parameter and micro batch. Of what a device owns: a gradient added to its sum, from 16 bits by way of a
# copy in fp32 (6). Of all below stage 2: autograd's sum in 16 bits (6) over zeros (2), which in fp32 is the sum itself.
# bf16 at stage 1 is added without either (engines/gradients.py).
SUMS, BELOW_TWO = {"bf16": 18, "fp16": 18, "fp32": 12}, {"bf16": 8, "fp16": 8, "fp32": 0}
AT_ONCE = 10
BUCKET = 4  # elements from stage 2 on: put into a bucket and divided there
# Bytes for each parameter and step: norm (4), clipping (8), AdamW (16 read, 12 written); in 16 bits weights back (6).
STEP = {"bf16": 46, "fp16": 46, "fp32": 40}
# More where bf16 has a buffer of all sums (stage 1): copied after its reduction (8), set to 0 twice (8); norm and
# clipping (12) are those of the whole buffer on every device.
STEP_SUMS, STEP_WHOLE = 16, 12
# Launches for each tensor that trains: a micro batch's copy, sum and zeros, and a step's norm, clipping and lists. bf16
# at stage 1 has a sum and a hook, and a step reads flat buffers.
SUM_LAUNCHES, STEP_LAUNCHES = 3, 4
SUM_LAUNCHES_AT_ONCE, STEP_LAUNCHES_AT_ONCE = 2, 1
LAYER_LAUNCHES = 30  # kernels of a layer's forward pass (OPT), by which the host's seconds for a layer are those of one


def layer(s: Shape, length: float, dtype: str, eager: bool, device: str) -> float:
    """Bytes that the forward pass of one layer moves for each token of sequences of `length`."""
    e = BYTES[dtype]
    family = families.on(device, s.type)

    def of(pair: tuple[int, int], width: int) -> int:
        return (pair[0] * e + pair[1]) * width

    moved = of(family.moved_hidden, s.hidden) + of(family.moved_heads, s.q_width + s.kv_width)
    moved += of(family.moved_mlp, s.intermediate)
    return moved + (SCORES * s.heads * length if eager else 0)


def loss(device: str, dtype: str, backward: bool) -> int:
    """Bytes that the token statistics of one logit move, forwards or backwards."""
    if device == "cuda":
        return BYTES[dtype] * (FUSED_BACKWARD if backward else FUSED)
    return CHUNKED_BACKWARD if backward else CHUNKED


def sums(dtype: str, zero: int, world: int) -> float:
    """Bytes for each parameter that trains, of adding a micro batch's gradient to its sum."""
    if zero >= 2:
        return SUMS[dtype] / world + BUCKET * BYTES[dtype]
    return AT_ONCE if at_once(dtype, zero) else SUMS[dtype] + BELOW_TWO[dtype]


def at_once(dtype: str, zero: int) -> bool:
    """Whether engines/gradients.py sums the gradients."""
    return zero == 1 and dtype == "bf16"


def launches(dtype: str, zero: int) -> tuple[int, int]:
    """Launches for each tensor that trains, of a micro batch and of a step."""
    if at_once(dtype, zero):
        return SUM_LAUNCHES_AT_ONCE, STEP_LAUNCHES_AT_ONCE
    return SUM_LAUNCHES, STEP_LAUNCHES


def adapters(lora: Lora, dtype: str, backward: bool) -> float:
    """Bytes that the adapters of one layer move for each token; their inner values of `rank` elements are left out.

    Forward: the input read, the output written, scaled (2) and added (3). Backward: the output's gradient scaled (2)
    and read by both matrices' gradients (2); the input read, its gradient written and added (3).
    """
    of_input, of_output = (5, 4) if backward else (1, 6)
    return BYTES[dtype] * sum(of_input * x.inputs + of_output * x.outputs for x in lora.layers or ())


def tensors(s: Shape, scalar: bool) -> int:
    """Parameter tensors of a model, of a type that `linears` knows; a test counts them in transformers' models."""
    family = FAMILIES[s.type]
    matrices = linears(s) or ()
    biased = sum(family.biases or (family.qkv_bias and x.part == "attention" and x.role == "in") for x in matrices)
    norm = 2 if family.norm_bias else 1
    each = len(matrices) + biased + family.norms * norm + 2 * family.head_norms
    own = 1 + (family.learned is not None) + norm * (s.final_norm + family.embed_norm) + 2 * (s.embed != s.hidden)
    return s.layers * each + own + (scalar or not s.tied)


def trained_tensors(s: Shape, scalar: bool, lora: Lora | None) -> int:
    """Parameter tensors with a gradient: all, or two for each adapter and a scalar head."""
    return tensors(s, scalar) if lora is None else 2 * s.layers * len(lora.layers or ()) + scalar
