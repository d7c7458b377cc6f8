"""The whole pipeline at ZeRO 0, 2 and 3, on one rank and on two: the same numbers."""

import atexit
import json
import shutil
import subprocess
import sys
from base64 import urlsafe_b64encode
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from ahead import ENVIRONMENT, begun
from peft import PeftModel
from pipeline import RECIPE, write_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhfdsl.engines.ports import free_port
from rlhfdsl.running.metrics import read_metrics

ZERO = ("0", "2", "3")
# With this seed a quarter of the later answers end early, so that the ranks have unequally many tokens.
ADAPTED = RECIPE.replace("seed     = 3", "seed     = 9") + """
stage ppo adapted {
  data     = blend.all
  rollouts = 3
  actor {
    model = stage.sft, lr = 1e-2, ema = 0.9, parallel = parallel.shard
    lora { rank = 4, alpha = 8 }
  }
  critic {
    model = stage.reward, lr = 1e-3, parallel = parallel.shard, warmup_rollouts = 1
    lora { rank = 2, targets = attention, lr = 1e-2 }
  }
  reward { model = stage.reward }
  rollout { batch = 4, prompt = 64, answer = 4 }
  update { minibatch = 4 }
  kl { coef = 0.05 }
}
model wide { arch = llama, layers = 2, hidden = 64, heads = 4, kv_heads = 2, dtype = fp32 }
parallel whole { zero = 2, micro = 2 }
stage ppo packed from stage.adapted {
  actor {
    model = model.wide, parallel = parallel.whole
    lora { base = nf4 }
  }
  critic { parallel = parallel.whole }
}
"""
# What is compared: everything that learning decides, not times.
NUMBERS = (
    "loss", "grad_norm", "accuracy", "margin", "score", "kl", "reward", "length", "ended", "policy_loss", "value_loss",
    "entropy", "ptx_loss", "explained_variance", "approximate_kl", "eval_loss", "eval_accuracy", "eval_score",
    "eval_kl", "eval_gain", "eval_win_rate", "ema_eval_score",
)  # fmt: skip


