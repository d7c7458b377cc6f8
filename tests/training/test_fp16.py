"""Actor and critic in fp16: when the gradients of one overflow, both skip their step."""

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from small import engine, spec
from test_ppo import prompts, settings

from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.training.onpolicy import Engines
from rlhfdsl.training.ppo import Trainer


@pytest.fixture
def half_on_the_cpu(monkeypatch):
    """DeepSpeed refuses fp16 on most CPUs, though torch computes it."""
    kind = type(get_accelerator())
    monkeypatch.setattr(kind, "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(kind, "supported_dtypes", lambda self: [torch.float, torch.half, torch.bfloat16])


def weights(engine):
    """The fp32 master weights of this rank."""
    optimizer = engine.deepspeed.optimizer
    name = "fp32_partitioned_groups_flat" if engine.partitioned else "single_partition_of_fp32_groups"
    return [master.detach().clone() for master in getattr(optimizer, name)]


def scale(engine):
    return engine.deepspeed.optimizer.loss_scale


def changed(engine, before):
    return not all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))


@pytest.mark.parametrize(("broken", "zero"), [("actor", 1), ("critic", 2), ("actor", 3)])
def test_an_overflow_of_one_skips_both(half_on_the_cpu, source, zero, broken):
    entry = {"dtype": "fp16", "zero": zero, "micro": 2}
    actor = engine(HybridEngine, source, spec(lr=1e-3, **entry))
    critic = engine(ScalarEngine, source, spec("critic", lr=1e-3, **entry), seed=3)
    ref = engine(PolicyEngine, source, spec("ref", trains=False, micro=2, dtype="fp16"))
    small = settings(update={"minibatch": 4})
    trainer = Trainer(Engines(actor, ref, lambda answers: answers.lengths.float(), critic), small,
                      at_once=4, stop_ids=(258,), pad_id=258, seed=5)  # fmt: skip
    for each in (actor, critic):  # small enough that the first steps do not overflow by themselves
        each.deepspeed.optimizer.loss_scaler.cur_scale = 64.0
    experience, _ = trainer.generate_experience(prompts(), [0, 1, 2, 3])
    before = weights(actor), weights(critic)
    first = trainer.train_step(experience)
    assert first["overflow"] == 0 and changed(actor, before[0]) and changed(critic, before[1])

    victim, other = (actor, critic) if broken == "actor" else (critic, actor)
    backward = victim.backward
    victim.backward = lambda loss: backward(loss * 1e6)
    before, scales = (weights(actor), weights(critic)), (scale(victim), scale(other))
    second = trainer.train_step(experience)
    assert second["overflow"] == 1 and not changed(actor, before[0]) and not changed(critic, before[1])
    assert scale(other) == scales[1] and scale(victim) <= scales[0]

    victim.backward = backward
    third = trainer.train_step(experience)
    assert third["overflow"] == 0 and changed(actor, before[0]) and changed(critic, before[1])
    assert actor.updates == critic.updates == 3  # whose learning rates stay those of one schedule


@pytest.mark.parametrize("zero", [2])
def test_asking_first_changes_no_step(half_on_the_cpu, source, zero):
    ids = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    found = []
    for asks in (False, True):
        one = engine(PolicyEngine, source, spec(dtype="fp16", zero=zero, micro=2, lr=1e-2))
        one.deepspeed.optimizer.loss_scaler.cur_scale = 64.0
        start = weights(one)
        for _ in range(3):
            for row in (ids[:1], ids[1:]):
                one.backward(one.logits(row, torch.tensor([5])).float().logsumexp(-1).mean() / 2)
            assert not asks or not one.overflows()
            one.step()
        found.append(weights(one))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], start, strict=True))
