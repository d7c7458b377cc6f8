"""`rlhf graph`, `rlhf diff` and `rlhf plan --fit` as a user runs them; nothing is locked and nothing is measured."""

from __future__ import annotations

import json

import pytest
from command import rlhf

from rlhfdsl.cli.main import main
from rlhfdsl.planning.validate import validate_plan

RECIPE = """recipe "r" { seed = 3 }
cluster node { gpus = 8, gpu = "a100-80g" }
model base { from = "facebook/opt-1.3b" }
model judge { from = "facebook/opt-350m" }
data pairs { from = "Dahoas/rm-static", format = preference, turns = hh }
parallel shard { zero = 2, micro = 8 }
stage sft {
  model = model.base, data = data.pairs, steps = 100, batch = 128, length = 512, lr = 1e-5, parallel = parallel.shard
}
stage reward { model = model.judge, data = data.pairs, steps = 100, batch = 64, length = 512, lr = 5e-6 }
stage ppo {
  data = data.pairs, rollouts = 10
  actor { model = stage.sft, lr = 1e-6 }
  critic { model = stage.reward, lr = 5e-6 }
  reward { model = stage.reward }
  rollout { batch = 256, prompt = 256, answer = 256 }
  update { minibatch = 64 }
  kl { coef = 0.1 }
}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.rlhf"
    path.write_text(RECIPE)
    return path


def test_graph(capsys, recipe):
    code, out, _ = rlhf(capsys, "graph", recipe)
    assert code == 0
    assert out.splitlines() == [
        "stage.sft", "  <- model.base  (policy)", "  <- data.pairs  (train: chat)", "  -> policy  runs/r/sft/model",
        "stage.reward", "  <- model.judge  (reward)", "  <- data.pairs  (train: preference)",
        "  -> reward  runs/r/reward/model",
        "stage.ppo", "  <- stage.sft  (policy as actor, ref)", "  <- stage.reward  (reward as critic, reward)",
        "  <- data.pairs  (train: prompt)", "  -> policy  runs/r/ppo/actor", "  -> critic  runs/r/ppo/critic",
    ]  # fmt: skip
    _, out, _ = rlhf(capsys, "graph", recipe, "--format", "mermaid")
    assert out.startswith("flowchart LR\n") and 'stage_sft -->|"policy as actor, ref"| stage_ppo' in out
    assert 'stage_sft["stage.sft<br>100 updates"]' in out
    _, out, _ = rlhf(capsys, "graph", recipe, "--format", "dot")
    assert out.startswith('digraph "r" {')
    assert '"model.base" [shape=cylinder, label="model.base\\nfacebook/opt-1.3b"]' in out


def test_graph_of_a_saved_plan_and_of_a_broken_one(capsys, recipe, tmp_path):
    saved = tmp_path / "plan.json"
    assert rlhf(capsys, "plan", recipe, "--no-lock", "-o", saved)[0] == 0
    assert rlhf(capsys, "graph", saved)[:2] == rlhf(capsys, "graph", recipe)[:2]
    plan = json.loads(saved.read_text())
    saved.write_text(json.dumps(plan | {"format_version": "9.0"}))
    code, _, err = rlhf(capsys, "graph", saved)
    assert code == 1 and "the plan has format 9.0" in err
    saved.write_text("no plan")
    assert rlhf(capsys, "graph", saved)[0] == 2


def test_diff_tells_what_changes_mean(capsys, recipe, tmp_path):
    other = tmp_path / "other.rlhf"
    other.write_text(RECIPE.replace("micro = 8", "micro = 16").replace("lr = 5e-6 }\nstage", "lr = 6e-6 }\nstage"))
    code, out, _ = rlhf(capsys, "diff", recipe, other)
    assert code == 0
    assert "stage.sft: the same learning, at another speed or on other devices\n" in out
    assert ["engines.policy.micro", "8", "16"] in [line.split() for line in out.splitlines()]
    assert "stage.reward: another result\n" in out and "engines.reward.schedule.lr  5e-06  6e-06" in out
    assert "stage.ppo: another result, since its input changes (stage.reward)" in out
    assert "deepspeed" not in out and "batch.updates" not in out  # what is derived or equal


def test_diff_of_what_is_the_same(capsys, recipe, tmp_path):
    renamed = tmp_path / "renamed.rlhf"
    renamed.write_text(RECIPE.replace("  kl {", "  # a comment\n  kl {"))
    assert "The two plans say the same." in rlhf(capsys, "diff", recipe, renamed)[1]
    renamed.write_text(RECIPE.replace('recipe "r"', 'recipe "other"'))
    _, out, _ = rlhf(capsys, "diff", recipe, renamed)
    assert out.count("the same, under another name or folder") == 3
    assert "artifacts" not in out and "writes" not in out  # they follow from the folder


def test_diff_of_inputs_and_stages(capsys, recipe, tmp_path):
    other = tmp_path / "other.rlhf"
    other.write_text(RECIPE.replace("opt-350m", "opt-125m").replace("gpus = 8", "gpus = 4"))
    parts = json.loads(rlhf(capsys, "diff", recipe, other, "--format", "json")[1])["parts"]
    means = {part["address"]: (part["means"], part["because"]) for part in parts}
    assert means["target"] == ("speed", []) and means["model.judge"] == ("result", [])
    assert means["stage.sft"] == ("speed", [])
    assert means["stage.reward"] == ("input", ["model.judge"])
    assert means["stage.ppo"] == ("input", ["stage.reward", "model.judge"])
    other.write_text(RECIPE[: RECIPE.index("stage ppo")])
    _, out, _ = rlhf(capsys, "diff", recipe, other)
    assert "stage.ppo: only in A" in out


def test_fit_chooses_anew(capsys, recipe):
    """On 8 A100 a micro batch of 8 at ZeRO 2 is not the fastest layout of OPT-1.3B; `--fit` says which is."""
    _, written, _ = rlhf(capsys, "plan", recipe, "--no-lock", "--format", "json")
    _, fitted, _ = rlhf(capsys, "plan", recipe, "--no-lock", "--format", "json", "--fit")
    written, fitted = json.loads(written), json.loads(fitted)
    validate_plan(fitted)
    assert fitted["time"]["seconds"] < written["time"]["seconds"]
    assert fitted["stages"][0]["batch"]["why"]["zero"] == "derived: the fastest that fits"
    assert all(stage["memory"]["fits"] for stage in fitted["stages"])
    code, out, _ = rlhf(capsys, "plan", recipe, "--no-lock", "--fit")
    assert code == 0 and "\nparallel p1 { zero = " in out


def test_fit_mends_what_does_not_fit(capsys, recipe):
    recipe.write_text(RECIPE.replace("opt-1.3b", "opt-66b"))
    code, _, err = rlhf(capsys, "plan", recipe, "--no-lock", "--gpu", "a100-40g")
    assert code == 1 and "error[E0712]" in err
    code, out, _ = rlhf(capsys, "plan", recipe, "--no-lock", "--gpu", "a100-40g", "--fit")
    assert code == 0 and "offload = " in out


def test_price(capsys, recipe):
    """10 hours of 8 GPUs at 2 USD would be 160; the plan's own seconds are used."""
    plan = json.loads(rlhf(capsys, "plan", recipe, "--no-lock", "--price", "2", "--format", "json")[1])
    time = plan["time"]
    assert time["price"] == 2.0 and time["cost"] == round(time["seconds"] / 3600 * 2 * 8, 2)
    assert rlhf(capsys, "plan", recipe, "--no-lock", "--price", "-1")[0] == 2


