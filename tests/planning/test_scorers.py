"""Scorers in a plan: pinned by the hash of their file, read as text, never run; several with weights."""

from __future__ import annotations

import hashlib

import pytest
from test_critic_free_plans import BIG, HEAD, JUDGE, PAIRS
from workshop import CPU, gpus

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import lock, scorers
from rlhfdsl.planning.render import render
from rlhfdsl.planning.validate import validate_lock, validate_plan

CODE = 'raise SystemExit("this was run")\n\n\ndef brevity(prompts, answers, limit=3):\n    return [0.0]\n'


def rloo(reward: str) -> str:
    return (
        HEAD + BIG + JUDGE + PAIRS + 'scorer brevity { file = "./rewards.py", function = "brevity" }\n'
        'scorer remote { url = "http://127.0.0.1:1/score", timeout = 2m }\n'
        "scorer second { model = model.judge }\n"
        "stage rloo {\n  data = data.pairs\n  rollouts = 2\n  actor { model = model.big, lr = 1e-6 }\n"
        f"  reward {{ {reward} }}\n  rollout {{ batch = 32, prompt = 256, answer = 256 }}\n"
        "  update { minibatch = 64 }\n  kl { coef = 0.04 }\n}\n"
    )


def sources(plan):
    return plan["stages"][0]["settings"]["reward"]["sources"]


def test_a_function_alone_needs_no_engine_and_is_pinned(shop):
    text = rloo("call = scorer.brevity")
    (shop.folder / "rewards.py").write_text(CODE)
    plan = shop.plan(text)
    assert list(plan["stages"][0]["engines"]) == ["actor", "ref"] and sources(plan)[0]["facts"] is None
    ((part, address, entry),) = [found for found in lock.missing(plan) if found[0] == "scorers"]
    shop.lock["scorers"] = {entry["key"]: scorers.facts(entry, shop.folder, address)}
    validate_lock(shop.lock)
    plan = shop.plan(text)
    validate_plan(plan)
    digest = hashlib.sha256(CODE.encode()).hexdigest()
    assert sources(plan)[0]["facts"]["files"]["rewards.py"]["sha256"] == f"sha256:{digest}"
    assert f"+1 x brevity: brevity of rewards.py (sha256:{digest[:12]})" in render(plan)
    (shop.folder / "rewards.py").write_text(CODE + "\n")
    (change,) = lock.drop_stale(shop.lock, plan, shop.folder)
    assert change.name == "rewards.py" and sources(shop.plan(text))[0]["facts"] is None


def test_a_model_an_endpoint_and_a_second_model_with_weights(shop):
    plan = shop.plan(rloo("model = model.judge, add { remote = 0.5, second = -0.1 }"), gpus(1))
    validate_plan(plan)
    assert list(plan["stages"][0]["engines"]) == ["actor", "ref", "reward", "reward-second"]
    assert [(s["name"], s["weight"], s["kind"]) for s in sources(plan)] == [
        ("model", 1.0, "model"), ("remote", 0.5, "endpoint"), ("second", -0.1, "model"),
    ]  # fmt: skip
    assert sources(plan)[1]["timeout"] == 120
    assert "+0.5 x remote: POST http://127.0.0.1:1/score, at most 120 s" in render(plan)
    one = shop.plan(rloo("model = model.judge"), gpus(1))["stages"][0]
    two = plan["stages"][0]
    assert two["memory"]["peak"] > one["memory"]["peak"] and two["time"]["each"]["score"] > one["time"]["each"]["score"]


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (None, "E0740", "`rewards.py` cannot be read: No such file or directory"),
        ("def brevity(:\n", "E0740", "`rewards.py` is not valid Python, line 1: invalid syntax"),
        ("def other(a, b):\n    pass\n", "E0741", "`rewards.py` defines no function `brevity`"),
        ("def brevity(answers):\n    pass\n", "E0741", "`brevity` of `rewards.py` does not take two lists"),
        ("def brevity(a, b, c):\n    pass\n", "E0741", "`brevity` of `rewards.py` does not take two lists"),
    ],
)
def test_a_file_that_cannot_score(shop, code, error, message):
    if code is not None:
        (shop.folder / "rewards.py").write_text(code)
    (entry,) = sources(shop.plan(rloo("call = scorer.brevity"), CPU))
    with pytest.raises(UserError) as raised:
        scorers.facts(entry, shop.folder, "scorer.brevity")
    at = {"E0740": "file", "E0741": "function"}[error]
    assert (raised.value.code, raised.value.message, raised.value.at) == (error, message, f"scorer.brevity.{at}")


def test_a_stage_waits_for_the_model_of_its_scorer(shop):
    text = rloo("call = scorer.second").replace("second { model = model.judge", "second { model = stage.late")
    late = "stage reward late { model = model.judge, data = data.pairs, batch = 8, length = 64, lr = 1e-5 }\n"
    plan = shop.plan(text + late)
    assert [stage["address"] for stage in plan["stages"]] == ["stage.late", "stage.rloo"]
    assert plan["stages"][1]["needs"] == ["model.big", "stage.late"]
