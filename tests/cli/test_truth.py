"""`rlhf bench truth`: its configurations are recipes that plan, and one that fails is a row beside the others."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from rlhfdsl.cli import truth
from rlhfdsl.cli.main import main
from rlhfdsl.planning import hardware


def as_planned(folder, stage, args):
    """A process that measured exactly what was predicted."""
    (planned,) = json.loads((folder / "plan.json").read_text())["stages"]
    phases = planned["memory"]["phases"]
    return {
        "peak": planned["memory"]["peak"], "peaks": {name: phase["peak"] for name, phase in phases.items()},
        "start": 0, "seconds": planned["time"]["each"], "updates": args.updates,
    }  # fmt: skip


def test_the_table(tmp_path, monkeypatch, capsys):
    def child(folder, stage, device, args):
        return {"error": "out of memory"} if "reward" in stage else as_planned(folder, stage, args)

    monkeypatch.setattr(truth, "_child", child)
    out = tmp_path / "truth.md"
    arguments = ["--only", "125m-zero1", "--gpu", "h100-80g", "--device", "cuda", "-o", str(out), "--updates", "2"]
    assert main(["bench", "truth", *arguments]) == 0
    lines = out.read_text().splitlines()
    assert re.match(r"\| sft-125m-zero1 \| (\S+) \| \1 \| \+0% \| ", lines[2])  # "measured" is as planned here
    assert lines[3] == "| reward-125m-zero1 | out of memory | - | - | - | - | - |"
    assert lines[4].startswith("| ppo-125m+125m-zero1 | ") and any("generate" in line for line in lines[5:])
    found = json.loads(out.with_suffix(".json").read_text())
    assert [one["name"] for one in found][1] == "reward-125m-zero1" and found[1]["predicted"] > 2**30
    assert out.read_text() == capsys.readouterr().out


def test_every_row_fills_its_length(monkeypatch, capsys):
    """Facts of the edges: nothing is dropped, and each row is as long as the stage allows."""
    seen = {}

    def child(folder, stage, device, args):
        (planned,) = json.loads((folder / "plan.json").read_text())["stages"]
        seen[stage] = planned["edges"]["train"]
        return {"error": "not run"}

    monkeypatch.setattr(truth, "_child", child)
    assert main(["bench", "truth", "--only", "tiny", "--device", "cpu"]) == 0
    for edge in seen.values():
        assert edge["facts"]["used"] == edge["facts"]["rows"] and edge["facts"]["lengths"]["mean"] == edge["length"]


def test_names(capsys):
    assert main(["bench", "truth", "--list", "--device", "cuda"]) == 0
    names = capsys.readouterr().out.split()
    assert len(set(names)) == len(names) >= 8
    mixed = {name for name in names if "mixed" in name}
    assert mixed and {name.removesuffix("-padded") for name in mixed} < mixed  # each with its padding too
    assert main(["bench", "truth", "--only", "nothing", "--device", "cuda"]) == 2


def test_two_ranks_are_planned_as_two(tmp_path, monkeypatch, capsys):
    """With the stages of ZeRO and the shards that one rank has no use for."""
    seen = {}

    def child(folder, stage, device, args):
        plan = json.loads((folder / "plan.json").read_text())
        seen[len(seen)] = plan["target"]["gpus"], plan["stages"][0]["engines"]["actor"]
        return as_planned(folder, stage, args)

    monkeypatch.setattr(truth, "_child", child)
    only = ["--only", "1.3b+350m-zero1-batch128", "zero2-batch128", "zero3-batch128"]
    assert main(["bench", "ppo", "--ranks", "2", "--gpu", "h100-80g", "--device", "cuda", *only]) == 0
    found = [(gpus, actor["zero"], actor["rollout"]["tensor"]) for gpus, actor in seen.values()]
    assert found == [(2, 1, 1), (2, 2, 1), (2, 3, 1), (2, 3, 2)]
    assert "| ppo-1.3b+350m-zero3-batch128-tensor2-ranks2 | " in capsys.readouterr().out


def test_more_ranks_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(truth.hardware, "detect", lambda: replace(hardware.CPU, device="cuda", gpus=2))
    assert main(["bench", "ppo", "--ranks", "3"]) == 2
    assert "--ranks 3: this machine has 2 GPUs" in capsys.readouterr().err
    assert main(["bench", "ppo", "--ranks", "-2"]) == 2
    assert "takes a number from 1, not `-2`" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_on_the_cpu(tmp_path, ranks):
    out = tmp_path / "truth.md"
    arguments = ["--device", "cpu", "-o", str(out), "--updates", "3", "--ranks", str(ranks)]
    assert main(["bench", "truth", *arguments]) == 0
    found = json.loads(out.with_suffix(".json").read_text())
    assert [one["measured"]["updates"] for one in found] == [3] * len(truth.TINY)
