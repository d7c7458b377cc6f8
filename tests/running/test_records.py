"""Records of runs: read from their folders, predicted beside measured, two of them side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhfdsl.cli.main import main
from rlhfdsl.planning import measured
from rlhfdsl.running import records

PLAN = json.loads((Path(__file__).parents[1] / "planning" / "golden" / "pipeline.json").read_text())
TARGET = {"device": "cuda", "gpu": "h100-80g", "world": 1}


def run(
    folder: Path, *, torch: str = "2.9", losses=(0.9, 0.8, 0.7), accuracy: float = 0.9, batches=("a", "b", "c")
) -> Path:
    """A run whose sft and reward stages are complete, and whose ppo has not begun."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(PLAN))
    for name in ("sft", "reward"):
        home = folder / name
        home.mkdir()
        events = [
            {
                "event": "update",
                "time": 10.0 * i,
                "update": i + 1,
                "of": 3,
                "batch": batches[i],
                "loss": loss,
                "lr": 1e-3,
                "seconds": seconds,
            }
            for i, (loss, seconds) in enumerate(
                zip(losses if name == "reward" else (1, 1, 1), (9.0, 0.4, 0.2), strict=True)
            )
        ]
        events += [{"event": "end", "time": 99.0, "peak_memory": 3 * 2**30}]
        (home / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        evaluation = {"eval_accuracy": accuracy} if name == "reward" else {"eval_loss": 0.5}
        result = {"evaluation": evaluation, "versions": {"torch": torch}, "python": "3.11", "target": TARGET}
        (home / "result.json").write_text(json.dumps(result))
    return folder


def test_a_run_is_read(tmp_path):
    found = records.read(run(tmp_path / "a"))
    assert list(found.stages) == ["stage.sft", "stage.reward"] and len(found.stages["stage.sft"].updates) == 3
    assert found.versions == {"torch": "2.9", "python": "3.11", **{f"target.{k}": v for k, v in TARGET.items()}}


def test_a_result_that_does_not_say_where_it_ran(tmp_path, capsys):
    folders = [run(tmp_path / name) for name in ("a", "b")]
    for path in folders[0].glob("*/result.json"):
        path.write_text('{"evaluation": {}}')
    assert records.read(folders[0]).versions == {}
    assert main(["diff", *map(str, folders)]) == 0
    assert "python" in capsys.readouterr().out


def test_predicted_beside_measured(tmp_path, capsys):
    # the first update warms up, the median of 0.4 and 0.2 is 0.3 s
    assert main(["plan", "--measured", str(run(tmp_path / "a"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "stage.sft" in line and "each update" in line][0][-2] == "0.300"
    assert [line.split() for line in lines if "stage.sft" in line and "GiB" in line][0][-2] == "3.00"
    stage = PLAN["stages"][0]
    row = measured.Row("", "GiB", 3.3, 3.0)
    assert measured.cells(row) == ["3.30", "3.00", "+10%"]
    both = measured.record(stage, records.read(tmp_path / "a").stages["stage.sft"].events)
    assert both["measured"] == {"peak_memory": 3 * 2**30, "seconds_each": {"train": pytest.approx(0.3)}}
    assert both["predicted"]["peak_memory"] == stage["memory"]["peak"]


def test_two_runs(tmp_path, capsys):
    a, b = run(tmp_path / "a"), run(tmp_path / "b", torch="2.11", losses=(0.9, 0.81, 0.6), accuracy=0.8)
    assert main(["diff", str(a), str(b), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    sft, reward = found["stages"]
    assert found["versions"] == {"torch": ["2.9", "2.11"]}
    assert (sft["part_at"], reward["part_at"], reward["differs"]) == (None, 2, {"loss": [0.8, 0.81]})
    assert reward["evaluation"] == {"eval_accuracy": [0.9, 0.8]} and reward["same_batches"] == 3
    assert main(["diff", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "The two plans say the same." in out and "part at update 2: loss" in out
    assert "the same numbers in 3 updates" in out and "the same batches in 3 updates" in out
    other = run(tmp_path / "c", losses=(0.9, 0.8, 0.6), batches=("a", "d", "c"))
    assert main(["diff", str(a), str(other)]) == 0
    out = capsys.readouterr().out
    assert "part at update 2: batch" in out and "the same batches in 1 update of 3, and then others" in out


def test_what_is_no_run(tmp_path, capsys):
    assert main(["plan", "--measured", str(tmp_path)]) == 2
    (tmp_path / "plan.json").write_text("{")
    assert main(["plan", "--measured", str(tmp_path)]) == 1
    assert "damaged" in capsys.readouterr().err
    assert main(["plan"]) == 2
