"""Weights in .bin form: the same model as from safetensors, whatever torch wrote them with."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import scratch, spec
from transformers import LlamaForCausalLM

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.models.exhausted import out_of_memory
from rlhfdsl.models.facts import model_facts
from rlhfdsl.models.loading import load_model
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


def more_than_there_is(*_: object, **__: object) -> torch.Tensor:
    return torch.empty(1 << 50)


def raising(error: Exception):
    def function(*_: object, **__: object):
        raise error

    return function


@pytest.mark.parametrize(
    "fails",
    [
        more_than_there_is, raising(torch.OutOfMemoryError("CUDA out of memory.")), raising(MemoryError()),
        raising(OSError(errno.ENOMEM, "Cannot allocate memory")),
    ],
)  # fmt: skip
def test_memory_that_runs_out_is_no_fault_of_the_model(tmp_path, monkeypatch, fails):
    scratch(tmp_path / "model")
    monkeypatch.setattr(LlamaForCausalLM, "_load_pretrained_model", fails)
    with pytest.raises((RuntimeError, MemoryError, OSError)) as found:
        load_model(spec(), str(tmp_path / "model"), revision=None, seed=1)
    assert out_of_memory(found.value) and not isinstance(found.value, UserError)


def test_weights_of_another_shape_are_a_fault_of_the_model(tmp_path):
    scratch(tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(UserError) as found:
        load_model(spec(), str(tmp_path / "model"), revision=None, seed=1)
    assert found.value.code == "E0821" and "config.json" in found.value.help
    assert "`model.embed_tokens.weight` of" in found.value.message
    assert "has the shape [259, 32], and its architecture [259, 64]" in found.value.message
