"""PPO with one base for actor and reference against PPO with a reference engine of its own: the same."""

import pytest
import torch
from small import engine, spec
from test_ppo import STOP, prompts, settings

from rlhfdsl.engines.base import BasePolicy
from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.training.onpolicy import Engines
from rlhfdsl.training.ppo import Trainer
from rlhfdsl.training.rewards import ModelReward

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear", "lr": None}


def trainer(source, shared, zero=0):
    actor = engine(HybridEngine, source, spec(micro=2, lr=1e-2, grad_clip=1.0, lora=LORA, zero=zero))
    entry = spec("ref", trains=False, micro=2, zero=zero)
    engines = Engines(
        actor=actor,
        ref=BasePolicy(entry, actor) if shared else engine(PolicyEngine, source, entry),
        reward=ModelReward(engine(ScalarEngine, source, spec("reward", trains=False, micro=2), seed=12), longest=28),
        critic=engine(ScalarEngine, source, spec("critic", micro=2, lr=1e-2, grad_clip=1.0, lora=LORA), seed=11),
    )
    small = settings(update={"minibatch": 2, "epochs": 2})
    return Trainer(engines, small, at_once=4, stop_ids=STOP, pad_id=258, seed=5)


def test_the_base_is_as_good_as_a_reference_engine(source):
    shared, separate = trainer(source, True), trainer(source, False)
    for number in range(3):
        first, metrics = shared.generate_experience(prompts(), [0, 1, 2, 3])
        second, _ = separate.generate_experience(prompts(), [0, 1, 2, 3])
        if number == 0:
            found = shared.check(first, same_reference=True)
            assert found["invariant_ratio"] == found["invariant_reference"] == 0.0
        for name, tensor in vars(first).items():
            assert tensor is None or torch.equal(tensor, vars(second)[name]), name
        ours, theirs = shared.train_step(first), separate.train_step(second)
        assert {k: v for k, v in ours.items() if "seconds" not in k} == {
            k: v for k, v in theirs.items() if "seconds" not in k
        }
    assert metrics["kl"] > 1e-3  # the policy has left its base


def test_at_stage_3_one_forward_reads_both(source, monkeypatch):
    """Log-probabilities and learning are those of two passes, within rounding; the invariants of the ratio hold."""
    shared, separate = trainer(source, True, zero=3), trainer(source, False, zero=3)
    rows = []
    actor, forward = shared.engines.actor, shared.engines.actor.logits_at
    monkeypatch.setattr(actor, "logits_at", lambda ids, *rest: rows.append(len(ids)) or forward(ids, *rest))
    for number in range(2):
        rows.clear()
        first, _ = shared.generate_experience(prompts(), [0, 1, 2, 3])
        assert sum(rows) == 2 * len(first) and len(rows) == sum(len(parts) for parts in shared.parts(first, actor))
        second, _ = separate.generate_experience(prompts(), [0, 1, 2, 3])
        if number == 0:
            found = shared.check(first, same_reference=True)
            assert found["invariant_ratio"] < 1e-5 and found["invariant_reference"] < 1e-5
        assert torch.equal(first.ids, second.ids)
        for name in ("log_probs", "ref_log_probs", "advantages"):
            torch.testing.assert_close(getattr(first, name), getattr(second, name), atol=1e-5, rtol=1e-5)
        ours, theirs = shared.train_step(first), separate.train_step(second)
        assert all(ours[name] == pytest.approx(theirs[name], abs=1e-4) for name in ours if "seconds" not in name)
    assert (first.log_probs - first.ref_log_probs).abs().max() > 1e-3  # the policy has left its base
