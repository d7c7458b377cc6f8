"""`rlhf verify`: what counts as the same, the first difference, and a run that is executed again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import rlhf
from pipeline import plan, write_recipe

from rlhfdsl.planning import keys
from rlhfdsl.running import weights
from rlhfdsl.running.verify import compare

EVENTS = [
    {"event": "start", "time": 1.0, "world": 1},
    {"event": "eval", "time": 2.0, "update": 0, "of": 3, "eval_loss": 5.0, "eval_rows": 9},
    *(
        {"event": "update", "time": 2.0 + n, "update": n, "of": 3, "loss": 4.0 - n, "tokens": 100 + n, "lr": 1e-3,
         "tokens_per_second": 7.0, "seconds": 0.5, "seconds_train": 0.2, "tflop_per_second_train": 0.1}
        for n in (1, 2, 3)
    ),
    {"event": "eval", "time": 9.0, "update": 3, "of": 3, "eval_loss": 1.0, "eval_rows": 9},
    {"event": "end", "time": 9.5, "peak_memory": None},
]  # fmt: skip


def changed(number, **values):
    return [event | values if at == number else event for at, event in enumerate(EVENTS)]


def test_times_are_no_difference():
    timed = {"seconds": 8.0, "tokens_per_second": 1.0, "tflop_per_second_train": 0.3}
    now = [event | {"time": event["time"] + 99} | timed for event in EVENTS]
    found = compare("stage.sft", EVENTS, now)
    assert (found.level, found.asked, found.first, found.events) == ("metrics", "bits", None, 5)


def test_the_first_difference_and_the_largest():
    now = changed(3, loss=2.1)  # update 2 was 2.0
    now[4] = now[4] | {"loss": 2.0}  # update 3 was 1.0
    found = compare("stage.sft", EVENTS, now)
    assert (found.level, found.first) == ("batches", "update 2: loss 2.0 then, 2.1 now")
    assert found.largest == pytest.approx(0.5)


def test_counts_are_those_of_the_batches():
    found = compare("stage.sft", EVENTS, changed(2, tokens=7))
    assert (found.level, found.first) == ("inputs", "update 1: tokens 101 then, 7 now")
    found = compare("stage.sft", EVENTS, EVENTS[:-3] + EVENTS[-2:])
    assert (found.level, found.first) == ("inputs", "update 3 is missing now")
    found = compare("stage.sft", EVENTS, changed(2, loss=None))
    assert found.level == "batches" and found.largest == float("inf")


def test_other_rows_are_other_batches():
    def read(*batches):
        update = {"event": "update", "of": 2, "loss": 1.0}
        return [{**update, "update": n, "batch": batch} for n, batch in enumerate(batches, 1)]

    found = compare("stage.sft", read("a1", "b2"), read("a1", "c3"))
    assert (found.level, found.first, found.largest) == ("inputs", "update 2: batch b2 then, c3 now", 0.0)
    same = read("a1", "b2")
    assert compare("stage.sft", same, [same[0], same[1] | {"loss": 1.5}]).level == "batches"
    before = [{name: value for name, value in event.items() if name != "batch"} for event in same]
    assert compare("stage.sft", before, same).level == "metrics"  # by a version that noted none


def test_a_prefix_is_compared_as_far_as_it_goes():
    found = compare("stage.sft", EVENTS, EVENTS[:4], until=2)
    assert (found.level, found.asked, found.first, found.events) == ("metrics", "metrics", None, 3)
    found = compare("stage.sft", EVENTS, EVENTS[:1] + EVENTS[2:4], until=2)
    assert found.first == "eval 0 is missing now"


def test_the_files_of_a_model(tmp_path):
    stage = {"artifacts": {"policy": "runs/x/sft/model"}}
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(b"a")
    then = weights.hashes(stage, tmp_path)
    assert list(then) == ["model/model.safetensors"] and weights.difference(then, then) is None
    file.write_bytes(b"b")
    assert "model/model.safetensors is sha256:ca978112ca1bbdca… then" in weights.difference(
        then, weights.hashes(stage, tmp_path)
    )
    file.unlink()
    assert weights.difference(then, weights.hashes(stage, tmp_path)) == "model/model.safetensors is gone"


def test_where_adapters_found_their_base_is_no_difference_of_runs():
    """But one of the files of a result, which `cache verify` holds to what was written."""
    weight = {"model-adapter/adapter_model.safetensors": {"sha256": "a"}}
    then, now = (weight | {"model-adapter/adapter_config.json": {"sha256": pin}} for pin in ("b", "c"))
    assert weights.difference(then, now) is not None
    assert weights.difference(weights.elsewhere(then), weights.elsewhere(now)) is None
    assert weights.elsewhere(then) == weight


def test_what_cannot_be_executed_again(capsys, project):
    code, _, err = rlhf(capsys, "verify", "runs/nothing")
    assert code == 1 and "error[E0756]: `runs/nothing` is not a run" in err
    made = plan(project / "small.rlhf")
    run = Path("runs/small")
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps(made))
    assert "no stage of the run is finished" in rlhf(capsys, "verify", run)[2]
    assert "the run has no stage.sgt" in rlhf(capsys, "verify", run, "--stage", "sgt")[2]
    assert "stage.ppo is not finished" in rlhf(capsys, "verify", run, "--stage", "stage.ppo")[2]
    (run / "sft").mkdir()
    (run / "sft" / "result.json").write_text(json.dumps({"key": "sha256:other"}))
    assert "not made by the plan" in rlhf(capsys, "verify", run)[2]
    (run / "sft" / "result.json").write_text(json.dumps({"key": keys.keys(made)["stage.sft"]}))
    assert "did not note where its inputs are" in rlhf(capsys, "verify", run)[2]
    made["stages"][0]["settings"]["log"] = 2
    (run / "plan.json").write_text(json.dumps(made))
    assert "wrote its metrics every 2 updates" in rlhf(capsys, "verify", run, "--updates", "1")[2]
    (run / "plan.json").write_text("{")
    assert "E0756" in rlhf(capsys, "verify", run)[2]
    assert sorted(path.name for path in Path("runs").iterdir()) == ["small"]  # no scratch folder stays


@pytest.mark.slow
def test_two_runs_of_one_bundle_and_a_run_executed_again(tmp_path):
    """The same bits of all weights, on this machine; a changed metric, weight or input is found."""

    def command(*arguments, folder=tmp_path):
        return subprocess.run(
            [sys.executable, "-m", "rlhfdsl", *arguments], cwd=folder, capture_output=True, text=True, timeout=900
        )

    write_recipe(tmp_path)
    assert command("bundle", "small.rlhf", "--gpu", "cpu").returncode == 0
    folders = tmp_path / "one", tmp_path / "two"
    results = []
    for folder in folders:
        folder.mkdir()
        assert command("run", "../small.rlhfb", folder=folder).returncode == 0
        results.append([json.loads(p.read_text())["files"] for p in sorted(folder.glob("runs/small/*/result.json"))])
    assert len(results[0]) == 3 and results[0] == results[1]

    run = folders[0] / "runs/small"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = command("verify", str(run), "--format", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one["level"] for one in json.loads(done.stdout)] == ["bits"] * 3
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}, "nothing of the run is touched"
    assert [path.name for path in run.parent.iterdir()] == ["small"]

    done = command("verify", str(run), "--stage", "ppo", "--updates", "2")
    assert done.returncode == 0 and "the same metrics" in done.stdout and "not looked at" in done.stdout

    metrics = run / "sft" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    number = next(n for n, line in enumerate(lines) if line["event"] == "update" and line["update"] == 3)
    lines[number]["loss"] += 0.5
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = command("verify", str(run), "--stage", "sft")
    assert done.returncode == 1 and "the same batches" in done.stdout and "update 3: loss" in done.stdout
    assert command("verify", str(run), "--stage", "sft", "--level", "batches").returncode == 0

    (bundle,) = run.glob("bundle-*")
    with (bundle / "pairs.jsonl").open("a") as file:
        file.write("\n")
    done = command("verify", str(run), "--stage", "sft")
    assert done.returncode == 1 and "E0725" in done.stderr and "pairs.jsonl" in done.stderr
