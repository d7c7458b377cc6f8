"""A stage of `rlhf bench truth`, whose models are made where others are loaded."""

import json

from rlhfdsl.cli import truth
from rlhfdsl.cli.main import main
from rlhfdsl.models import loading
from rlhfdsl.running.truth import measure
from rlhfdsl.training.onpolicy import OnPolicy


def test_a_stage_on_random_weights(monkeypatch):
    """PPO, whose engines are of every kind that loading makes, in this process."""
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(loading, name, getattr(loading, name))  # what `measure` changes is changed back
    for name in ("sample", "train_step", "check"):
        monkeypatch.setattr(OnPolicy, name, getattr(OnPolicy, name))
    seen = {}

    def child(folder, stage, args):
        if "ppo" not in stage:
            return {"error": "not run"}
        plan = json.loads((folder / "plan.json").read_text())
        seen[stage] = measure(plan, stage, folder, args.updates, 60.0)
        return seen[stage]

    monkeypatch.setattr(truth, "_child", child)
    assert main(["bench", "truth", "--only", "tiny", "--device", "cpu", "--updates", "2"]) == 0
    (found,) = seen.values()
    assert found["updates"] == 2 and found["seconds"].keys() == {"generate", "score", "train"}
