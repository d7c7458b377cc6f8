"""Model states against DeepSpeed's estimators; activations and cache against numbers worked by hand."""

import itertools

import pytest

from rlhfdsl.planning.catalog import shape
from rlhfdsl.planning.memory import activations, kv_cache, states

GRID = list(itertools.product((125_239_296, 1_315_758_080, 66_000_000_001), (1, 3, 8), (1, 2)))
LARGEST = 102_957_056  # OPT-1.3B's embedding


def ours(count, gpus, nodes, zero, offload):
    got = states(
        count, LARGEST, dtype="bf16", zero=zero, offload=offload, trains=True, gpus=gpus, nodes=nodes
    )
    return got.host, got.total


@pytest.mark.parametrize(("count", "gpus", "nodes"), GRID)
def test_zero2_equals_deepspeed(count, gpus, nodes):
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as theirs

    assert ours(count, gpus, nodes, 2, "off")[1] == theirs(count, gpus, nodes, cpu_offload=False)[1]
    assert ours(count, gpus, nodes, 2, "optimizer") == theirs(count, gpus, nodes, cpu_offload=True)


@pytest.mark.parametrize(("count", "gpus", "nodes"), GRID)
def test_zero3_equals_deepspeed(count, gpus, nodes):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as theirs

    def estimate(optimizer, params):
        return theirs(count, LARGEST, gpus, nodes, cpu_offload=optimizer, cpu_offload_params=params)[:2]

    assert ours(count, gpus, nodes, 3, "off")[1] == estimate(False, False)[1]
    assert ours(count, gpus, nodes, 3, "optimizer") == estimate(True, False)
    assert ours(count, gpus, nodes, 3, "both") == estimate(True, True)


def test_what_the_estimators_leave_out():
    """Bytes for each parameter, by hand: fp32 AdamW is 4 weights + 4 gradients + 8 moments."""

    def each(**changed):
        given = {
            "dtype": "bf16",
            "zero": 1,
            "offload": "off",
            "trains": True,
            "gpus": 4,
            "nodes": 1,
        } | changed
        return states(1_000_000, 0, **given).total / 1_000_000

    assert each(dtype="fp32", zero=0) == 16
    assert each(dtype="fp32", zero=2) == 4 + (4 + 12) / 4
    assert each(zero=1) == 2 + 6 + 12 / 4  # every rank keeps all gradients, in bf16 and in fp32
    assert each(trains=False, zero=0) == 2
    assert each(trains=False, zero=3) == 2 / 4
    assert each(trains=False, zero=3, offload="params") == 0


SMALL = shape(
    {
        "type": "llama", "layers": 3, "hidden": 8, "heads": 2, "kv_heads": 1, "intermediate": 20, "vocab": 50,
        "context": 64, "tied": True,
    }
)  # fmt: skip


def test_activations():
    common = {"sequences": 2, "length": 5, "dtype": "bf16", "head": "scalar", "eager": False}
    # e (4 h + 2 (h + 2 kv) + 3 h + 4 i) + 8 h = 2 (32 + 2 (8 + 8) + 24 + 80) + 64 for each token and layer
    layer = 2 * (32 + 32 + 24 + 80) + 64
    assert activations(SMALL, **common, trains=True, checkpointing=False) == 10 * 3 * layer
    assert activations(SMALL, **common, trains=True, checkpointing=True) == 10 * (3 * 16 + layer)
    assert activations(SMALL, **common, trains=False, checkpointing=False) == 10 * layer
    eager = activations(SMALL, **{**common, "eager": True}, trains=False, checkpointing=False)
    assert eager == 10 * (layer + 2 * 5 * 6)  # heads x length scores, bf16 and fp32
    causal = activations(SMALL, **{**common, "head": "none"}, trains=True, checkpointing=True)
    # logits, their copy, and the gradients of both in bf16; three fp32 copies for the loss
    assert causal == 10 * (3 * 16 + layer + 50 * 8) + 3 * 10 * 50 * 4


def test_kv_cache():
    assert kv_cache(SMALL, sequences=2, length=5, dtype="bf16") == 2 * 3 * 4 * 2 * 10
