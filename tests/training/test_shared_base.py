"""PPO with one base for actor and reference against PPO with a reference engine of its own: bit for bit the same."""

import torch
from small import engine, spec
from test_ppo import STOP, prompts, settings

from rlhfdsl.engines.engine import BasePolicy, PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.training.onpolicy import Engines
from rlhfdsl.training.ppo import Trainer
from rlhfdsl.training.rewards import ModelReward

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear", "lr": None}


def trainer(source, shared):
    actor = engine(HybridEngine, source, spec(micro=2, lr=1e-2, grad_clip=1.0, lora=LORA))
    entry = spec("ref", trains=False, micro=2)
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
