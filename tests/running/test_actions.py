"""What a run does with each stage: cached, resumed, run again or refused, with the reason; nothing is lost."""

import json
import shutil
from pathlib import Path

import pytest
from pipeline import plan

from rlhfdsl.engines.checkpoint import store
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import keys
from rlhfdsl.running import schedule


def finish(made: dict, address: str = "stage.sft") -> Path:
    """Leave a finished stage as a run of the plan does."""
    stage = stage_of(made, address)
    for path in stage["artifacts"].values():
        Path(path).mkdir(parents=True)
    result = {**keys.stamp(made, stage), "evaluation": {}, "seconds": 1.0}
    (Path(stage["output"]) / schedule.RESULT).write_text(json.dumps(result))
    return Path(stage["output"])


def checkpoint(made: dict, update: int, address: str = "stage.sft", continued: dict | None = None) -> Path:
    """Leave a checkpoint as a run of the plan does that was broken off."""
    stage = stage_of(made, address)
    root = schedule.partial_of(Path(stage["output"])) / store.FOLDER
    partial = store.begin(root, update)
    files = store.Files(partial)
    files.make(partial)
    files.write(partial / "rank-0.pt", lambda file: file.write(b"state"))
    manifest = {**keys.stamp(made, stage), "update": update, "of": 6, "continued": continued or {}}
    return store.commit(partial, manifest, files.entries)


def stage_of(made: dict, address: str) -> dict:
    return next(stage for stage in made["stages"] if stage["address"] == address)


def decided(made: dict, address: str = "stage.sft", **options) -> schedule.Action:
    stage = stage_of(made, address)
    return schedule.decide(made, stage, keys.stamp(made, stage), **options)


def settled(made: dict, address: str = "stage.sft") -> Path | None:
    return schedule.settle(stage_of(made, address), decided(made, address, thorough=True))


@pytest.fixture
def recipe(project) -> Path:
    return project / "small.rlhf"


def test_a_stage_is_cached_until_something_that_decides_changes(recipe):
    made = plan(recipe)
    assert [(a.do, a.reason) for a in schedule.actions(made)] == [("run", "it has not run yet")] * len(made["stages"])
    for stage in made["stages"]:
        finish(made, stage["address"])
    assert {a.do for a in schedule.actions(made)} == {"cached"}
    recipe.write_text(recipe.read_text().replace("every { log = 1 }", "every { log = 2 }  # a comment"))
    assert {a.do for a in schedule.actions(plan(recipe))} == {"cached"}
    found = {a.stage: (a.do, a.reason) for a in schedule.actions(plan(recipe, "stage.reward.lr=2e-3"))}
    assert found["stage.sft"][0] == "cached"
    assert found["stage.reward"] == ("rerun", "stage.reward.lr: 0.001, now 0.002")
    assert found["stage.ppo"] == ("rerun", "stage.reward changed")


@pytest.mark.parametrize(
    ("setting", "stage", "reason"),
    [
        ("stage.ppo.kl.coef=0.5", "stage.ppo", "stage.ppo.kl.coef: 0.05, now 0.5"),
        ("stage.ppo.actor.lr=2e-3", "stage.ppo", "stage.ppo.actor.lr: 0.001, now 0.002"),
        ("stage.ppo.critic.grad_clip=0.5", "stage.ppo", "stage.ppo.critic.grad_clip: 1.0, now 0.5"),
        ("stage.sft.weight_decay=0.1", "stage.sft", "stage.sft.weight_decay: 0.0, now 0.1"),
        ("stage.sft.schedule=linear", "stage.sft", "stage.sft.schedule: cosine, now linear"),
        ("model.tiny.hidden=64", "stage.sft", "model.tiny.hidden: 32, now 64"),
        ("recipe.seed=4", "stage.sft", "recipe.seed changed"),
    ],
)
def test_the_reason_names_the_setting(recipe, setting, stage, reason):
    finish(plan(recipe), stage)
    action = decided(plan(recipe, setting), stage)
    assert action.do == "rerun" and reason in action.reason


def test_data_that_changed_is_a_reason(recipe):
    finish(plan(recipe))
    rows = recipe.parent / "pairs.jsonl"
    rows.write_text(rows.read_text().replace("is a friend", "is a foe"))
    assert decided(plan(recipe)).do == "rerun" and "the rows of `train` changed" in decided(plan(recipe)).reason


def test_a_lost_model_is_a_reason(recipe):
    made = plan(recipe)
    shutil.rmtree(finish(made) / "model")
    assert "a model that it made is gone" in decided(made).reason


def test_it_goes_on_from_the_newest_whole_checkpoint(recipe):
    made = plan(recipe)
    for update in (2, 4):
        newest = checkpoint(made, update)
    assert decided(made).reason == "from a checkpoint after 4 of 6 updates"
    (newest / "rank-0.pt").write_bytes(b"stale")
    assert decided(made).update == 4  # a plan looks at sizes
    action = decided(made, thorough=True)
    assert action.update == 2 and action.lost == ("00000004/rank-0.pt is not what was written",)
    assert settled(made) == newest.with_name("00000002") and not newest.exists()


def test_going_back_drops_what_came_later(recipe):
    made = plan(recipe)
    partial = checkpoint(made, 2, continued={"metrics.jsonl": 8, "samples.jsonl": 0}).parent.parent
    (partial / "metrics.jsonl").write_text("before.\nafter.\n")
    (partial / "samples.jsonl").write_text("after.\n")
    (partial / store.STOP).touch()
    settled(made)
    assert (partial / "metrics.jsonl").read_text() == "before.\n" and (partial / "samples.jsonl").read_text() == ""
    assert not (partial / store.STOP).exists()


def test_another_layout_is_refused_with_the_reason_and_anew_leaves_it_aside(recipe):
    checkpoint(plan(recipe), 4)
    for sets, gpus, words in (
        ((), 2, "it is of 1 rank, and the plan has 2 ranks"),
        (("parallel.shard.zero=2",), 1, "`policy` had zero = 0, and now has 2"),
    ):
        other = plan(recipe, *sets, gpus=gpus)
        action = decided(other)
        assert action.do == "refused" and action.reason.endswith(f"this plan: after 4 of 6, {words}")
        with pytest.raises(UserError) as refused:
            settled(other)
        assert refused.value.code == "E0793" and f"after 4 of 6, {words}" in refused.value.message
    assert decided(plan(recipe, "parallel.shard.micro=1")).do == "resume"
    schedule.settle(stage_of(other, "stage.sft"), decided(other, anew=True))
    assert decided(plan(recipe)).update == 4  # still there
    assert settled(plan(recipe)).name == "00000004"


def test_what_is_replaced_is_kept_and_taken_again(recipe):
    first, second = plan(recipe), plan(recipe, "stage.sft.lr=2e-3")
    finish(first)
    assert settled(second) is None and decided(second).do == "run"
    finish(second)
    assert decided(first).do == "cached" and settled(first) is None
    assert decided(second).do == "cached"
    checkpoint(third := plan(recipe, "stage.sft.lr=5e-3"), 2)
    settled(fourth := plan(recipe, "stage.sft.lr=6e-3"))
    assert decided(fourth).do == "run" and decided(third).update == 2 and decided(first).do == "cached"
