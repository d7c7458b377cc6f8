"""What the architectures that planning knows have in their layers, and what a layer keeps for its backward pass.

The counts of parameters are exact as transformers builds the models (tests compare every entry of the catalog). The
bytes that a layer keeps were counted with `torch.autograd.graph.saved_tensors_hooks` on transformers 5.23 in bf16 and
fp32, and a test counts them again; (a, b) means a x element size + b bytes for each unit of width. The bytes that a
pass moves were counted in the same way, operator by operator. On a GPU torch has a kernel for RMS norms
(engines/norms.py), which keeps the input alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    gated: gate, up and down projections. norms: of a layer. norm_bias: LayerNorm, else RMSNorm without a bias.
    plain_norms: whether torch's kernel computes what these RMSNorms do.
    biases: of q, k, v; of the projection after attention and of the MLP. head_norms: a norm for queries and one for
    keys, each of a head's width. learned: extra rows of a learned position table, None without one.
    embed_norm: a norm after the embedding. sdpa: whether transformers lets it use that attention.

    kept_hidden, kept_heads, kept_mlp: bytes kept for each element of the residual width, of the queries' and keys'
    width together (head norms; what one matrix makes beside the values), and of the MLP's width. scores: for each
    element of eager attention's scores.

    Of these, what only gradients of weights need, and frozen ones (LoRA) do not keep: norm_hidden for each element of
    the residual width and norm_heads of the queries and keys, the inputs of each matrix. joined: whether the projection
    after attention reads a copy of attention's result; shared_mlp: whether the activation keeps what the last matrix
    reads.

    moved_hidden, moved_heads, moved_mlp: bytes that a forward pass reads and writes in all but matrix products, for
    each element of the residual width, of the queries' and keys' width together, and of the MLP's width.
    """

    gated: bool
    norms: int = 2
    norm_bias: bool = False
    plain_norms: bool = False
    qkv_bias: bool = False
    biases: bool = False
    head_norms: bool = False
    learned: int | None = None
    embed_norm: bool = False
    sdpa: bool = True
    kept_hidden: tuple[int, int] = (4, 8)
    kept_heads: tuple[int, int] = (0, 0)
    kept_mlp: int = 4
    scores: tuple[int, int] = (-1, 8)  # 6 in 16 bits: in fp32 and back; 4 in fp32
    norm_hidden: tuple[int, int] = (2, 0)
    norm_heads: tuple[int, int] = (0, 0)
    joined: bool = False
    shared_mlp: bool = False
    moved_hidden: tuple[int, int] = (-2, 88)  # norms in fp32: a wider type saves its casts
    moved_heads: tuple[int, int] = (13, 0)
    moved_mlp: tuple[int, int] = (5, 0)


_LLAMA = Family(gated=True, plain_norms=True)
_CLASSIC = Family(
    gated=False, norm_bias=True, qkv_bias=True, biases=True, kept_hidden=(4, 0), norm_hidden=(0, 0),
    moved_hidden=(16, 0), moved_heads=(0, 0), moved_mlp=(2, 0),
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": replace(_LLAMA, qkv_bias=True),
    "qwen3": replace(_LLAMA, head_norms=True, kept_heads=(1, 4), norm_heads=(1, 0), moved_heads=(9, 44)),
    "gemma2": replace(
        _LLAMA, norms=4, plain_norms=False, sdpa=False, kept_hidden=(2, 32), scores=(0, 8), norm_hidden=(0, 16),
        joined=True, moved_hidden=(-18, 211),
    ),
    "gemma3_text": replace(
        _LLAMA, norms=4, plain_norms=False, head_norms=True, kept_hidden=(2, 32), kept_heads=(0, 8),
        norm_hidden=(0, 16), norm_heads=(0, 4), moved_hidden=(-18, 211), moved_heads=(7, 52),
    ),
    "phi3": replace(_LLAMA, kept_hidden=(5, 8), kept_heads=(1, 0), joined=True, moved_hidden=(4, 88)),
    "opt": replace(_CLASSIC, learned=2, kept_mlp=1, shared_mlp=True),
    "gpt2": replace(_CLASSIC, learned=0, kept_mlp=5, scores=(1, 0), moved_hidden=(14, 0), moved_mlp=(18, 0)),
    "gpt_neox": replace(_CLASSIC, kept_hidden=(6, 0), kept_mlp=2, joined=True, moved_hidden=(25, 0)),
    "bloom": replace(
        _CLASSIC, embed_norm=True, sdpa=False, kept_mlp=2, joined=True, moved_hidden=(12, 0), moved_mlp=(21, 0)
    ),
}


def on(device: str, name: str) -> Family:
    """The family of a type of models on "cuda" or "cpu": Llama's for a type that planning does not know."""
    family = FAMILIES.get(name, FAMILIES["llama"])
    if device != "cuda" or not family.plain_norms:
        return family
    # A norm keeps its input, in place of a copy in fp32 and of what its weight multiplies, and moves 2 e bytes in place
    # of -4 e + 44.
    def norms(count: int, kept: tuple[int, int], moved: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        return (kept[0], kept[1] - 4 * count), (moved[0] + 6 * count, moved[1] - 44 * count)

    kept, moved = norms(family.norms, family.kept_hidden, family.moved_hidden)
    found = replace(family, kept_hidden=kept, moved_hidden=moved, norm_hidden=(0, 0))
    if not family.head_norms:
        return found
    kept, moved = norms(1, family.kept_heads, family.moved_heads)
    return replace(found, kept_heads=kept, moved_heads=moved, norm_heads=(0, 0))


GATED = frozenset(name for name, family in FAMILIES.items() if family.gated)
