"""What `rlhf plan` says a run would do with each stage now."""

from __future__ import annotations

import json
import shutil

from pipeline import write_recipe

from rlhfdsl.cli.main import main
from rlhfdsl.planning import keys


def finish(plan: dict, address: str) -> None:
    """A folder as a stage of a plan leaves it."""
    from pathlib import Path

    stage = next(stage for stage in plan["stages"] if stage["address"] == address)
    for path in stage["artifacts"].values():
        Path(path).mkdir(parents=True)
    result = {"key": keys.keys(plan)[address], "evaluation": {}, "seconds": 1}
    (Path(stage["output"]) / "result.json").write_text(json.dumps(result))


def overview(capsys, *arguments: str) -> dict[str, str]:
    """The sign of each stage, and what is said about it below."""
    assert main(["plan", "small.rlhf", *arguments]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = [line for line in lines if line[1:2] and line[1].startswith("stage.") and line[0] in "+~>="]
    return {line[1]: line[0] for line in first}


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch, capsys):
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "small.rlhf", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    first, second, third = (stage["address"] for stage in plan["stages"])
    assert [action["do"] for action in plan["actions"].values()] == ["run"] * 3
    assert overview(capsys) == {first: "+", second: "+", third: "+"}
    finish(plan, first)
    assert overview(capsys) == {first: "=", second: "+", third: "+"}
    assert main(["plan", "small.rlhf"]) == 0
    assert f"cached  {first}" in " ".join(capsys.readouterr().out.split(" ")).replace("  ", "  ")
    assert main(["plan", "small.rlhf", "--format", "json"]) == 0
    again = json.loads(capsys.readouterr().out)["actions"]
    assert [action["do"] for action in again.values()] == ["cached", "run", "run"]
    assert again[first]["reason"]
    changed = overview(capsys, "--set", f"{first}.lr=1e-5")
    assert changed[first] == "~"
    assert overview(capsys, "--no-lock") == {first: "+", second: "+", third: "+"}
    shutil.rmtree(tmp_path / "runs")
    assert overview(capsys)[first] == "+"
