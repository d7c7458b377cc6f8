"""Generated configurations against DeepSpeed itself: accepted, understood, and needed as they are."""

import itertools
from types import SimpleNamespace

import pytest

from rlhfdsl.planning.deepspeed_config import config

OPTIMIZER = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}
OFFLOAD = {
    0: ("off",),
    1: ("off", "optimizer"),
    2: ("off", "optimizer"),
    3: ("off", "optimizer", "params", "both"),
}
TRAIN = [
    (dtype, zero, offload, device, world)
    for dtype, zero, device, world in itertools.product(
        ("fp32", "bf16", "fp16"), range(4), ("cpu", "cuda"), (1, 4)
    )
    for offload in OFFLOAD[zero]
]
INFER = [
    (dtype, zero, "off", "cuda", 4) for dtype, zero in itertools.product(("fp32", "bf16", "fp16"), (0, 3))
]


def make(dtype, zero, offload, device, world, trains=True):
    return config(
        dtype=dtype, zero=zero, offload=offload, device=device, world=world, micro=2, accumulation=3,
        parameters=10_000_000, trains=trains, optimizer=OPTIMIZER if trains else None, grad_clip=0.5,
    )  # fmt: skip


@pytest.fixture
def parsed(monkeypatch):
    """DeepSpeedConfig of one of our dicts, as on a group of `world` ranks."""
    from deepspeed.runtime import config as runtime

    def parse(given, world):
        monkeypatch.setattr(runtime.dist, "get_rank", lambda: 0)
        monkeypatch.setattr(runtime.dist, "get_world_size", lambda: world)
        return runtime.DeepSpeedConfig(given)

    return parse


def test_deepspeed_accepts_every_config(parsed):
    for case in TRAIN:
        dtype, zero, offload, device, world = case
        out = parsed(make(*case), world)
        assert out.train_batch_size == 2 * 3 * world, case
        assert out.zero_optimization_stage == zero, case
        assert out.gradient_clipping == 0.5 and out.grad_accum_dtype == "fp32", case
        assert out.managed_gradient_accumulation is False, case
        assert out.zero_config.overlap_comm is (zero == 2 and device == "cuda" and world > 1), case
        assert out.bfloat16_config.enabled is (dtype == "bf16") and out.float16_config.enabled is (
            dtype == "fp16"
        )
        offloads = out.zero_config.offload_optimizer is not None, out.zero_config.offload_param is not None
        assert offloads == (offload in ("optimizer", "both"), offload in ("params", "both")), case
    for case in INFER:
        out = parsed(make(*case, trains=False), 4)
        assert out.optimizer_name is None and out.zero_config.overlap_comm is False, case


def test_deepspeed_knows_every_key():
    """It ignores an unknown top-level key in silence, so each must be one of its constants."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import BFLOAT16, FP16
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    known = {v for v in vars(constants).values() if isinstance(v, str)} | {ZERO_OPTIMIZATION, BFLOAT16, FP16}
    assert set(make("bf16", 3, "both", "cuda", 4)) <= known


@pytest.mark.parametrize(
    ("dtype", "zero", "accepted"),
    [("bf16", 0, False), ("fp16", 0, False), ("fp32", 0, True), ("bf16", 1, True), ("fp16", 1, True)],
)
def test_fp32_sums_of_16_bit_gradients_need_zero(dtype, zero, accepted):
    """Why 16-bit models train at stage 1 on one GPU: DeepSpeed's own check of its optimizer wrapper."""
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    engine = SimpleNamespace(
        get_data_types=lambda: (types[dtype], torch.float32),
        zero_optimization=lambda: zero > 0,
        zero_optimization_stage=lambda: zero,
        zero_cpu_offload=lambda: False,
        zero_compute_grad_norm=lambda: True,
        zero_allow_untested_optimizer=lambda: False,
        pipeline_parallelism=False,
        global_rank=0,
    )
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    check = DeepSpeedEngine._do_optimizer_sanity_check
    if accepted:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("deepspeed.runtime.engine.is_zero_supported_optimizer", lambda _: True)
            check(engine, optimizer)
    else:
        with pytest.raises(NotImplementedError):
            check(engine, optimizer)


def test_torch_adamw_is_on_deepspeeds_list():
    """So `zero_allow_untested_optimizer` is not needed."""
    import torch
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    assert torch.optim.AdamW in ZERO_SUPPORTED_OPTIMIZERS
