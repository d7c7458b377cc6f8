"""Stages dpo, grpo and rloo from recipe to artifacts, on one rank."""

import copy
import json
import math

import pytest
import torch
from pipeline import plan, run_broken, run_here, write_recipe
from transformers import AutoModelForCausalLM

from rlhfdsl.data.order import batch_rows
from rlhfdsl.training.context import Context

RECIPE = """
recipe "critic-free" { language = 1, seed = 3 }

model tiny { arch = llama, layers = 2, hidden = 32, heads = 4, kv_heads = 2, dtype = fp32 }
data pairs { from = "./pairs.jsonl", format = preference }
data prose { from = "./prose.jsonl", format = text }
blend all {
  mix { pairs = 100% }
  split { reward = 30%, dpo = 30%, grpo = 15%, rloo = 10%, eval = 15% }
}
parallel shard { zero = 0, micro = 2 }

scorer brevity { file = "./rewards.py", function = "brevity" }
scorer judge { model = stage.reward }

stage reward {
  model = model.tiny, data = blend.all, steps = 2, batch = 4, length = 96, lr = 1e-3, parallel = parallel.shard
}
stage dpo {
  model = model.tiny, data = blend.all, eval = blend.all.eval
  steps = 12, batch = 8, length = 96, lr = 3e-3, parallel = parallel.shard
  every { log = 1 }
}
stage dpo early from stage.dpo { precompute = on, steps = 1, schedule = constant, beta = 0.3, smoothing = 10% }
stage grpo {
  data = blend.all, eval = blend.all.eval, rollouts = 2
  actor { model = stage.dpo, lr = 1e-3, ema = 0.9, parallel = parallel.shard }
  reward { model = stage.reward }
  rollout { batch = 4, answers = 4, prompt = 64, answer = 12 }
  update { minibatch = 8, epochs = 2 }
  kl { coef = 0.05 }
  ptx { data = data.prose, weight = 0.5, batch = 4 }
}
stage rloo {
  data = blend.all, eval = blend.all.eval, rollouts = 2
  actor { model = stage.grpo.ema, lr = 1e-3, parallel = parallel.shard }
  reward { call = scorer.brevity, add { judge = 0.5 } }
  rollout { batch = 4, answers = 2, prompt = 64, answer = 12 }
  update { minibatch = 8 }
  kl { coef = 0.05 }
}
"""


