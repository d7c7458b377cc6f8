"""`rlhf explain`: a value's chain, the table, a code's page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhfdsl.cli.main import main

LAYERS = str(Path(__file__).parents[1] / "corpus" / "ok" / "layers.rlhf")
BAD = str(Path(__file__).parents[1] / "corpus" / "bad" / "E0304-word.rlhf")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["explain", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def facts(capsys, *arguments: str) -> dict:
    code, out, _ = run(capsys, *arguments, "--format", "json")
    data = json.loads(out)
    assert code == 0 and data["format_version"] == "1.0"
    return data


def test_the_chain_of_a_value(capsys):
    options = ("--profile", "debug", "--set", "stage.long.rollout.answer=9")
    code, out, _ = run(capsys, LAYERS, "stage.long.rollout.answer", *options)
    assert code == 0
    assert out.startswith(
        "stage.long.rollout.answer = 9\n\n"
        "  set by  --set                               9\n"
        "  over    the profile, layers.rlhf:46:31      8\n"
        "  over    layers.rlhf:37:22                   let.answer\n"
        "  over    the base, ../parts/base.rlhf:42:47  64\n\n"
        "  longest answer, in tokens\n\n"
        "  type       a whole number from 1 to 1_048_576\n"
    )
    assert "generate_max_len (OpenRLHF)" in out


def test_what_a_value_reads(capsys):
    data = facts(capsys, LAYERS, "stage.long.rollout.answer")
    assert (data["value"], data["affects"]) == ("128", "the result")
    assert [(read["name"], read["value"], read["text"]) for read in data["reads"]] == [
        ("let.answer", "128", "min(let.batch * 4, 128)"),
        ("let.batch", "32", "16 * param.scale"),
        ("param.scale", "2", "2"),
    ]


@pytest.mark.parametrize(
    ("path", "value", "layers"),
    [
        ("stage.sft.lr", "0.001", ["base"]),
        ("stage.sft.eps", "1e-05", ["default"]),
        ("stage.sft.every.log", "5", ["file", "default"]),
        ("stage.ppo.kl.target", "off", ["file", "base", "default"]),
        ("model.m.small.from", '"facebook/opt-125m"', ["file"]),
        ("blend.mine.mix.m.rows", "25%", ["file"]),
        ("stage.sft.model", "model.m.small", ["file", "base"]),
        ("data.rows.rows", "all", ["default"]),
        ("recipe.output", '"runs/layers"', ["default"]),
        ("param.seed", "7", ["file", "file"]),
        ("let.batch", "32", ["file"]),
    ],
)
def test_every_kind_of_value(capsys, path, value, layers):
    data = facts(capsys, LAYERS, path)
    assert [link["layer"] for link in data["chain"]] == layers
    if path != "blend.mine.mix.m.rows":
        assert data["value"] == value


def test_a_given_parameter_comes_first(capsys):
    data = facts(capsys, LAYERS, "param.seed", "-p", "seed=3")
    assert data["value"] == "3" and [link["text"] for link in data["chain"]] == ["3", "7", "42"]


def test_what_a_setting_becomes(capsys):
    assert "optimizer.params.lr of DeepSpeed's configuration" in run(capsys, LAYERS, "stage.sft.lr")[1]


def test_a_block(capsys):
    code, out, _ = run(capsys, LAYERS, "stage.again")
    assert code == 0 and "Supervised fine-tuning" in out and "block stage.again.every" in out
    assert facts(capsys, LAYERS, "stage.long.kl")["type"] == "stage.ppo.kl"


def test_a_broken_recipe_is_explained_as_far_as_it_goes(capsys):
    assert facts(capsys, BAD, "model.tiny.layers")["value"] == "2"
    assert facts(capsys, BAD, "model.tiny.dtype")["value"] == ""


def test_the_table_alone(capsys):
    assert "factor of the KL" in run(capsys, "stage.ppo.kl.coef")[1]
    code, out, _ = run(capsys, "stage.ppo.kl")
    assert code == 0 and "estimator  one of auto, k1, k2, k3" in out


def test_a_code(capsys):
    code, out, _ = run(capsys, "e0301")
    assert code == 0 and out.startswith("# E0301: a block has no such attribute\n") and "axolotl #3546" in out
    assert facts(capsys, "E0712")["page"].startswith("# E0712")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["E0300"], 2, "E0301"),
        (["stage.ppo.kll"], 2, "`stage.ppo.kl`"),
        ([LAYERS], 2, "say what of the recipe"),
        ([LAYERS, "stage.again.lrr"], 1, "`stage.again.lr`"),
        (["nowhere.rlhf", "stage.sft"], 1, "E0891"),
    ],
)
def test_what_there_is_not(capsys, arguments, code, text):
    found, out, err = run(capsys, *arguments)
    assert found == code and out == "" and text in err


def test_a_name_alone_is_led_to_where_it_is(capsys):
    code, _, err = run(capsys, "lr")
    assert code == 2 and "`lr` is not a code, a block or an attribute; did you mean `lora.lr`, " in err
