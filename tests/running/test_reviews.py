"""A few updates of every stage on real human ratings with a real pretrained model.

Neither is part of the repository: RLHFDSL_RATINGS names the ratings file of examples/movie-reviews, RLHFDSL_MODEL the
folder of a small chat model (SmolLM2-135M-Instruct, whose pad token is its end token).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfdsl.running.metrics import read_metrics

RATINGS, MODEL = os.environ.get("RLHFDSL_RATINGS"), os.environ.get("RLHFDSL_MODEL")
EXAMPLE = Path(__file__).parents[2] / "examples" / "movie-reviews"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (RATINGS and MODEL), reason="RLHFDSL_RATINGS and RLHFDSL_MODEL are not set"),
]


def test_all_three_stages_take_a_few_updates(tmp_path):
    shutil.copy(EXAMPLE / "reviews.rlhf", tmp_path)
    subprocess.run([sys.executable, EXAMPLE / "prepare.py", RATINGS, tmp_path / "reviews.jsonl"], check=True)
    small = (
        "data.pairs.rows=400", "stage.sft.steps=2", "stage.sft.batch=4", "stage.reward.steps=2", "stage.reward.batch=4",
        "stage.ppo.rollouts=2", "stage.ppo.rollout.batch=4", "stage.ppo.rollout.answer=16",
        "stage.ppo.update.minibatch=4", "stage.sft.warmup=0", "stage.reward.warmup=0", "model.writer.dtype=fp32",
    )  # fmt: skip
    command = [sys.executable, "-m", "rlhfdsl", "run", "reviews.rlhf", "-p", f"base={MODEL}", "--gpu", "cpu"]
    for setting in small:
        command += ["--set", setting]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    events = read_metrics(tmp_path / "runs" / "reviews" / "ppo" / "metrics.jsonl")
    updates = [event for event in events if event["event"] == "update"]
    (invariants,) = [event for event in events if event["event"] == "invariants"]
    assert len(updates) == 2 and all(event["parity"] < 1e-4 for event in updates)
    assert invariants["invariant_reference"] < 1e-5
