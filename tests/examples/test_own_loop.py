"""The example with a loop of its own learns, and what it may not open is said."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from small import one_rank

from rlhfdsl.api import open_stage
from rlhfdsl.language import UserError

FOLDER = Path(__file__).parents[2] / "examples" / "own-loop"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    one_rank()
    shutil.copytree(FOLDER, tmp_path / "own-loop")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "own-loop"


def test_it_learns_and_saves_its_policy(folder, capsys):
    spec = importlib.util.spec_from_file_location("own_loop", folder / "own_loop.py")
    own_loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own_loop)
    scores = own_loop.main(["--rollouts", "11", "--output", "out"])
    assert len(scores) == 11 and scores[0] < 0.15 and sum(scores[-3:]) / 3 > 0.17
    assert len(capsys.readouterr().out.splitlines()) >= 11
    config = json.loads(Path("out/policy/config.json").read_text())
    assert config["model_type"] == "llama" and Path("out/policy/model.safetensors").exists()


def test_a_loop_that_does_what_a_run_does_has_its_numbers(folder):
    """Two rollouts of the same recipe, the second time with the scorer of the recipe in place of the loop's."""
    runs = []
    for own in (True, False):
        stage = open_stage(folder / "own.rlhf", "stage.ppo", params={"rollouts": "2"}, output="again")
        if own:
            stage.engines.reward = stage.reward(lambda prompts, answers: [
                sum("a" <= c <= "z" for c in answer) / max(len(answer), 1) for answer in answers
            ])  # fmt: skip
        trainer = stage.trainer()
        scores = []
        for rollout in range(2):
            experience, metrics = trainer.generate_experience(*stage.prompts(rollout))
            scores.append((metrics["score"], trainer.train_step(experience)["policy_loss"]))
        runs.append(scores)
    assert runs[0] == runs[1]


def test_what_cannot_be_opened_is_said(folder):
    with pytest.raises(UserError, match="no stage `stage.sft`") as raised:
        open_stage(folder / "own.rlhf", "stage.sft")
    assert raised.value.help == "there is stage.ppo"
    with pytest.raises(UserError, match="(?s)has no plan.*E0307"):
        open_stage(folder / "own.rlhf", "stage.ppo", sets=["stage.ppo.rollout.batch=0"])
