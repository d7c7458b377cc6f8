"""The small pipeline on a CUDA device, beside the same on the CPU. One command: `make test-gpu`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import RECIPE, write_recipe

from rlhfdsl.running.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no CUDA device"),
]


def run(folder: Path, *arguments: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "rlhfdsl", "run", "small.rlhf", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def events(folder: Path, run: str, stage: str, kind: str) -> list[dict]:
    return [e for e in read_metrics(folder / "runs" / run / stage / "metrics.jsonl") if e["event"] == kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    write_recipe(folder)
    run(folder, "--gpu", "cpu", "--set", 'recipe.output="runs/cpu"')
    return folder


def test_fp32_learns_as_on_the_cpu(folder):
    run(folder, "--gpus", "1", "--set", 'recipe.output="runs/cuda"')
    for stage, names in {
        "sft": ("loss", "grad_norm"),
        "reward": ("loss", "margin"),
        "ppo": ("score", "kl", "reward", "length", "policy_loss", "value_loss", "entropy", "ptx_loss"),
    }.items():
        cpu, cuda = events(folder, "cpu", stage, "update"), events(folder, "cuda", stage, "update")
        assert len(cpu) == len(cuda)
        for a, b in zip(cpu, cuda, strict=True):
            assert {n: b[n] for n in names} == pytest.approx({n: a[n] for n in names}, abs=1e-2, rel=1e-2), stage


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_holds_the_invariants_and_stays_near(folder, zero):
    output = f"runs/bf16-{zero}"
    run(
        folder, "--gpus", "1", "--set", f'recipe.output="{output}"',
        "--set", "model.tiny.dtype=bf16", "--set", f"parallel.shard.zero={zero}",
    )  # fmt: skip
    (found,) = events(folder, f"bf16-{zero}", "ppo", "invariants")
    assert found["invariant_ratio"] < 0.02 and found["invariant_reference"] < 0.02
    cpu, cuda = events(folder, "cpu", "sft", "update"), events(folder, f"bf16-{zero}", "sft", "update")
    assert [e["loss"] for e in cuda] == pytest.approx([e["loss"] for e in cpu], rel=0.02)
    for event in events(folder, f"bf16-{zero}", "ppo", "update"):
        assert event["parity"] < 0.05


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_ppo_learns_beside_a_base_in_4_bits(folder, engine):
    text = RECIPE.replace("hidden = 32", "hidden = 128, intermediate = 256")
    adapted = "ema = 0.9, parallel = parallel.shard\n    lora { rank = 4, base = nf4 }\n  }"
    text = text.replace("ema = 0.9, parallel = parallel.shard }", adapted)
    (folder / "small.rlhf").write_text(text)
    run(
        folder, "--gpus", "1", "--set", f'recipe.output="runs/packed-{engine}"', "--set", "model.tiny.dtype=bf16",
        "--set", "parallel.shard.zero=1", "--set", f"stage.ppo.rollout.engine={engine}",
        "--set", "stage.ppo.actor.lr=1e-2",
    )  # fmt: skip
    (found,) = events(folder, f"packed-{engine}", "ppo", "invariants")
    assert found["invariant_ratio"] < 0.02 and found["invariant_reference"] < 0.02
    (chosen,) = events(folder, f"packed-{engine}", "ppo", "rollout")
    assert chosen["engine"] == engine
    updates = events(folder, f"packed-{engine}", "ppo", "update")
    assert all(event["parity"] < 0.05 for event in updates) and updates[-1]["kl"] != updates[0]["kl"]
    assert (folder / "runs" / f"packed-{engine}" / "ppo" / "actor-adapter" / "adapter_model.safetensors").exists()
