"""A transformers configuration for the numbers of a catalog entry, for every family that planning knows."""

from __future__ import annotations

from typing import Any
from unittest import mock


def tiny(kind: str) -> dict[str, Any]:
    """The numbers of a small model of a family; no two widths are equal where the family lets them differ."""
    numbers = {
        "type": kind, "layers": 3, "hidden": 64, "heads": 4, "kv_heads": 4, "intermediate": 160, "vocab": 101,
        "context": 33, "tied": True,
    }  # fmt: skip
    if kind in ("qwen3", "gemma2", "gemma3_text"):
        numbers["head_dim"] = 24
    if kind == "bloom":
        numbers["intermediate"] = 256
    return numbers


def config_of(numbers: dict[str, Any]) -> Any:
    """The configuration that `transformers` builds a model of these numbers from; dropout is zero."""
    from transformers import AutoConfig

    kind = numbers["type"]
    common = {
        "vocab_size": numbers["vocab"], "tie_word_embeddings": numbers["tied"], "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1,
    }  # fmt: skip
    return AutoConfig.for_model(kind, **common, **_named(kind, numbers))


def _named(kind: str, n: dict[str, Any]) -> dict[str, Any]:
    if kind == "gpt2":
        return {
            "n_layer": n["layers"], "n_embd": n["hidden"], "n_head": n["heads"], "n_inner": n["intermediate"],
            "n_positions": n["context"], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        }  # fmt: skip
    if kind == "bloom":
        return {"n_layer": n["layers"], "hidden_size": n["hidden"], "n_head": n["heads"]}
    out = {
        "num_hidden_layers": n["layers"], "hidden_size": n["hidden"], "num_attention_heads": n["heads"],
        "max_position_embeddings": n["context"],
    }  # fmt: skip
    if kind == "opt":
        embed = n.get("embed", n["hidden"])
        return out | {
            "ffn_dim": n["intermediate"], "word_embed_proj_dim": embed, "dropout": 0.0,
            "do_layer_norm_before": n.get("final_norm", True),
        }  # fmt: skip
    out["intermediate_size"] = n["intermediate"]
    if kind != "gpt_neox":
        out |= {"num_key_value_heads": n["kv_heads"], "attention_dropout": 0.0}
    if "head_dim" in n:
        out["head_dim"] = n["head_dim"]
    if kind == "mistral":
        out["sliding_window"] = None
    return out


def model_of(numbers: dict[str, Any], dtype: str, eager: bool, lora: dict[str, Any] | None) -> Any:
    """A causal model of these numbers in training mode; lora: with adapters."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlhfdsl.models.lora import add_adapters

    model = AutoModelForCausalLM.from_config(
        config_of(numbers), dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype],
        attn_implementation="eager" if eager else "sdpa",
    ).train()  # fmt: skip
    if lora is not None:
        add_adapters(model, lora, seed=0, scalar=False)
    return model


def plain_linear() -> Any:
    """While open, torch's own `linear`: an engine at ZeRO 3 leaves one of its own behind in the process, which keeps
    other tensors and runs other operators."""
    import torch

    return mock.patch.object(torch.nn.functional, "linear", torch._C._nn.linear)
