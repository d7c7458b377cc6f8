"""Frozen engines that leave the device while they are not in use."""

import pytest
import torch
from small import engine, scratch, spec

from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine

IDS = torch.arange(2, 26).view(2, 12)
LENGTHS = torch.tensor([12, 7])


def held(engine) -> int:
    """Elements of the parameters on the device."""
    return sum(parameter.numel() for parameter in engine.module.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "role", "read"), [(PolicyEngine, "ref", "logits"), (ScalarEngine, "reward", "scores")]
)
def test_it_is_away_but_for_its_passes_and_the_same_after_each(source, kind, role, read, dtype):
    entry = spec(role, trains=False, dtype=dtype)
    with torch.no_grad():
        expected = getattr(engine(kind, source, entry), read)(IDS, LENGTHS)
        idle = engine(kind, source, entry | {"offload": "idle"})
        for _ in range(3):
            assert held(idle) == 0
            assert torch.equal(getattr(idle, read)(IDS, LENGTHS), expected)
            assert held(idle) > 0
            idle.rest()


def test_one_that_stays_has_no_copy(source):
    assert engine(PolicyEngine, source, spec("ref", trains=False)).resting is None


def test_tied_weights_stay_tied(tmp_path):
    tied = engine(PolicyEngine, scratch(tmp_path / "tied", tied=True), spec("ref", trains=False) | {"offload": "idle"})
    tied.wake()
    assert tied.module.get_output_embeddings().weight is tied.module.get_input_embeddings().weight
    assert len(tied.resting.host) == len(list(tied.module.parameters()))
