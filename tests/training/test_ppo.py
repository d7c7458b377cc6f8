"""PPO against a slow version in plain PyTorch: one row at a time, no padding, no cache, no DeepSpeed."""

import copy
import statistics
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from small import engine, scratch, spec
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhfdsl.data.edge import Example, Prompt
from rlhfdsl.engines.ema import MovingAverage
from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import cut
from rlhfdsl.training.loop import make_critic
from rlhfdsl.training.onpolicy import Engines
from rlhfdsl.training.ppo import Trainer
from rlhfdsl.training.rewards import ModelReward

SETTINGS = {
    "rollouts": 1,
    "rollout": {"batch": 4, "answers": 1, "prompt": 16, "answer": 12, "temperature": 0.8, "top_k": None,
                "top_p": None, "overlong": "drop", "on_mismatch": "eager"},
    "update": {
        "minibatch": 4, "epochs": 1, "clip": 0.2, "clip_high": None, "dual_clip": None, "entropy": 0.0,
        "value_clip": 0.2, "value_weight": 0.5, "gamma": 0.9, "lambda": 0.8, "whiten": True,
    },
    "kl": {"coef": 0.3, "apply": "reward", "estimator": "k1", "target": None, "horizon": 10_000},
    "reward": {"clip": 0.5, "normalize": False, "missing_eos": -1.0, "overlong": {"buffer": 8, "penalty": 0.7}},
    "ptx": None, "critic": {"warmup_rollouts": 0}, "log": 1, "eval_every": None, "samples_every": None,
}  # fmt: skip
STOP = tuple(range(0, 259, 9))
SCALE = 0.3, 2.0  # of the critic: the mean that is taken off, and the deviation
PROMPTS = [[10, 20, 30], [7], [1, 2, 3, 4, 5, 6, 7, 8], [200, 100]]