BREVITY = """
def brevity(prompts, answers):
    assert all(prompt.strip().startswith("Human: What is a") for prompt in prompts)
    return [-float(len(answer)) for answer in answers]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critic-free")
    path = write_recipe(folder, RECIPE)
    (folder / "rewards.py").write_text(BREVITY)
    made = plan(path, f'recipe.output="{folder}/run"')
    run_here(made, folder)
    (folder / "run" / "plan.json").write_text(json.dumps(made))
    return folder / "run"


@pytest.fixture(scope="module")
def slow(folder):
    """One pair at a time in plain transformers: (base model, pairs of an edge, summed log p of an answer)."""
    made = json.loads((folder / "plan.json").read_text())
    stage = next(stage for stage in made["stages"] if stage["kind"] == "dpo")
    context = Context(made, stage, folder.parent, folder, torch.device("cpu"), print)
    base = AutoModelForCausalLM.from_pretrained(next((folder / "models").glob("tiny-*")), dtype=torch.float32)

    def log_prob(model, example):
        rows = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        return sum(rows[t - 1, example.ids[t]] for t in range(1, len(example.ids)) if example.loss[t])

    return base, context.rows, log_prob


def events(folder, stage, kind):
    lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def test_dpo_learns_to_prefer_the_chosen_answer(folder):
    first, *_, last = events(folder, "dpo", "eval")
    assert first["eval_margin"] == pytest.approx(0, abs=1e-5) and first["eval_accuracy"] == pytest.approx(0.5, abs=0.5)
    assert last["eval_accuracy"] > 0.9 and last["eval_margin"] > 0.05
    assert last["eval_chosen_reward"] > last["eval_rejected_reward"]
    assert events(folder, "dpo", "invariants")[0]["invariant_reference"] < 1e-6


def test_the_evaluation_equals_the_slow_version(folder, slow):
    base, rows, log_prob = slow
    policy = AutoModelForCausalLM.from_pretrained(folder / "dpo" / "model", dtype=torch.float32)
    margins = []
    with torch.no_grad():
        for pair in rows("eval"):
            chosen, rejected = (
                0.1 * (log_prob(policy, side) - log_prob(base, side)).item() for side in (pair.chosen, pair.rejected)
            )
            margins.append(chosen - rejected)
    last = events(folder, "dpo", "eval")[-1]
    assert last["eval_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert last["eval_accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
    losses = [math.log(1 + math.exp(-margin)) for margin in margins]
    assert last["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_an_update_with_smoothing_equals_the_slow_version(folder, slow):
    """Its reference was read beforehand, by the policy itself."""
    base, rows, log_prob = slow
    made = json.loads((folder / "plan.json").read_text())
    seed = next(stage["seed"] for stage in made["stages"] if stage["address"] == "stage.early")
    pairs, model = rows("train"), copy.deepcopy(base)
    assert torch.load(folder / "early" / "reference-train.pt").shape == (len(pairs), 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    loss = torch.zeros(())
    for row in batch_rows(len(pairs), 8, 0, seed, True):
        ratios = [log_prob(model, s) - log_prob(base, s).detach() for s in (pairs[row].chosen, pairs[row].rejected)]
        right = torch.sigmoid(0.3 * (ratios[0] - ratios[1]))
        loss = loss - (0.9 * right.log() + 0.1 * (1 - right).log()) / 8
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)  # every margin is 0 before the first update
    trained = AutoModelForCausalLM.from_pretrained(folder / "early" / "model", dtype=torch.float32)
    for found, expected in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_a_function_and_a_second_model_score_together(folder):
    first = events(folder, "rloo", "update")[0]
    assert first["score"] == pytest.approx(first["score_brevity"] + 0.5 * first["score_judge"], abs=1e-4)
    assert first["score_brevity"] == pytest.approx(-first["length"], abs=2)  # bytes are tokens; a stop has no text


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_a_critic_free_stage_leaves_its_policy_and_its_numbers(folder, stage):
    assert (folder / stage / "actor" / "model.safetensors").exists() and not (folder / stage / "critic").exists()
    updates = events(folder, stage, "update")
    assert len(updates) == 2 and updates[0]["answers"] == (16 if stage == "grpo" else 8)
    assert "explained_variance" not in updates[0] and updates[0]["policy_loss"] == pytest.approx(0, abs=2)
    assert events(folder, stage, "invariants")[0]["invariant_ratio"] < 1e-6
    assert events(folder, stage, "eval")[1]["eval_kl"] > 0
    assert ("ptx_loss" in updates[0]) == (stage == "grpo") == (folder / stage / "actor-ema").exists()


@pytest.mark.slow
def test_a_run_that_was_broken_off_ends_with_the_same_bits(tmp_path):
    """Each stage after its second update; the reference that was read beforehand is found again."""
    longer = RECIPE.replace("steps = 1,", "steps = 4,").replace("rollouts = 2", "rollouts = 3")
    path = write_recipe(tmp_path, longer.replace("steps = 2, batch = 4", "steps = 3, batch = 4"))
    (tmp_path / "rewards.py").write_text(BREVITY)
    run_here(plan(path, f'recipe.output="{tmp_path}/whole"'), tmp_path)
    run_broken(plan(path, f'recipe.output="{tmp_path}/broken"'), tmp_path, 2)
    for made in ("dpo/model", "early/model", "grpo/actor", "grpo/actor-ema", "rloo/actor"):
        whole, broken = (tmp_path / run / made / "model.safetensors" for run in ("whole", "broken"))
        assert whole.read_bytes() == broken.read_bytes(), made
