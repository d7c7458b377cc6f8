"""A two-armed task whose optimum is known: PPO, GRPO and RLOO reach it.

An answer is one token; the even tokens are the paying arm (reward 1), the odd ones pay 0. The reference takes the
paying arm with probability p. With beta times the KL to the reference in the reward the best policy takes it with
probability p e / (p e + 1 - p), e = exp(1 / beta): the maximum of q - beta KL(q || p). GRPO's k3 in the loss has the
gradient of KL(p || q) in place of KL(q || p), whose best q solves 1 + beta (p / q - (1 - p) / (1 - q)) = 0.
"""

import math

import pytest
import torch
from small import engine, scratch, spec

from rlhfdsl.data.edge import Prompt
from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.training import grpo, ppo, rloo
from rlhfdsl.training.onpolicy import Engines

BETA, ANSWERS, PROMPTS = 0.5, 8, 16
SETTINGS = {
    "rollout": {"batch": PROMPTS, "answers": ANSWERS, "prompt": 4, "answer": 1, "temperature": 1.0,
                "top_k": None, "top_p": None},
    "update": {
        "minibatch": PROMPTS * ANSWERS // 2, "epochs": 1, "clip": 0.2, "clip_high": None, "dual_clip": None,
        "entropy": 0.0, "value_clip": None, "value_weight": 0.5, "gamma": 1.0, "lambda": 0.95, "whiten": True,
        "scale": False,
    },
    "kl": {"coef": BETA, "apply": "reward", "estimator": "k1", "target": None, "horizon": None},
    "reward": {"clip": None, "normalize": False, "missing_eos": 0.0, "overlong": None},
    "ptx": None, "log": 1,
}  # fmt: skip


def pays(answers):
    return (answers.ids.gather(1, answers.prompt_lengths.unsqueeze(1)).squeeze(1) % 2 == 0).float()


def paying_share(engine):
    """The exact probability of the paying arm after the prompt."""
    with torch.no_grad():
        logits = engine.logits(torch.tensor([[1, 2]]), torch.tensor([2]))[0, -1]
    return logits.softmax(-1)[0::2].sum().item()


def best_in_reward(p):
    e = math.exp(1 / BETA)
    return p * e / (p * e + 1 - p)


def best_in_loss(p):
    low, high = p, 1 - 1e-9
    for _ in range(60):
        q = (low + high) / 2
        low, high = (q, high) if 1 + BETA * (p / q - (1 - p) / (1 - q)) > 0 else (low, q)
    return low


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return scratch(tmp_path_factory.mktemp("bandit") / "m", layers=1, hidden=16, heads=2, kv_heads=2, intermediate=16)


@pytest.mark.parametrize(
    ("kind", "kl", "best"),
    [
        (ppo, {}, best_in_reward),
        (rloo, {}, best_in_reward),
        (grpo, {}, best_in_reward),
        (grpo, {"apply": "loss", "estimator": "k3"}, best_in_loss),
    ],
    ids=["ppo", "rloo", "grpo", "grpo-kl-in-loss"],
)
def test_the_known_optimum_is_reached(tiny, kind, kl, best):
    def make(kind, role, **entry):
        return engine(kind, tiny, spec(role, micro=PROMPTS * ANSWERS, **entry))

    critic = make(ScalarEngine, "critic", lr=2e-2) if kind is ppo else None
    engines = Engines(make(HybridEngine, "policy", lr=2e-2), make(PolicyEngine, "ref", trains=False), pays, critic)
    settings = SETTINGS | {"kl": SETTINGS["kl"] | kl}
    trainer = kind.Trainer(engines, settings, at_once=999, stop_ids=(), pad_id=258, seed=1)
    start, curve = paying_share(engines.actor), []
    prompts = [Prompt(ids=[1, 2], text="", key="") for _ in range(PROMPTS)]
    for _ in range(30):
        experience, _ = trainer.generate_experience(prompts, list(range(PROMPTS)))
        trainer.train_step(experience)
        curve.append(paying_share(engines.actor))
    assert 0.4 < start < 0.6
    assert sum(curve[-10:]) / 10 == pytest.approx(best(start), abs=0.04)
