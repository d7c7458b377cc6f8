"""The example with a loop of its own learns, and what it may not open is said."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import one_rank

from rlhfdsl.api import open_stage
from rlhfdsl.data.edge import load_edge
from rlhfdsl.engines.rollout.cache import RowLayer
from rlhfdsl.language import UserError
from rlhfdsl.training import context

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
    assert own_loop.main(["--rollouts", "1", "--output", "out"])  # in place of the first one
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
    (folder / "file").touch()
    with pytest.raises(UserError, match="`own-loop/file` is a file"):
        open_stage(folder / "own.rlhf", "stage.ppo", output=(folder / "file").relative_to(Path.cwd()))
    with pytest.raises(UserError, match="`sets` is one text") as raised:
        open_stage(folder / "own.rlhf", "stage.ppo", sets="stage.ppo.rollouts=2")
    assert raised.value.__notes__ == ["help: it takes a list of them: sets=['stage.ppo.rollouts=2']"]


def test_what_a_loop_hands_over_is_held_against_the_stage(folder):
    stage = open_stage(folder / "own.rlhf", "stage.ppo", params={"rollouts": "1"}, output="out")
    engines = stage.engines
    with pytest.raises(AttributeError):
        engines.rewrad = stage.reward(letters)
    engines.reward = letters
    refused(r"the reward `letters` does not take answers", stage.trainer)
    engines.reward = stage.reward(letters)
    refused("PPO has no critic", stage.trainer, replace(engines, critic=None))
    trainer = stage.trainer()
    refused("`save` takes an engine, not a str", stage.save, "actor", "policy")
    Path("out/notes").mkdir()
    Path("out/notes/mine.txt").touch()
    for name in ("", ".", "..", "../own-loop", str(folder)):
        refused("`save` writes into `out`, and `.*` is not a name in it", stage.save, engines.actor, name)
    refused("`out/notes` is there, and it is not a model", stage.save, engines.actor, "notes")
    assert Path("out/notes/mine.txt").exists() and (folder / "own.rlhf").exists()

    prompts, rows = stage.prompts(0)
    generate = trainer.generate_experience
    refused("no prompt to answer", generate, [], [])
    refused("32 prompts and 5 numbers", generate, prompts, rows[:5])
    refused("prompt 0 is a str", generate, [prompt.text for prompt in prompts], rows)
    refused(r"prompt 31 has 65 tokens, and `rollout { prompt = 64 }`", generate,
            [*prompts[:31], replace(prompts[0], ids=[10] * 65)], rows)  # fmt: skip

    both = generate(prompts, rows)
    experience = both[0]
    refused("takes an experience, not a tuple", trainer.train_step, both)
    refused("24 answers on this rank are not whole minibatches of 32", trainer.train_step, experience.rows(0, 24))
    refused(r"`advantages` of the experience is \[32\], not \[32, 12\]", trainer.train_step,
            replace(experience, advantages=experience.scores))  # fmt: skip
    refused("`returns` of the experience is NoneType", trainer.train_step, replace(experience, returns=None))
    refused(r"`log_probs` of the experience is \[5, 12\]", trainer.train_step,
            replace(experience, log_probs=experience.log_probs[:5]))  # fmt: skip
    refused("mixes no pretraining rows in", trainer.train_step, experience, [[], []])
    stage.settings["ptx"] = {"weight": 1.0, "batch": 4}
    refused("rows for 1 updates, and this rollout has 2", trainer.train_step, experience, [[]])


def letters(prompts: list[str], answers: list[str]) -> list[float]:
    return [float(len(answer)) for answer in answers]


def refused(message: str, call: Callable, *arguments: object) -> None:
    with pytest.raises(UserError, match=message) as raised:
        call(*arguments)
    assert raised.value.code == "E0784"


@pytest.fixture
def wrong_position(monkeypatch):
    """Each token of the captured step's cache overwrites the one before it."""
    right = RowLayer.decode
    monkeypatch.setattr(RowLayer, "decode", lambda layer, write: right(layer, (write - 1).clamp(min=0)))


def test_a_wrong_rollout_engine_is_replaced_as_in_a_run(folder, wrong_position, caplog):
    stage = open_stage(folder / "own.rlhf", "stage.ppo", sets=["stage.ppo.rollout.engine=graph"], output="out")
    trainer = stage.trainer()
    assert trainer.engines.actor.sampler.name == "eager"
    assert "`graph` does not sample from the policy that is trained" in trainer.engines.actor.rollout_reason
    assert [record.getMessage() for record in caplog.records if record.name == "rlhfdsl.api"] == [
        f"rollout by eager: {trainer.engines.actor.rollout_reason}"
    ]


def test_the_average_of_the_recipe_follows_the_actor(folder):
    sets = ["stage.ppo.actor.ema=0.75", "stage.ppo.update.epochs=1"]
    stage = open_stage(folder / "own.rlhf", "stage.ppo", sets=sets, output="out")
    trainer = stage.trainer()
    weight = next(trainer.engines.actor.module.parameters())
    start = weight.detach().clone()
    experience, _ = trainer.generate_experience(*stage.prompts(0))
    trainer.train_step(experience)  # one update
    expected = 0.75 * start + 0.25 * weight.detach()
    assert not torch.allclose(start, weight, atol=1e-4)
    trainer.average.write()
    torch.testing.assert_close(weight.detach(), expected)


def test_the_data_is_read_once(folder, monkeypatch):
    read = []
    monkeypatch.setattr(context, "load_edge", lambda *edge: read.append(edge) or load_edge(*edge))
    stage = open_stage(folder / "own.rlhf", "stage.ppo", output="out")
    both = stage.prompts(0), stage.prompts(1)
    assert len(read) == 1 and both[0] != both[1]
