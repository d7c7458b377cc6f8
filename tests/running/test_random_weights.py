"""A stage of `rlhf bench truth`, whose models are made where others are loaded."""

import json

import pytest

from rlhfdsl.cli import truth
from rlhfdsl.cli.main import main
from rlhfdsl.models import loading, quantized
from rlhfdsl.running.truth import measure
from rlhfdsl.training import context
from rlhfdsl.training.onpolicy import OnPolicy


def spread(module):
    """A model whose every matrix was drawn, and none left as its memory was; adapters begin as 0."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1 and parameter.is_floating_point() and ".lora_B." not in name:
            assert 0.005 < parameter.std() < 0.3, name
    for layer in quantized.layers(module).values():
        assert 0.015 < quantized.read_back(layer).std() < 0.025  # Llama draws with 0.02
    return module


@pytest.mark.parametrize("case", truth.TINY[2:], ids=lambda case: case.base)
def test_a_stage_on_random_weights(monkeypatch, capsys, case):
    """PPO, whose engines are of every kind that loading makes, in this process."""
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(loading, name, getattr(loading, name))  # what `measure` changes is changed back
    for name in ("sample", "train_step", "check"):
        monkeypatch.setattr(OnPolicy, name, getattr(OnPolicy, name))
    monkeypatch.setattr(truth, "TINY", (case,))
    made, seen = loading.load_model, {}
    monkeypatch.setattr(context, "load_model", lambda *args, **options: spread(made(*args, **options)))

    def child(folder, stage, device, args):
        plan = json.loads((folder / "plan.json").read_text())
        seen[stage] = measure(plan, stage, folder, args.updates, 60.0)
        return seen[stage]

    monkeypatch.setattr(truth, "_child", child)
    assert main(["bench", "truth", "--only", "tiny", "--device", "cpu", "--updates", "2"]) == 0
    (found,) = seen.values()
    assert case.name in capsys.readouterr().out
    assert found["updates"] == 2 and found["seconds"].keys() == {"generate", "score", "train"}
