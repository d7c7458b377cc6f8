"""`rlhf cache` over the folders of runs: what is listed, what goes and what never does."""

import json
import os
import time
from pathlib import Path

import pytest
from command import rlhf
from pipeline import plan

from rlhfdsl.planning.keys import keys
from rlhfdsl.running import cache, weights

HOUR = 3600


def stage(folder: Path, key: str | None, content: bytes = b"weights", hours: float = 2) -> Path:
    """A folder of a stage with one model; with a key it is finished."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(content)
    if key is not None:
        files = weights.hashes({"artifacts": {"policy": "x/model"}}, folder)
        (folder / "result.json").write_text(json.dumps({"key": key, "files": files}))
    then = time.time() - hours * HOUR
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))
    return folder


@pytest.fixture
def run(project) -> Path:
    """A run with a finished stage of its plan, one of another plan, replaced and broken-off ones, and more."""
    made = plan(project / "small.rlhf")
    run = Path("runs/small")
    stage(run / "sft", keys(made)["stage.sft"])
    stage(run / "sft.1", "sha256:aaa")
    stage(run / "sft.2", "sha256:bbb")
    stage(run / "sft.10", "sha256:ccc")
    stage(run / "reward", "sha256:other")
    stage(run / "ppo.partial", None)
    stage(run / "ppo.1.partial", None, hours=0.5)
    stage(run / "models", None)
    stage(run / "bundle-0123456789ab", None)
    stage(run / "mine", None)  # nothing that a run writes
    (run / "link").symlink_to(project)
    (run / "plan.json").write_text(json.dumps(made))
    return run


def states(root: Path = Path("runs")) -> dict[str, str]:
    return {entry.folder.name: entry.state for entry in cache.entries(root)}


def test_ls_and_du(capsys, run):
    assert states() == states(run) == {
        "bundle-0123456789ab": "inputs", "models": "models", "ppo.1.partial": "partial", "ppo.partial": "partial",
        "reward": "other", "sft": "current", "sft.1": "aside", "sft.2": "aside", "sft.10": "aside",
    }  # fmt: skip
    code, out, _ = rlhf(capsys, "cache", "ls")
    assert code == 0 and "runs/small/sft.10" in out and "finished, of another plan" in out and "2 h ago" in out
    sizes = {row["state"]: row["bytes"] for row in json.loads(rlhf(capsys, "cache", "du", "--format", "json")[1])}
    assert sizes["partial"] == 2 * len(b"weights") and set(sizes) == set(states().values())
    assert "in all" in rlhf(capsys, "cache", "du")[1]


def test_gc_removes_what_was_replaced_and_only_with_yes(capsys, run):
    before = set(states())
    code, out, _ = rlhf(capsys, "cache", "gc")
    assert code == 0 and "remove it with --yes" in out and set(states()) == before
    code, out, _ = rlhf(capsys, "cache", "gc", "--keep", "1", "--yes")
    assert code == 0 and set(states()) == before - {"sft.1", "sft.2"}  # 10 is the newest
    code, _, err = rlhf(capsys, "cache", "gc", "--partial", "--yes")
    assert code == 0 and set(states()) == before - {"sft.1", "sft.2", "sft.10", "ppo.partial"}
    assert "runs/small/ppo.1.partial was written to less than an hour ago" in err
    assert "nothing to remove" in rlhf(capsys, "cache", "gc")[1]
    assert (run / "link").is_symlink() and (run / "mine" / "model").is_dir() and (run / "plan.json").is_file()


def test_a_removal_that_was_broken_off_is_finished(capsys, run):
    (run / "sft.1").rename(run / ".sft.1.removed")
    assert states()[".sft.1.removed"] == "aside"
    assert rlhf(capsys, "cache", "gc", "--keep", "9", "--yes")[0] == 0
    assert not (run / ".sft.1.removed").exists() and (run / "sft.2").is_dir()


def test_verify_finds_a_changed_file(capsys, run):
    code, out, _ = rlhf(capsys, "cache", "verify")
    assert code == 0 and out.count("whole") == 5 and out.count("nothing to compare with") == 2
    (run / "sft" / "model" / "model.safetensors").write_bytes(b"Weights")
    (run / "reward" / "model" / "model.safetensors").unlink()
    code, out, _ = rlhf(capsys, "cache", "verify")
    assert code == 1 and "model/model.safetensors is sha256:" in out and "model/model.safetensors is gone" in out


def test_runs_of_another_version_and_usage(capsys, run):
    (run / "plan.json").write_text("{}")
    assert states()["sft"] == "current"  # nobody can say that it is not
    assert rlhf(capsys, "cache", "ls", "nowhere")[0] == 2
    assert rlhf(capsys, "cache", "ls", "--yes")[0] == 2
    assert rlhf(capsys, "cache", "gc", "--keep", "-1")[0] == 2
    Path("empty").mkdir()
    code, out, err = rlhf(capsys, "cache", "ls", "empty")
    assert (code, out) == (0, "") and "no run in empty" in err
