"""`rlhf bench` and the plan that reads its profile. What it measures is measured in a slow test only."""

from __future__ import annotations

import json

import pytest

from rlhfdsl.cli import bench
from rlhfdsl.cli.main import main
from rlhfdsl.planning.rates import of_profile

PROFILE = {
    "kind": "rlhfdsl hardware profile", "version": 1, "device": "cpu", "gpu": None, "memory": None, "torch": "2.9",
    "threads": 4, "copy_gb": 10.0, "host_gb": 10.0, "link_gb": 2.0, "layer_decode_ms": 0.5, "layer_forward_ms": 0.2,
    "types": {"fp32": {"matmul_tflops": 0.1, "train_tflops": 0.05}},
}  # fmt: skip
RECIPE = """recipe "small" { seed = 3 }
model tiny { arch = llama, layers = 2, hidden = 32, heads = 4, dtype = fp32 }
data pairs { from = "./pairs.jsonl", format = preference }
stage sft { model = model.tiny, data = data.pairs, steps = 100, batch = 4, length = 96, lr = 1e-3 }
"""


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """A recipe and the profile that `rlhf bench` wrote beside it."""
    monkeypatch.setattr(bench, "measure", lambda device, ranks: PROFILE)
    (tmp_path / "small.rlhf").write_text(RECIPE)
    assert main(["bench", "--device", "cpu", "-o", str(tmp_path / "here.json")]) == 0
    said = capsys.readouterr().out
    assert "copy             10.0 GB/s, read and written" in said and "rlhf plan RECIPE --gpu " in said
    return tmp_path


def test_a_plan_with_a_profile(here, capsys):
    arguments = ["plan", str(here / "small.rlhf"), "--no-lock", "--gpu", str(here / "here.json")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    # 50 % of a training step, of which 15 % is no product, and a stage keeps 72 %: 0.5 / 0.852 x 0.72
    speed = "fp32: matmul 0.1 TFLOP/s, of which products of passes reach 42%; memory 10 GB/s (measured, here.json)"
    assert speed in out
    assert main([*arguments, "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["target"]["device"] == "cpu" and plan["time"]["cost"] is None
    # 3 passes of 2 layers that take 0.2 ms each are the floor of so small an update
    assert plan["stages"][0]["time"]["each"]["train"] >= 3 * 2 * 0.2e-3


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "other"}'])
def test_what_is_no_profile(here, capsys, text):
    (here / "here.json").write_text(text)
    assert main(["plan", str(here / "small.rlhf"), "--no-lock", "--gpu", str(here / "here.json")]) == 2
    assert "rlhf bench -o here.json" in capsys.readouterr().err


def test_bad_options(capsys, tmp_path):
    assert main(["bench", "-o", str(tmp_path / "here.txt")]) == 2
    assert "ends in .json" in capsys.readouterr().err


@pytest.mark.slow
def test_this_machine_can_be_measured():
    profile = bench.measure("cpu", 2)
    for dtype in ("fp32", "bf16"):
        rates = of_profile(profile, "here.json", dtype)
        assert rates.matmul > 1e8 and 0 < rates.train <= 1 and rates.copy > 1e8 and rates.link > 1e6
