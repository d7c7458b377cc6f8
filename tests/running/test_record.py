"""A run's record in a bundle, and another run held against it."""

import json
from pathlib import Path

import pytest
from command import rlhf
from pipeline import plan

from rlhfdsl.planning import archive
from rlhfdsl.planning.keys import keys
from rlhfdsl.running import weights


def stage(folder: Path, key: str, loss: float = 1.0, content: bytes = b"weights", torch: str = "2.0") -> None:
    """A finished stage of one update."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(content)
    files = weights.hashes({"artifacts": {"policy": "x/model"}}, folder)
    result = {"key": key, "files": files, "versions": {"torch": torch}, "base": "/home/somebody/private"}
    (folder / "result.json").write_text(json.dumps(result | {"target": {"world": 1, "device": "cpu", "gpu": None}}))
    event = {"event": "update", "time": 1.0, "update": 1, "of": 1, "loss": loss, "tokens": 9}
    (folder / "metrics.jsonl").write_text(json.dumps(event) + "\n")


@pytest.fixture
def bundle(capsys, project) -> Path:
    """A bundle with the record of a run whose first stage is finished."""
    made = keys(plan(project / "small.rlhf"))
    stage(project / "runs/small/sft", made["stage.sft"])
    code, _, err = rlhf(capsys, "bundle", "small.rlhf", "--gpu", "cpu", "--run", "runs/small")
    assert code == 0, err
    return project / "small.rlhfb"


def test_a_run_against_the_record_of_another(capsys, bundle, project):
    held = archive.unpack(bundle.read_bytes(), "x")
    record = [name for name in held.entries if name.startswith("record/")]
    assert sorted(record) == ["record/sft/metrics.jsonl", "record/sft/result.json"]
    assert b"somebody" not in bundle.read_bytes()  # where the maker's files lay
    key = json.loads(held.entries["record/sft/result.json"])["key"]
    code, out, _ = rlhf(capsys, "verify", "runs/small", "--against", bundle)
    assert code == 0 and "the same bits of the weights" in out
    stage(project / "other/sft", key, content=b"Weights", torch="2.1")
    code, out, _ = rlhf(capsys, "verify", "other", "--against", bundle, "--format", "json")
    (found,) = json.loads(out)
    assert code == 1 and found["level"] == "metrics" and "model/model.safetensors is sha256:" in found["first"]
    assert found["notes"] == ["torch 2.0 there, 2.1 here"]
    assert rlhf(capsys, "verify", "other", "--against", bundle, "--level", "metrics")[0] == 0
    stage(project / "third/sft", key, loss=2.0)
    code, out, _ = rlhf(capsys, "verify", "third", "--against", bundle)
    assert code == 1 and "update 1: loss 1.0 then, 2.0 now" in out


def test_what_cannot_be_compared(capsys, bundle, project):
    stage(project / "other/sft", "sha256:other")
    assert "made by another plan" in rlhf(capsys, "verify", "other", "--against", bundle)[2]
    assert "no finished stage in common" in rlhf(capsys, "verify", "nowhere", "--against", bundle)[2]
    assert rlhf(capsys, "verify", "other", "--against", bundle, "--stage", "sft")[0] == 2
    assert rlhf(capsys, "bundle", "small.rlhf", "--gpu", "cpu", "-o", "bare.rlhfb")[0] == 0
    assert "has no record" in rlhf(capsys, "verify", "runs/small", "--against", "bare.rlhfb")[2]
    code, _, err = rlhf(capsys, "bundle", "small.rlhf", "--gpu", "cpu", "--run", "other")
    assert code == 1 and "E0756" in err
    held = archive.unpack(bundle.read_bytes(), "x")
    for broken in (b"[]", b"{}", b"{", b'{"key": 1, "files": {"a": 1}, "versions": {}}'):
        entries = {**held.entries, "record/sft/result.json": broken}
        bundle.write_bytes(archive.pack(held.kind, held.generator, held.about, entries))
        code, _, err = rlhf(capsys, "verify", "runs/small", "--against", bundle)
        assert code == 1 and ("E0750" in err or "another plan" in err), err


def test_metrics_that_are_damaged_or_gone_make_no_record(capsys, bundle, project):
    metrics = project / "runs/small/sft/metrics.jsonl"
    again = ("bundle", "small.rlhf", "--gpu", "cpu", "--run", "runs/small", "-o", "again.rlhfb")
    metrics.write_text("{\n")
    code, _, err = rlhf(capsys, *again)
    assert code == 1 and "E0720" in err and "runs/small/sft/metrics.jsonl:1" in err
    code, _, err = rlhf(capsys, "verify", "runs/small", "--against", bundle)
    assert code == 1 and "E0720" in err and "runs/small/sft/metrics.jsonl:1" in err
    metrics.unlink()
    code, _, err = rlhf(capsys, *again)
    assert (code, err) == (2, "rlhf: runs/small/sft/metrics.jsonl: No such file or directory\n")
    assert not (project / "again.rlhfb").exists()