def prompts():
    return [Prompt(ids=ids, text=str(ids), key=str(number)) for number, ids in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def other_source(tmp_path_factory) -> str:
    """Other weights than `source`, so that a reference or a reward model is not the policy by chance."""
    return scratch(tmp_path_factory.mktemp("other") / "small", seed=2)


def trainer(source, other, settings=SETTINGS, micro=3, dropout=0.0, at_once=3, frozen="off", **actor):
    still = {"offload": frozen}
    engines = Engines(
        actor=engine(HybridEngine, source, spec(micro=micro, lr=1e-2, dropout=dropout, **actor)),
        critic=engine(ScalarEngine, other, spec("critic", micro=micro, lr=1e-2), seed=11),
        ref=engine(PolicyEngine, other, spec("ref", trains=False, micro=2) | still),
        reward=ModelReward(
            engine(ScalarEngine, source, spec("reward", trains=False, micro=3) | still, seed=12), longest=28
        ),
    )
    engines.critic.mean, engines.critic.deviation = SCALE
    return Trainer(engines, settings, at_once=at_once, stop_ids=STOP, pad_id=258, seed=5)


def settings(**changes):
    """SETTINGS with some entries of its sub-blocks replaced."""
    new = copy.deepcopy(SETTINGS)
    for block, values in changes.items():
        new[block] = values if new[block] is None else {**new[block], **values}
    return new


class Slow:
    """The same models in plain transformers, and PPO written out for single rows."""

    def __init__(self, source, other, trained: Trainer):
        self.actor = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        self.ref = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
        if trained.engines.critic is not None:
            self.critic = AutoModelForSequenceClassification.from_pretrained(other, num_labels=1, dtype=torch.float32)
            self.critic.score.weight.data.copy_(trained.engines.critic.module.classifier.score.weight.data)
        self.reward = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
        self.reward.score.weight.data.copy_(trained.engines.reward.engine.module.classifier.score.weight.data)

    @staticmethod
    def log_probs(model, sequence, start, temperature=1.0):
        logits = model(torch.tensor([sequence])).logits[0] / temperature
        return torch.stack([logits[t - 1].log_softmax(0)[sequence[t]] for t in range(start, len(sequence))])

    @staticmethod
    def scalars(model, sequence):
        hidden = model.model(torch.tensor([sequence])).last_hidden_state[0]
        return hidden @ model.score.weight[0]

    def values(self, sequence):
        return (self.scalars(self.critic, sequence) - SCALE[0]) / SCALE[1]

    def advantages(self, sequences, starts, ended, settings):
        """Per row: old log-probabilities, values, rewards, raw advantages, returns; in plain Python loops."""
        rows = []
        for sequence, start, end in zip(sequences, starts, ended, strict=True):
            with torch.no_grad():
                old = self.log_probs(self.actor, sequence, start, settings["rollout"]["temperature"])
                ref = self.log_probs(self.ref, sequence, start, settings["rollout"]["temperature"])
                values = self.values(sequence)[start - 1 : -1].tolist()
                score = self.scalars(self.reward, sequence)[-1].item()
            clip = settings["reward"]["clip"]
            score = max(-clip, min(clip, score)) + (0.0 if end else settings["reward"]["missing_eos"])
            score -= 0.7 * max(0, len(old) - 4) / 8  # answers of at most 12 tokens, a buffer of 8
            rewards = [-settings["kl"]["coef"] * d for d in (old - ref).tolist()]
            rewards[-1] += score
            gamma, lam = settings["update"]["gamma"], settings["update"]["lambda"]
            nexts = values[1:] + [0.0]
            deltas = [r + gamma * n - v for r, n, v in zip(rewards, nexts, values, strict=True)]
            advantages = [
                sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
            ]
            rows.append((old, values, rewards, advantages, [a + v for a, v in zip(advantages, values, strict=True)]))
        return rows


@pytest.fixture(params=[cut.SPREAD, 0.0], ids=["padded", "packed"])
def spread(request, monkeypatch):
    """Whether models as small as these run without their padding: in earnest theirs is worth less than the launches."""
    monkeypatch.setattr(cut, "SPREAD", request.param)


@pytest.mark.usefixtures("spread")
def test_experience_equals_the_slow_version(source, other_source):
    fast = trainer(source, other_source)
    experience, metrics = fast.generate_experience(prompts(), [0, 1, 2, 3])
    slow = Slow(source, other_source, fast)
    sequences = [experience.ids[i, : experience.lengths[i]].tolist() for i in range(4)]
    assert [s[: len(p)] for s, p in zip(sequences, PROMPTS, strict=True)] == PROMPTS
    ended = [sequence[-1] in STOP for sequence in sequences]
    assert experience.ended.tolist() == ended and any(ended) and not all(ended)
    rows = slow.advantages(sequences, [len(p) for p in PROMPTS], ended, SETTINGS)
    flat = torch.tensor([a for row in rows for a in row[3]], dtype=torch.float64)
    for i, (old, values, rewards, advantages, returns) in enumerate(rows):
        size = len(old)
        assert experience.mask[i].tolist() == [True] * size + [False] * (experience.mask.shape[1] - size)
        torch.testing.assert_close(experience.log_probs[i, :size], old, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(experience.values[i, :size], torch.tensor(values), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(experience.rewards[i, :size], torch.tensor(rewards), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(experience.returns[i, :size], torch.tensor(returns), atol=5e-5, rtol=1e-4)
        white = (torch.tensor(advantages, dtype=torch.float64) - flat.mean()) / flat.std(correction=0)
        torch.testing.assert_close(experience.advantages[i, :size].double(), white, atol=2e-4, rtol=1e-3)
    kl = [sum((row[0] - slow.log_probs(slow.ref, s, len(p), 0.8)).tolist())
          for row, s, p in zip(rows, sequences, PROMPTS, strict=True)]  # fmt: skip
    assert metrics["kl"] == pytest.approx(sum(kl) / 4, abs=1e-4)
    assert metrics["length"] == sum(len(row[0]) for row in rows) / 4
    assert metrics["parity"] < 1e-5
    raw = [slow.scalars(slow.reward, sequence)[-1].item() for sequence in sequences]
    tokens = sum(len(row[0]) for row in rows)
    returns, values = (torch.tensor([x for row in rows for x in row[i]], dtype=torch.float64) for i in (4, 1))
    expected = {
        "answers": 4, "score": sum(raw) / 4, "score_std": statistics.pstdev(raw),
        "reward": sum(sum(row[2]) for row in rows) / 4, "kl_per_token": sum(kl) / tokens, "ended": sum(ended) / 4,
        "score_clipped": sum(abs(score) > 0.5 for score in raw) / 4,
        "explained_variance": 1 - ((returns - values).var() / returns.var()).item(),
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert any(score < -0.5 for score in raw) and any(score > -0.5 for score in raw)


@pytest.mark.usefixtures("spread")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl": {"apply": "loss", "estimator": "k3"}},
        {"update": {"entropy": 0.05, "dual_clip": 1.5}},
        {"ptx": {"weight": 3.0, "batch": 2}},
    ],
    ids=["plain", "kl-in-loss", "entropy-and-dual-clip", "ptx"],
)
def test_second_epoch_update_equals_the_slow_version(source, other_source, changes):
    """Two epochs over one minibatch, so that the second update has ratios away from 1 and clipped tokens."""
    chosen = settings(**{**changes, "update": {"epochs": 2, **changes.get("update", {})}})
    fast = trainer(source, other_source, chosen)
    experience, _ = fast.generate_experience(prompts(), [0, 1, 2, 3])
    slow = Slow(source, other_source, fast)
    texts = [([3, 1, 4, 1, 5], [9, 2, 6]), ([5, 3, 5], [8, 9, 7, 9])]  # of either update
    ptx = [[Example(ids=ids, loss=[True] * len(ids)) for ids in rows] for rows in texts]
    metrics = fast.train_step(experience, ptx if chosen["ptx"] else ())

    update, kl = chosen["update"], chosen["kl"]
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
        for model in (slow.actor, slow.critic)
    ]
    tokens = int(experience.mask.sum())
    sums = Counter()  # of all tokens of both updates
    for rows in texts:
        policy_sum, value_sum = 0.0, 0.0
        for i, prompt in enumerate(PROMPTS):
            sequence = experience.ids[i, : experience.lengths[i]].tolist()
            size = len(sequence) - len(prompt)
            old, adv = experience.log_probs[i, :size], experience.advantages[i, :size]
            ref = experience.ref_log_probs[i, :size]
            new = slow.log_probs(slow.actor, sequence, len(prompt), 0.8)
            values = slow.values(sequence)[len(prompt) - 1 : -1]
            distributions = (slow.actor(torch.tensor([sequence])).logits[0] / 0.8).softmax(-1)
            for t in range(size):
                ratio = torch.exp(new[t] - old[t])
                gain = torch.minimum(ratio * adv[t], ratio.clamp(0.8, 1.2) * adv[t])
                if update["dual_clip"] and adv[t] < 0:
                    gain = torch.maximum(gain, update["dual_clip"] * adv[t])
                policy_sum = policy_sum - gain
                sums.update(policy_loss=-gain.item(), clipped=int(gain != ratio * adv[t]), ratio=ratio.item())
                sums.update(approximate_kl=(ratio - 1 - ratio.log()).item())
                if kl["apply"] == "loss":
                    policy_sum = policy_sum + kl["coef"] * (torch.exp(ref[t] - new[t]) - 1 - (ref[t] - new[t]))
                p = distributions[len(prompt) - 1 + t]
                policy_sum = policy_sum + update["entropy"] * (p * p.log()).sum()
                sums.update(entropy=-(p * p.log()).sum().item())
                old_value, target = experience.values[i, t], experience.returns[i, t]
                near = old_value + (values[t] - old_value).clamp(-0.2, 0.2)
                error = torch.maximum((values[t] - target) ** 2, (near - target) ** 2)
                value_sum = value_sum + 0.5 * error
                sums.update(value_loss=error.item(), value_clipped=int(error > (values[t] - target) ** 2))
        loss = policy_sum / tokens
        if chosen["ptx"]:
            nll = -sum(slow.log_probs(slow.actor, ids, 1).sum() for ids in rows)
            loss = loss + chosen["ptx"]["weight"] * nll / sum(len(ids) - 1 for ids in rows)
        for optimizer, part in zip(optimizers, (loss, value_sum / tokens), strict=True):
            optimizer.zero_grad()
            part.backward()
            optimizer.step()
    assert sums["clipped"] > 0
    means = {name: total / (2 * tokens) for name, total in sums.items()}
    assert {name: metrics[name] for name in means} == pytest.approx(means, abs=2e-4, rel=2e-3)
    for found, expected in (
        (fast.engines.actor.module, slow.actor),
        (fast.engines.critic.module.classifier, slow.critic),
    ):
        for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=3e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_frozen_engines_that_rest_change_nothing(source, other_source):
    """They are never on the device together, nor beside sampling and training."""
    found = []
    for frozen in ("off", "idle"):
        one = trainer(source, other_source, frozen=frozen)
        idle = [engine.resting for engine in (one.engines.ref, one.engines.reward.engine)]
        experience, metrics = one.generate_experience(prompts(), [0, 1, 2, 3])
        assert all(resting is None or resting.away for resting in idle)
        one.check(experience, same_reference=False)
        assert all(resting is None or resting.away for resting in idle)
        found.append((metrics, one.train_step(experience)))
    for kept, rested in zip(*found, strict=True):
        same = {name: value for name, value in kept.items() if "second" not in name}
        assert {name: rested[name] for name in same} == pytest.approx(same, rel=0, abs=0, nan_ok=True)


def test_a_reward_model_is_normalised_by_what_it_was_saved_with(source, other_source):
    experience, _ = trainer(source, other_source).generate_experience(prompts(), [0, 1, 2, 3])
    judge = engine(ScalarEngine, source, spec("reward", trains=False, micro=3), seed=12)
    torch.testing.assert_close(ModelReward(judge, longest=28)(experience), experience.scores)
    with pytest.raises(UserError, match="was saved with no deviation of scores") as raised:
        ModelReward(judge, longest=28, normalize=True)
    assert raised.value.code == "E0311" and raised.value.at == "model.small"
    judge.module.config.reward_mean, judge.module.config.reward_std = 0.25, 2.0
    found = [ModelReward(judge, longest=28, normalize=normalize)(experience) for normalize in (False, True)]
    torch.testing.assert_close(found[0], experience.scores - 0.25)
    torch.testing.assert_close(found[1], (experience.scores - 0.25) / 2)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_critic_begins_on_the_scale_of_the_rewards(source, normalize):
    judge = engine(ScalarEngine, source, spec("reward", trains=False, micro=3), seed=12)
    critic = engine(ScalarEngine, source, spec("critic", micro=3), seed=12)
    ids, lengths = torch.randint(0, 259, (2, 9)), torch.tensor([9, 9])
    plain = critic.scalars(ids, lengths)
    for each in (judge, critic):
        each.module.config.reward_mean, each.module.config.reward_std = 0.25, 2.0
    ModelReward(judge, longest=28, normalize=normalize)
    asked = SimpleNamespace(engine=lambda name, kind: critic, settings={"reward": {"normalize": normalize}})
    found = make_critic(asked).scalars(ids, lengths)
    torch.testing.assert_close(found, judge.scalars(ids, lengths))
    torch.testing.assert_close(found, (plain - 0.25) / (2 if normalize else 1))


def test_a_critic_of_a_model_without_a_mean_gives_what_the_model_does(source):
    critic = engine(ScalarEngine, source, spec("critic", micro=3), seed=12)
    make_critic(SimpleNamespace(engine=lambda name, kind: critic, settings={"reward": {"normalize": True}}))
    assert (critic.mean, critic.deviation) == (0.0, 1.0)


def test_micro_size_does_not_change_the_update(source, other_source):
    results = []
    for micro in (1, 4):
        one = trainer(source, other_source, micro=micro)
        experience, _ = one.generate_experience(prompts(), [0, 1, 2, 3])
        one.train_step(experience)
        results.append(torch.cat([p.flatten() for p in one.engines.actor.module.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-3)


def test_warming_up_the_critic_leaves_the_actor_alone(source, other_source):
    one = trainer(source, other_source)
    one.average = MovingAverage(one.engines.actor, 0.5)
    average = {name: tensor.clone() for name, tensor in one.average.shard.items()}
    before = [p.clone() for p in one.engines.actor.module.parameters()]
    critic = [p.clone() for p in one.engines.critic.module.parameters()]
    experience, _ = one.generate_experience(prompts(), [0, 1, 2, 3])
    one.train_step(experience, actor=False)
    assert all(torch.equal(a, b) for a, b in zip(before, one.engines.actor.module.parameters(), strict=True))
    assert all(torch.equal(tensor, one.average.shard[name]) for name, tensor in average.items())
    assert one.engines.actor.updates == 0 and one.engines.critic.updates == 1
    assert not all(torch.equal(a, b) for a, b in zip(critic, one.engines.critic.module.parameters(), strict=True))


def test_adaptive_kl_moves_the_coefficient(source, other_source):
    one = trainer(source, other_source, settings(kl={"target": 1e-3, "horizon": 100}))
    experience, metrics = one.generate_experience(prompts(), [0, 1, 2, 3])
    assert metrics["kl"] > 2e-3
    one.train_step(experience, actor=False)
    assert one.kl_coefficient == 0.3  # while the critic warms up
    one.train_step(experience)
    assert one.kl_coefficient == pytest.approx(0.3 * (1 + 0.2 * 4 / 100))  # the error is cut to 0.2; 4 answers


def test_several_answers_to_a_prompt_are_different_and_adjacent(source, other_source):
    one = trainer(source, other_source, settings(rollout={"answers": 3}))
    experience, _ = one.generate_experience(prompts()[:2], [0, 1])
    starts = [experience.ids[i, : experience.prompt_lengths[i]].tolist() for i in range(6)]
    assert starts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    answers = {tuple(experience.ids[i, : experience.lengths[i]].tolist()) for i in range(6)}
    assert len(answers) == 6


def test_an_answer_does_not_depend_on_its_neighbours(source, other_source):
    one = trainer(source, other_source)
    one.at_once = 4
    together = one.sample(prompts(), [0, 1, 2, 3], 7, 1)
    alone = one.sample(prompts()[2:3], [2], 7, 1)
    size = int(together.answer_lengths[2])
    assert alone.input_ids[0, -size:].tolist() == together.input_ids[2, 8 : 8 + size].tolist()


class TestInvariants:
    def experience(self, one):
        experience, _ = one.generate_experience(prompts(), [0, 1, 2, 3])
        return experience

    def test_hold_on_a_right_trainer(self, source, other_source):
        one = trainer(source, source)
        found = one.check(self.experience(one), same_reference=True)
        assert found["invariant_ratio"] == 0.0 and found["invariant_reference"] < 1e-6

    def test_dropout_is_found(self, source, other_source):
        llama = trainer(source, source, dropout=0.3)
        with pytest.raises(UserError, match="ratio to itself is not 1") as raised:
            llama.check(self.experience(llama), same_reference=True)
        assert raised.value.code == "E0780"

    def test_another_reference_is_found(self, source, other_source):
        one = trainer(source, other_source)
        with pytest.raises(UserError, match="differ by"):
            one.check(self.experience(one), same_reference=True)

    def test_a_reward_model_that_reads_padding_is_found(self, source, other_source, monkeypatch):
        one = trainer(source, source)
        experience = self.experience(one)
        monkeypatch.setattr(ScalarEngine, "scores", lambda self, ids, lengths, *_: self.scalars(ids, lengths)[:, -1])
        with pytest.raises(UserError, match="extra padding changes the reward"):
            one.check(experience, same_reference=True)
