"""Weights in .bin form: the same model as from safetensors, whatever torch wrote them with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import scratch, spec

from rlhfdsl.models.loading import load_model
from rlhfdsl.models.tokenizers import model_facts
from rlhfdsl.planning.checkpoints import numbers, pickles, weights

ENTRY = {"from": {"path": "model"}, "arch": None, "tokenizer": "bytes", "template": "auto"}


def pickle(folder: Path, form: str) -> list[str]:
    """Turn the safetensors of a model into `pytorch_model.bin` or two parts of it; returns the files' names."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    if form != "parts":
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
        return ["pytorch_model.bin"]
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(sorted(tensors))}
    for part in set(places.values()):
        torch.save({name: tensors[name] for name in tensors if places[name] == part}, folder / part)
    index = {"metadata": {"total_size": 4 * sum(t.numel() for t in tensors.values())}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return sorted(set(places.values()))


@pytest.mark.parametrize("form", ["zip", "legacy", "parts"])
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_pickled_weights_are_those_of_the_safetensors(tmp_path, form, role):
    folder = tmp_path / "model"
    scratch(folder)
    entry = {**ENTRY, "facts": model_facts(ENTRY, tmp_path)}
    assert pickles(entry) == []
    expected = load_model(spec(role), str(folder), revision=None, seed=1).state_dict()
    names = pickle(folder, form)
    facts = model_facts(ENTRY, tmp_path)
    assert pickles({**ENTRY, "facts": facts}) == names
    assert all(facts["files"][f"model/{name}"]["sha256"].startswith("sha256:") for name in names)
    # Planning opens no pickle, so the count is left to the configuration; both have the shape.
    assert facts["parameters"] is None and numbers(folder)["parameters"] is None
    assert facts["hidden"] == entry["facts"]["hidden"]
    found = load_model(spec(role), str(folder), revision=None, seed=1, pickles=names).state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_safetensors_come_first():
    safe = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    bins = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    assert weights([*bins, *safe, "config.json"]) == safe
    assert weights([*bins, "adapter_model.safetensors", "onnx/model.safetensors", "training_args.bin"]) == bins
    assert weights(["optimizer.bin", "adapter_model.bin", "old/pytorch_model.bin"]) == []