def test_a_model_in_a_directory_needs_no_lock(capsys, recipe, tmp_path):
    """Its config.json alone gives the numbers; qwen2 leaves out what equals its class's default."""
    config = {
        "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 160, "vocab_size": 300, "max_position_embeddings": 1024,
    }  # fmt: skip
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    recipe.write_text(RECIPE.replace("facebook/opt-1.3b", "./mine"))
    plan = json.loads(rlhf(capsys, "plan", recipe, "--no-lock", "--format", "json")[1])
    # 2 x 300 x 64 embeddings (untied), 2 layers of 4096 x 2 + 2048 x 2 + 3 x 10240 + 128 + 128 norms and biases, a norm
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160 + 64 + 2 * 32 + 2 * 64
    assert plan["stages"][0]["memory"]["engines"]["policy"]["parameters"] == 2 * 300 * 64 + 2 * layer + 64


def test_one_part(capsys):
    base = ["plan", "recipes/deepspeed-chat.rlhf", "--no-lock", "--gpu", "a100-80g", "--gpus", "2"]
    shown = {}
    for path in ("ds_config.actor", "ds_config.ppo.actor", "ds_config.sft", "stage.ppo.memory.peak", "target.world"):
        assert main([*base, "--show", path]) == 0
        shown[path] = json.loads(capsys.readouterr().out)
    assert shown["ds_config.actor"] == shown["ds_config.ppo.actor"] and shown["target.world"] == 2
    assert shown["ds_config.sft"]["train_batch_size"] == 128 and shown["stage.ppo.memory.peak"] > 2**30
    for path, said in (("ds_config.acter", "ds_config.actor"), ("stage.ppo.x", "batch"), ("nothing", "stage.sft")):
        assert main([*base, "--show", path]) == 2
        assert said in capsys.readouterr().err
