"""Plans of dpo, grpo and rloo: batches worked by hand, engines, memory, time, checks."""

from __future__ import annotations

import pytest
from workshop import CPU, PAIRS, TINY, gpus

from rlhfdsl.planning.render import render
from rlhfdsl.planning.validate import validate_plan

HEAD = 'recipe "t" { seed = 1 }\n'
BIG = 'model big { from = "facebook/opt-1.3b" }\n'
JUDGE = 'model judge { from = "facebook/opt-350m", head = scalar }\n'


def dpo(more: str = "", model: str = "tiny") -> str:
    return (
        HEAD + TINY + BIG + PAIRS + f"stage dpo {{ model = model.{model}, data = data.pairs, batch = 16, length = 128,"
        f" lr = 1e-5, epochs = 1 {more} }}\n"
    )


def groups(kind: str, more: str = "", rollout: str = "") -> str:
    return (
        HEAD + BIG + JUDGE + PAIRS + f"stage {kind} {{\n  data = data.pairs\n"
        "  actor { model = model.big, lr = 1e-6 }\n"
        "  reward { model = model.judge }\n"
        f"  rollout {{ batch = 32, prompt = 256, answer = 256 {rollout} }}\n"
        f"  update {{ minibatch = 64 }}\n  kl {{ coef = 0.04 }}\n{more}}}\n"
    )


def test_a_dpo_stage(shop):
    shop.know(dpo(), 100, gpus(2))
    plan = shop.plan(dpo(), gpus(2))
    validate_plan(plan)
    (stage,) = plan["stages"]
    # 16 pairs = 2 GPUs x 8; floor(100 / 16) = 6 updates, 4 pairs left over
    assert (stage["batch"]["per_rank"], stage["batch"]["updates"], stage["batch"]["dropped_tail"]) == (8, 6, 4)
    assert {name: engine["trains"] for name, engine in stage["engines"].items()} == {"policy": True, "ref": False}
    assert stage["engines"]["ref"]["weights"] == stage["engines"]["policy"]["weights"]
    assert stage["edges"]["train"]["read"] == "preference"
    assert stage["settings"]["beta"] == 0.1 and stage["artifacts"] == {"policy": "runs/t/dpo/model"}
    assert set(stage["memory"]["phases"]) == {"score", "train"} and set(stage["time"]["each"]) == {"score", "train"}
    assert "16 pairs = 2 x micro 8 x accum 1" in render(plan)


def test_a_precomputed_reference_of_the_same_weights_needs_no_engine(shop):
    (stage,) = shop.plan(dpo(", precompute = on"))["stages"]
    assert list(stage["engines"]) == ["policy"] and list(stage["memory"]["phases"]) == ["train"]
    other = ", precompute = on\n ref { model = model.other }"
    text = dpo(other) + 'model other { arch = llama, layers = 2, hidden = 32, heads = 4, dtype = fp32 }\n'
    assert list(shop.plan(text)["stages"][0]["engines"]) == ["policy", "ref"]


def test_a_reference_with_another_tokenizer_is_found(shop):
    found = shop.problem(dpo("\n ref { model = model.big }"))
    assert found.code == "E0707" and found.message == "the ref's tokenizer is not the policy's"


@pytest.mark.parametrize(("kind", "answers"), [("grpo", 8), ("rloo", 4)])
def test_a_critic_free_stage(shop, kind, answers):
    plan = shop.plan(groups(kind, "  rollouts = 10\n"), gpus(2))
    validate_plan(plan)
    (stage,) = plan["stages"]
    # 32 prompts x 8 answers = 256 = 2 GPUs x 128; 256 / 64 = 4 minibatches, one epoch: 40 updates in 10 rollouts
    batch = stage["batch"]
    assert (batch["sequences"], batch["per_rank"]) == (32 * answers, 16 * answers)
    assert (batch["minibatches"], batch["updates"]) == (answers // 2, 10 * answers // 2)
    assert list(stage["engines"]) == ["actor", "ref", "reward"] and "critic" not in stage["artifacts"]
    kl = stage["settings"]["kl"]
    assert (kl["apply"], kl["estimator"]) == (("loss", "k3") if kind == "grpo" else ("reward", "k1"))
    assert set(stage["time"]["each"]) == {"generate", "score", "train"}
    assert f"32 prompts x {answers} answers" in render(plan)


def test_without_a_critic_less_memory_and_time_are_needed(shop):
    with_critic = groups("ppo", "  rollouts = 10\n  critic { model = model.judge, lr = 1e-5 }\n", ", answers = 4")
    ppo, rloo = (shop.plan(text, gpus(1))["stages"][0] for text in (with_critic, groups("rloo", "  rollouts = 10\n")))
    assert rloo["memory"]["peak"] < ppo["memory"]["peak"]
    assert rloo["time"]["each"]["train"] < ppo["time"]["each"]["train"]
    assert rloo["time"]["each"]["generate"] == ppo["time"]["each"]["generate"]


def test_one_answer_has_no_group(shop, tmp_path):
    with pytest.raises(AssertionError, match="E0307"):
        shop.plan(groups("grpo", "", ", answers = 1"), CPU)
