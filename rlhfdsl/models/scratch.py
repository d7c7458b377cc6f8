"""Models from scratch: the `arch` of a recipe becomes a transformers configuration."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig


def scratch_config(arch: dict, *, pad_id: int, bos_id: int, eos_id: int) -> PretrainedConfig:
    """The transformers configuration of a plan's `arch` entry.

    `arch` holds type, layers, hidden, heads, kv_heads, intermediate, vocab, context and tied, all resolved by the
    plan. Dropout is zero: an engine sets the rate that its stage asks for.
    """
    common = {
        "vocab_size": arch["vocab"],
        "tie_word_embeddings": arch["tied"],
        "pad_token_id": pad_id,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }
    return AutoConfig.for_model(arch["type"], **common, **_NAMES[arch["type"]](arch))


def _llama(arch: dict) -> dict:
    return {
        "num_hidden_layers": arch["layers"],
        "hidden_size": arch["hidden"],
        "num_attention_heads": arch["heads"],
        "num_key_value_heads": arch["kv_heads"],
        "intermediate_size": arch["intermediate"],
        "max_position_embeddings": arch["context"],
    }


def _mistral(arch: dict) -> dict:
    return {**_llama(arch), "sliding_window": None}


def _gpt_neox(arch: dict) -> dict:
    return {
        "num_hidden_layers": arch["layers"],
        "hidden_size": arch["hidden"],
        "num_attention_heads": arch["heads"],
        "intermediate_size": arch["intermediate"],
        "max_position_embeddings": arch["context"],
    }


def _opt(arch: dict) -> dict:
    return {
        "num_hidden_layers": arch["layers"],
        "hidden_size": arch["hidden"],
        "word_embed_proj_dim": arch["hidden"],
        "num_attention_heads": arch["heads"],
        "ffn_dim": arch["intermediate"],
        "max_position_embeddings": arch["context"],
        "dropout": 0.0,
    }


def _gpt2(arch: dict) -> dict:
    return {
        "n_layer": arch["layers"],
        "n_embd": arch["hidden"],
        "n_head": arch["heads"],
        "n_inner": arch["intermediate"],
        "n_positions": arch["context"],
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


# Each family spells the same numbers in its own way.
_NAMES = {
    "llama": _llama,
    "qwen2": _llama,
    "mistral": _mistral,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "gpt2": _gpt2,
}
