"""Small models and engine entries for tests, in the shape of the plan."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from rlhfdsl.models.loading import load_model, make_scratch, partitioned
from rlhfdsl.planning import deepspeed_config

ARCH = {
    "type": "llama", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "intermediate": 64, "vocab": 259,
    "context": 128, "tied": True,
}  # fmt: skip


def one_rank() -> torch.device:
    """Make this process the only rank, on the CPU, or on a GPU where there is one."""
    from deepspeed.utils import logger

    from rlhfdsl.engines import distributed

    logger.setLevel(logging.WARNING)
    return distributed.join("cuda" if torch.cuda.is_available() else "cpu")


def model_entry(**changes) -> dict:
    return {
        "from": None, "arch": {**ARCH, **changes}, "dtype": "fp32", "head": "none", "attention": "sdpa",
        "tokenizer": "bytes", "template": "auto", "key": "sha256:small", "facts": None,
    }  # fmt: skip


def scratch(directory: Path, seed: int = 1, **changes) -> str:
    """A model from scratch on the disk; returns its path."""
    make_scratch(model_entry(**changes), directory, directory, seed)
    return str(directory)


def spec(
    role: str = "policy", *, trains: bool = True, zero: int = 0, dtype: str = "fp32", micro: int = 4, world: int = 1,
    lr: float = 1e-3, ema: float | None = None, grad_clip: float = 0.0, weight_decay: float = 0.0, dropout: float = 0.0,
    lora: dict | None = None, checkpointing: bool = False, device: str = "cpu",
) -> dict:  # fmt: skip
    """An ENGINE entry of the plan."""
    optimizer = {"lr": lr, "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": weight_decay}
    return {
        "role": role, "trains": trains, "weights": {"model": "model.small"}, "base": "model.small",
        "head": "none" if role in ("policy", "ref") else "scalar", "dtype": dtype, "attention": "sdpa",
        "lora": lora, "shares": None, "dropout": dropout, "gradient_checkpointing": checkpointing,
        "packing": True, "zero": zero, "offload": "off", "micro": micro, "accumulation": 1, "ema": ema,
        "rollout": {"engine": "eager", "tensor": 1, "free_cache": False, "reason": "the test asks for it"},
        "schedule": {"kind": "constant", "lr": lr, "warmup": 0, "updates": 10} if trains else None,
        "deepspeed": deepspeed_config.config(
            dtype=dtype, zero=zero, offload="off", device=device, world=world, micro=micro, accumulation=1,
            parameters=1,  # the least buckets: DeepSpeed reserves them whole, and keeps engines
            trains=trains, optimizer=optimizer if trains else None, grad_clip=grad_clip,
        ),
    }  # fmt: skip


def engine(kind, source: str, entry: dict, seed: int = 3):
    """Load `source` and put it on an engine of class `kind`."""
    with partitioned(entry["deepspeed"]):
        module = load_model(entry, source, revision=None, seed=seed)
    return kind("test", entry, module)
