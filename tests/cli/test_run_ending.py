"""What `rlhf run` says when all is done."""

from rlhfdsl.cli.run import left_behind


def plan(*stages):
    made = [{"address": f"stage.{name}", "artifacts": artifacts} for name, artifacts in stages]
    return {"recipe": {"output": "runs/mine"}, "stages": made}


def test_a_finished_run_names_every_model_and_how_to_talk_to_it():
    reward = ("reward", {"reward": "runs/mine/reward/model"})
    ppo = ("ppo", {"policy": "runs/mine/ppo/actor", "ema": "runs/mine/ppo/actor-ema"})
    assert left_behind(plan(reward, ppo)) == [
        "models, in Hugging Face form:",
        "  reward  reward  runs/mine/reward/model",
        "  ppo     policy  runs/mine/ppo/actor",
        "  ppo     ema     runs/mine/ppo/actor-ema",
        "curves and samples: rlhf report runs/mine",
        "talk to it: rlhf chat runs/mine",
    ]
    assert not any("chat" in line for line in left_behind(plan(reward)))  # a reward model writes no text
