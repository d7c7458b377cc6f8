"""Numbers of a directory with the standard library, against the model that transformers wrote there."""

import json

import pytest
from shapes import config_of, tiny

from rlhfdsl.planning import checkpoints
from rlhfdsl.planning.catalog import parameters, shape
from rlhfdsl.planning.families import FAMILIES, GATED


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_numbers_of_a_saved_model(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    wanted = tiny(kind) | {"kv_heads": 2 if kind in GATED else 4, "tied": kind != "gpt_neox"}
    model = AutoModelForCausalLM.from_config(config_of(wanted))
    model.save_pretrained(tmp_path)
    found = checkpoints.numbers(tmp_path)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert parameters(shape(found)) == found["parameters"]
    names = [name for name in wanted if name != "context" or kind != "bloom"]
    assert {name: found[name] for name in names} == {name: wanted[name] for name in names}


def test_nothing_to_read(tmp_path):
    assert checkpoints.numbers(tmp_path) is None
    (tmp_path / "config.json").write_text("[]")
    assert checkpoints.numbers(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert checkpoints.numbers(tmp_path) is None


def test_a_broken_header_counts_nothing(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert checkpoints.parameters(tmp_path, tied=True) is None
