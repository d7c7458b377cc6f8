"""LoRA in numbers: which linear layers an adapter is beside, and how many parameters it has.

A base in 4 bits has its linear layers as bitsandbytes packs them (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
An adapter of rank r beside a layer of n inputs and m outputs is two matrices, r x n and m x r (Hu et al. 2021,
arXiv 2106.09685). The names and widths are those of transformers' modules, and a test builds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhfdsl.language.recipe import Block
from rlhfdsl.planning.catalog import Shape

ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the output, for types that planning does not know


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer of each decoder layer: its path there, its part, its role in that, its widths.

    part: attention or mlp. role: `in` before attention and `out` after it, `up` and `down` in the MLP.
    """

    path: str
    part: str
    role: str
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Lora:
    """The adapters of an engine. layers: those that carry one, None where the model's type is not known."""

    entry: dict[str, Any]
    layers: tuple[Linear, ...] | None
    count: int | None

    @property
    def rank(self) -> int:
        return int(self.entry["rank"])


_LLAMA = (
    ("self_attn.q_proj", "h", "q"), ("self_attn.k_proj", "h", "kv"), ("self_attn.v_proj", "h", "kv"),
    ("self_attn.o_proj", "q", "h"), ("mlp.gate_proj", "h", "i"), ("mlp.up_proj", "h", "i"), ("mlp.down_proj", "i", "h"),
)  # fmt: skip
_BLOOM = ("mlp.dense_h_to_4h", "h", "i"), ("mlp.dense_4h_to_h", "i", "h")
_LAYERS: dict[str, tuple[tuple[str, str, str], ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), _LLAMA),
    "phi3": (
        ("self_attn.qkv_proj", "h", "qkv"), ("self_attn.o_proj", "q", "h"),
        ("mlp.gate_up_proj", "h", "2i"), ("mlp.down_proj", "i", "h"),
    ),
    "opt": (
        ("self_attn.k_proj", "h", "kv"), ("self_attn.v_proj", "h", "kv"), ("self_attn.q_proj", "h", "q"),
        ("self_attn.out_proj", "q", "h"), ("fc1", "h", "i"), ("fc2", "i", "h"),
    ),
    "gpt2": (
        ("attn.c_attn", "h", "qkv"), ("attn.c_proj", "q", "h"), ("mlp.c_fc", "h", "i"), ("mlp.c_proj", "i", "h"),
    ),
    "gpt_neox": (("attention.query_key_value", "h", "qkv"), ("attention.dense", "q", "h"), *_BLOOM),
    "bloom": (("self_attention.query_key_value", "h", "qkv"), ("self_attention.dense", "q", "h"), *_BLOOM),
}  # fmt: skip


def linears(shape: Shape | None) -> tuple[Linear, ...] | None:
    """The linear layers of a decoder layer; None for a type that planning does not know."""
    if shape is None or shape.type not in _LAYERS:
        return None
    widths = {
        "h": shape.hidden, "q": shape.q_width, "kv": shape.kv_width, "qkv": shape.q_width + 2 * shape.kv_width,
        "i": shape.intermediate, "2i": 2 * shape.intermediate,
    }  # fmt: skip
    found = []
    for path, inputs, outputs in _LAYERS[shape.type]:
        part = "attention" if "att" in path else "mlp"
        # The last matrix of a part is the one that leads back to the residual width.
        roles = {"attention": ("in", "out"), "mlp": ("up", "down")}[part]
        last = path == [other for other, _, _ in _LAYERS[shape.type] if ("att" in other) == ("att" in path)][-1]
        found.append(Linear(path, part, roles[last], widths[inputs], widths[outputs]))
    return tuple(found)


def matches(target: str, path: str) -> bool:
    """Whether a written target means a layer: its path, or the end of it from a dot on."""
    return path == target or path.endswith("." + target)


def chosen(targets: str | Sequence[str], layers: Sequence[Linear]) -> tuple[Linear, ...]:
    """The layers that `all`, `attention`, `mlp` or a list of names means."""
    if isinstance(targets, str):
        return tuple(layer for layer in layers if targets in ("all", layer.part))
    return tuple(layer for layer in layers if any(matches(target, layer.path) for target in targets))


BLOCK = 64  # weights of one scale of a base in 4 bits


def in_4_bits(block: Block | None) -> bool:
    """Whether the engine of a block has its frozen weights in 4 bits."""
    return block is not None and "lora" in block.blocks and bool(block.blocks["lora"]["base"] == "nf4")


def packed(shape: Shape | None) -> int | None:
    """Weights that a base in 4 bits packs: all linear layers of all decoder layers, whichever carry an adapter."""
    known = linears(shape)
    return None if shape is None or known is None else shape.layers * sum(x.inputs * x.outputs for x in known)


def lora(block: Block, shape: Shape | None) -> Lora:
    """The adapters of a `lora` block beside a model of the given shape.

    The plan names each target by its path in a decoder layer. Of a type that is not known a list is taken as it
    stands, and `all` is left to peft.
    """
    targets = block["targets"]
    known = linears(shape)
    layers = None if known is None else chosen(targets, known)
    count = None
    if layers is not None and shape is not None:
        count = shape.layers * sum(block["rank"] * (layer.inputs + layer.outputs) for layer in layers)
        names: Any = [layer.path for layer in layers]
    else:
        names = ALL_LINEAR if isinstance(targets, str) else list(targets)
    entry = {
        "rank": block["rank"], "alpha": block["alpha"], "dropout": block["dropout"], "targets": names,
        "lr": block["lr"], **({} if block["base"] == "full" else {"base": block["base"]}),
    }  # fmt: skip
    return Lora(entry, layers, count)