def made() -> Path:
    """The folder of the runs of one rank and of two, and the port at which the two met."""
    folder = Path(mkdtemp(prefix="ranks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_recipe(folder, ADAPTED)
    port = free_port()
    script = str(Path(__file__).parents[1] / "pipeline.py")
    two = [
        sys.executable, "-m", "deepspeed.launcher.launch",
        f"--world_info={urlsafe_b64encode(json.dumps({'localhost': [0, 1]}).encode()).decode()}",
        "--master_addr=127.0.0.1", f"--master_port={port}",
        script, str(folder), "2", *ZERO,
    ]  # fmt: skip
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    for launch in (two, [sys.executable, script, str(folder), "1", *ZERO]):
        done = subprocess.run(launch, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder / "runs" / "port").write_text(str(port))
    return folder


AHEAD = {"runs": made}


@pytest.fixture(scope="module")
def runs() -> Path:
    return begun(made).result() / "runs"


def test_ranks_leave_no_shared_memory(runs):
    """DeepSpeed's operator reduces in 66 MiB for each rank, which outlive the ranks as long as they have a name."""
    port = (runs / "port").read_text()
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


def curves(run: Path) -> dict[tuple, float]:
    found = {}
    for stage in ("sft", "reward", "ppo", "adapted", "packed"):
        for number, event in enumerate(read_metrics(run / stage / "metrics.jsonl")):
            for name in NUMBERS:
                if event.get(name) is not None:
                    found[stage, number, event["event"], name] = event[name]
    return found


def test_answers_are_of_unequal_lengths(runs):
    """The case is worth something: a mean over a rank's tokens is not one over all."""
    for stage in ("ppo", "adapted"):
        updates = [e for e in read_metrics(runs / "1-0" / stage / "metrics.jsonl") if e["event"] == "update"]
        assert 0.2 < max(update["ended"] for update in updates) < 0.5


@pytest.mark.parametrize("run", [f"{gpus}-{zero}" for gpus in (1, 2) for zero in ZERO if (gpus, zero) != (1, "0")])
def test_numbers_equal_those_of_one_rank_at_stage_0(runs, run):
    expected, found = curves(runs / "1-0"), curves(runs / run)
    assert found.keys() == expected.keys() and len(found) > 90
    worst = max(found, key=lambda key: abs(found[key] - expected[key]))
    assert found == pytest.approx(expected, abs=2e-3, rel=2e-3), worst


@pytest.mark.parametrize("run", ["1-2", "2-0", "2-3"])
def test_the_work_of_an_update_is_that_of_one_rank(runs, run):
    """A rate x its seconds (x the devices, where it is one of each): tokens, and FLOPs by phase."""

    def work(run: str, stage: str) -> list[float]:
        updates = [e for e in read_metrics(runs / run / stage / "metrics.jsonl") if e["event"] == "update"]
        if "seconds" in updates[0]:
            tokens = [e["tokens_per_second"] * e["seconds"] for e in updates]
            return tokens + [e["tflop_per_second_train"] * e["seconds"] * int(run[0]) for e in updates]
        phases = ("generate", "score", "train")
        return [e[f"tflop_per_second_{p}"] * e[f"seconds_{p}"] * int(run[0]) for e in updates for p in phases]

    for stage in ("sft", "reward", "ppo", "adapted", "packed"):
        expected = work("1-0", stage)
        assert min(expected) > 0 and work(run, stage) == pytest.approx(expected, rel=1e-6)


def test_two_ranks_at_stage_3_sample_from_shards(runs):
    for stage in ("ppo", "adapted"):
        (chosen,) = (e for e in read_metrics(runs / "2-3" / stage / "metrics.jsonl") if e["event"] == "rollout")
        assert chosen["engine"] == "graph" and "in 2 shards" in chosen["reason"]


@pytest.mark.parametrize("run", ["1-0", "2-0", "2-3"])
def test_the_critic_learns_alone_for_one_rollout(runs, run):
    updates = [e for e in read_metrics(runs / run / "adapted" / "metrics.jsonl") if e["event"] == "update"]
    assert ["policy_loss" in update for update in updates] == [False, True, True]
    assert all(update["value_loss"] > 0 for update in updates)


ARTIFACTS = (
    "sft/model", "reward/model", "ppo/actor", "ppo/actor-ema", "ppo/critic",
    "adapted/actor", "adapted/actor-ema", "adapted/critic", "packed/actor", "packed/actor-ema", "packed/critic",
)  # fmt: skip


@pytest.mark.parametrize("artifact", ARTIFACTS)
@pytest.mark.parametrize("run", ["2-0", "2-2", "2-3"])
def test_weights_equal_those_of_one_rank(runs, run, artifact):
    expected = load_file(runs / "1-0" / artifact / "model.safetensors")
    found = load_file(runs / run / artifact / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-3, rtol=1e-2)


def test_the_average_is_neither_the_start_nor_the_end(runs):
    sft, actor, average = (
        load_file(runs / "1-2" / path / "model.safetensors") for path in ("sft/model", "ppo/actor", "ppo/actor-ema")
    )
    for name in actor:
        if actor[name].dim() == 2:
            assert 0 < (average[name] - sft[name]).norm() < (actor[name] - sft[name]).norm()


@pytest.mark.parametrize("run", ["1-0", "2-3"])
def test_a_run_that_was_broken_off_ends_with_the_same_bits(runs, run):
    weights = sorted(path.relative_to(runs / run) for path in (runs / run).rglob("*.safetensors"))
    assert len(weights) == 7 + 2 * 3 * 2  # the last two stages leave their adapters beside each model
    for path in weights:
        assert (runs / f"{run}-broken" / path).read_bytes() == (runs / run / path).read_bytes(), path


@pytest.mark.parametrize("run", ["1-0", "2-3"])
def test_its_metrics_go_on_where_the_checkpoint_was(runs, run):
    for stage in ("sft", "reward", "ppo", "adapted", "packed"):
        found, whole = (read_metrics(runs / name / stage / "metrics.jsonl") for name in (f"{run}-broken", run))
        assert [e["event"] for e in found].count("start") == 2
        assert [e["update"] for e in found if e["event"] == "resume"] == [2]
        for kind in ("update", "eval", "invariants", "sample"):
            assert timeless(found, kind) == timeless(whole, kind)
    samples = [(runs / name / "ppo" / "samples.jsonl").read_bytes() for name in (f"{run}-broken", run)]
    assert samples[0] == samples[1]


def timeless(events: list[dict], kind: str) -> list[dict]:
    return [{k: v for k, v in e.items() if k != "time" and "second" not in k} for e in events if e["event"] == kind]


@pytest.mark.parametrize("run", ["1-0", "2-2", "2-3"])
def test_adapters_beside_their_base_are_the_merged_policy(runs, run):
    """The base that the adapters were trained beside is the one that the stage began with: no rank wrote to it."""
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(runs / run / "adapted" / "actor")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(runs / run / "sft" / "model")
        start = base(ids).logits
        beside = PeftModel.from_pretrained(base, runs / run / "adapted" / "actor-adapter")(ids).logits
    torch.testing.assert_close(beside, merged, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged, start, atol=1e-2)
