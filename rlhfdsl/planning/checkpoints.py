"""What the names and configuration of a model's files tell, with the standard library alone: which hold its weights,
and its numbers, for a plan that is made without a lock.

config.json leaves out what equals the default of its class, and the families spell the same number in several ways.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhfdsl.language.recipe import Recipe

_TIED = frozenset({"opt", "gpt2", "bloom", "gemma2", "gemma3_text"})  # whose class ties the output by default
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner"),
    "vocab": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "seq_length"),
    "head_dim": ("head_dim",),
    "embed": ("word_embed_proj_dim",),
}
_SAFE = re.compile(r"model[^/]*\.safetensors")
_PICKLED = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library allows


def weights(names: Iterable[str]) -> list[str]:
    """Those of a model's files from which its weights are read: safetensors, and pickles only where it has none."""
    names = sorted(names)
    return [name for name in names if _SAFE.fullmatch(name)] or [name for name in names if _PICKLED.fullmatch(name)]


def pickles(entry: Mapping[str, Any]) -> list[str]:
    """The pickles that hold the weights of a model of the plan, as its facts pin them; none while it has no facts."""
    source, facts = entry["from"], entry["facts"]
    if source is None or facts is None:
        return []
    if "hub" in source:
        names = list(facts.get("hub", {}).get(source["hub"], {"files": ()})["files"])
    else:
        folder = f"{source['path']}/"
        names = [name.removeprefix(folder) for name in facts["files"] if name.startswith(folder)]
    return [name for name in names if name.endswith(".bin")]


def of_recipe(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The numbers of models that lie in directories, by address; a lock's facts are stronger.

    folder: what the paths of the recipe are relative to.
    """
    return {
        block.address: found
        for block in recipe.of_kind("model")
        if block["from"] is not None
        and block["from"].path is not None
        and (found := numbers(folder / block["from"].path)) is not None
    }


def numbers(directory: Path) -> dict[str, Any] | None:
    """The configuration numbers of a model in Hugging Face form, and its exact `parameters` where it has safetensors.

    None when the directory has no configuration that tells them.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    config = config.get("text_config") or config
    found: dict[str, Any] = {"type": config.get("model_type")}
    for name, spellings in _NAMES.items():
        found[name] = next((config[key] for key in spellings if config.get(key) is not None), None)
    if any(found[name] is None for name in ("type", "layers", "hidden", "heads", "vocab")):
        return None
    found["kv_heads"] = found["kv_heads"] or found["heads"]
    found["intermediate"] = found["intermediate"] or 4 * found["hidden"]
    found["context"] = found["context"] or 2048
    found["tied"] = config.get("tie_word_embeddings", found["type"] in _TIED)
    found["final_norm"] = config.get("do_layer_norm_before", True)
    found["parameters"] = parameters(directory, found["tied"])
    return found


def parameters(directory: Path, tied: bool) -> int | None:
    """Parameters of a causal model by the headers of its safetensors files; None without any, or with a broken one."""
    total = 0
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        header = _header(path)
        if header is None:
            return None
        for name, tensor in header.items():
            if name == "__metadata__" or name == "score.weight" or (tied and name == "lm_head.weight"):
                continue
            total += math.prod(tensor["shape"])
    return total if files else None


def _header(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= LARGEST_HEADER else None
    except (OSError, ValueError):
        return None
    return header if isinstance(header, dict) else None
