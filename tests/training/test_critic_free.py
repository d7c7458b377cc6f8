"""GRPO and RLOO against slow versions: loops over answers and tokens, one row at a time, no padding, no DeepSpeed."""

import pytest
import torch
from small import engine, scratch, spec
from test_ppo import PROMPTS, STOP, Slow, prompts, settings

from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.training import grpo, rloo
from rlhfdsl.training.advantages import group_advantages, leave_one_out
from rlhfdsl.training.micro import in_turn
from rlhfdsl.training.onpolicy import Engines
from rlhfdsl.training.rewards import ModelReward

OWN = settings(
    rollout={"answers": 3}, update={"minibatch": 12, "epochs": 2, "scale": True, "clip_high": 0.3},
    kl={"apply": "loss", "estimator": "k3"}, reward={"clip": None, "overlong": None},
)  # fmt: skip


@pytest.fixture(scope="module")
def other_source(tmp_path_factory) -> str:
    return scratch(tmp_path_factory.mktemp("other") / "small", seed=2)


def trainer(kind, source, other, own=OWN, micro=5):
    reward = engine(ScalarEngine, source, spec("reward", trains=False, micro=3), seed=12)
    engines = Engines(
        actor=engine(HybridEngine, source, spec(micro=micro, lr=1e-2)),
        ref=engine(PolicyEngine, other, spec("ref", trains=False, micro=2)),
        reward=ModelReward(reward, longest=28),
    )
    return kind.Trainer(engines, own, at_once=6, stop_ids=STOP, pad_id=258, seed=5)


def test_group_advantages_and_leave_one_out_by_loops():
    torch.manual_seed(3)
    rewards = torch.randn(4, 5)
    rewards[2] = 1.5  # a group of equal answers teaches nothing
    for i, group in enumerate(rewards.tolist()):
        mean = sum(group) / 5
        deviation = (sum((r - mean) ** 2 for r in group) / 5) ** 0.5
        for j, reward in enumerate(group):
            scaled = (reward - mean) / deviation if i != 2 else 0.0
            assert group_advantages(rewards, scale=True)[i, j].item() == pytest.approx(scaled, abs=1e-4)
            assert group_advantages(rewards, scale=False)[i, j].item() == pytest.approx(reward - mean, abs=1e-6)
            others = [r for k, r in enumerate(group) if k != j]
            assert leave_one_out(rewards)[i, j].item() == pytest.approx(reward - sum(others) / 4, abs=1e-6)


@pytest.mark.parametrize("reward", [0.1, 4.7, -93.3])
def test_equal_answers_teach_nothing_whatever_their_score(reward):
    """Their mean is off by some units of the last place; in fp32 that is 5e-7 at 4.7, half of the 1e-6 of the divisor,
    and in fp64 1e-15."""
    for answers in (3, 5, 7, 16):
        rewards = torch.full((1, answers), reward)
        assert group_advantages(rewards, scale=True).abs().max() < 1e-7
        assert leave_one_out(rewards).abs().max() < 1e-12
        assert group_advantages(rewards, scale=True).dtype == leave_one_out(rewards).dtype == torch.float32


def raw_scores(slow, sequences):
    with torch.no_grad():
        return [slow.scalars(slow.reward, sequence)[-1].item() for sequence in sequences]


@pytest.mark.parametrize("kind", [grpo, rloo])
def test_two_epochs_equal_the_slow_version(source, other_source, kind):
    fast = trainer(kind, source, other_source)
    experience, _ = fast.generate_experience(prompts(), [0, 1, 2, 3])
    fast.train_step(experience)
    slow = Slow(source, other_source, fast)
    sequences = [experience.ids[i, : experience.lengths[i]].tolist() for i in range(12)]
    starts = [len(PROMPTS[i // 3]) for i in range(12)]
    worth = []
    scores = [
        score - (0.0 if sequence[-1] in STOP else 1.0)
        for score, sequence in zip(raw_scores(slow, sequences), sequences, strict=True)
    ]
    for i, score in enumerate(scores):
        group = scores[i - i % 3 : i - i % 3 + 3]
        mean = sum(group) / 3
        if kind is grpo:
            worth.append((score - mean) / (sum((s - mean) ** 2 for s in group) / 3) ** 0.5)
        else:
            worth.append(score - (sum(group) - score) / 2)
    with torch.no_grad():
        old = [slow.log_probs(slow.actor, s, p, 0.8) for s, p in zip(sequences, starts, strict=True)]
        ref = [slow.log_probs(slow.ref, s, p, 0.8) for s, p in zip(sequences, starts, strict=True)]
    tokens = sum(len(part) for part in old)
    optimizer = torch.optim.AdamW(slow.actor.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    high = 0
    for _ in range(2):
        loss = torch.zeros(())
        for i, sequence in enumerate(sequences):
            new = slow.log_probs(slow.actor, sequence, starts[i], 0.8)
            for t in range(len(new)):
                ratio = torch.exp(new[t] - old[i][t])
                high += int(worth[i] > 0 and ratio > 1.3)
                loss = loss - torch.minimum(ratio * worth[i], ratio.clamp(0.8, 1.3) * worth[i])
                loss = loss + 0.3 * (torch.exp(ref[i][t] - new[t]) - 1 - (ref[i][t] - new[t]))
        optimizer.zero_grad()
        (loss / tokens).backward()
        optimizer.step()
    assert high > 0  # the upper bound is met
    for found, expected in zip(fast.engines.actor.module.parameters(), slow.actor.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-3)


def test_a_kl_in_the_reward_is_part_of_an_answers_worth(source, other_source):
    own = settings(rollout={"answers": 3}, update={"minibatch": 12}, reward={"overlong": None})
    fast = trainer(rloo, source, other_source, own)
    experience, _ = fast.generate_experience(prompts(), [0, 1, 2, 3])
    kl = [
        sum((experience.log_probs[i] - experience.ref_log_probs[i])[experience.mask[i]].tolist()) for i in range(12)
    ]
    clipped = [max(-0.5, min(0.5, score)) for score in experience.scores.tolist()]
    ended = experience.ended.tolist()
    rewards = [s - (0 if e else 1) - 0.3 * nats for s, e, nats in zip(clipped, ended, kl, strict=True)]
    for i, reward in enumerate(rewards):
        group = rewards[i - i % 3 : i - i % 3 + 3]
        expected = reward - (sum(group) - reward) / 2
        found = experience.advantages[i][experience.mask[i]]
        torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-4, rtol=1e-4)


def test_one_or_many_micro_batches_give_one_update(source, other_source):
    """Accumulation 12 (micro 1) and 1 (micro 12) over answers of unequal lengths; gradients before Adam's division."""
    gradients = []
    for micro in (1, 12):
        one = trainer(grpo, source, other_source, micro=micro)
        experience, _ = one.generate_experience(prompts(), [0, 1, 2, 3])
        assert len(set(experience.lengths.tolist())) > 3
        in_turn(one.gradients(experience, 0, (), True))
        # DeepSpeed keeps the accumulated gradient in `grad` at ZeRO 0.
        gradients.append(torch.cat([p.grad.flatten() for p in one.engines.actor.module.parameters()]))
    assert gradients[0].norm() > 0.01
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
