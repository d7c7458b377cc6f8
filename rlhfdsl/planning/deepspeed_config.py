"""The whole DeepSpeed configuration of one engine, with nothing left to a default that changes the result.

Why each key stands here (DeepSpeed 0.19.8, `runtime/engine.py` unless said):
  gradient_clipping              an absent key means 1.0
  grad_accum_dtype               an absent key means the weights' type, and bf16 sums lose small gradients;
                                 fp32 is refused at stage 0 with 16-bit weights (`_do_optimizer_sanity_check`)
                                 and those train at stage 1 or above
  managed_gradient_accumulation  false: the trainer says when a step is due and scales its own losses
  immediate_grad_update          a bf16 gradient is added to its fp32 sum during the backward pass and freed
                                 (`runtime/bf16_optimizer.py`); else all are kept, zeroed and accumulated in bf16
  overlap_comm                   refused without managed accumulation except at stage 2 (`_do_sanity_check`);
                                 an absent key means true at stage 3 (`zero/config.py`)
  torch_adam                     torch's AdamW, which compiles nothing at the first start; fused on CUDA
"""

from __future__ import annotations

from typing import Any

NEVER = 1_000_000_000  # steps between DeepSpeed's own progress lines
LARGEST_BUCKET = 200_000_000  # elements
LIVE = 1_000_000_000  # parameters that ZeRO 3 may keep whole


def config(
    *,
    dtype: str,
    zero: int,
    offload: str,
    device: str,
    world: int,
    micro: int,
    accumulation: int,
    parameters: int | None,
    trains: bool,
    learns: int | None = None,
    optimizer: dict[str, Any] | None = None,
    grad_clip: float = 0.0,
) -> dict[str, Any]:
    """The configuration that `deepspeed.initialize` gets.

    micro: sequences (reward: pairs) of one forward on one device. accumulation: micro batches of one step.
    parameters: of the engine, to size buckets no larger than the model; None means unknown. learns: those of them
    that train, beside frozen ones; None means all.
    optimizer: {"lr", "betas", "eps", "weight_decay"} of an engine that trains.
    """
    out: dict[str, Any] = {
        "train_batch_size": micro * accumulation * world,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    if trains:
        assert optimizer is not None
        out["managed_gradient_accumulation"] = False
        out["gradient_clipping"] = grad_clip
        out["optimizer"] = {"type": "AdamW", "params": _adamw(optimizer, device)}
        out["data_types"] = {"grad_accum_dtype": "fp32"}
    out["bf16"] = {"enabled": dtype == "bf16"}
    if trains and dtype == "bf16" and zero == 1:
        out["bf16"]["immediate_grad_update"] = True
    out["fp16"] = _fp16(dtype)
    out["zero_optimization"] = _zero(
        zero, offload, device=device, world=world, parameters=parameters, learns=learns or parameters, trains=trains
    )
    out["steps_per_print"] = NEVER
    out["wall_clock_breakdown"] = False
    return out


def _adamw(optimizer: dict[str, Any], device: str) -> dict[str, Any]:
    return {
        "lr": optimizer["lr"],
        "betas": list(optimizer["betas"]),
        "eps": optimizer["eps"],
        "weight_decay": optimizer["weight_decay"],
        "torch_adam": True,
        **({"fused": True} if device == "cuda" else {}),
    }


def _fp16(dtype: str) -> dict[str, Any]:
    if dtype != "fp16":
        return {"enabled": False}
    return {
        "enabled": True,
        "loss_scale": 0,  # dynamic
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }


def bucket_size(parameters: int | None) -> int:
    """Elements of a communication bucket. DeepSpeed allocates it whole, so a small model gets a small one."""
    return max(1_000_000, min(LARGEST_BUCKET, parameters or LARGEST_BUCKET))


def _zero(
    stage: int, offload: str, *, device: str, world: int, parameters: int | None, learns: int | None, trains: bool
) -> dict[str, Any]:
    """The `zero_optimization` block."""
    out: dict[str, Any] = {"stage": stage}
    if stage == 0:
        return out
    bucket = bucket_size(learns)
    if trains:
        out["contiguous_gradients"] = True
        out["reduce_scatter"] = True
        out["reduce_bucket_size"] = bucket
        out["overlap_comm"] = stage == 2 and device == "cuda" and world > 1
    else:
        out["overlap_comm"] = False
    if stage < 3:
        out["allgather_partitions"] = True
        out["allgather_bucket_size"] = bucket
    else:
        out["sub_group_size"] = NEVER
        out["stage3_prefetch_bucket_size"] = min(50_000_000, bucket_size(parameters))
        out["stage3_param_persistence_threshold"] = 100_000
        out["stage3_max_live_parameters"] = LIVE
        out["stage3_max_reuse_distance"] = LIVE
        out["stage3_gather_16bit_weights_on_model_save"] = True
    pinned = {"device": "cpu", "pin_memory": device == "cuda"}
    if trains and offload in ("optimizer", "both"):
        out["offload_optimizer"] = dict(pinned)
    if offload in ("params", "both"):
        out["offload_param"] = dict(pinned)
    return out
