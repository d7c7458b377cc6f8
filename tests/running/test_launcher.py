"""How ranks are started on a node."""

import base64
import gc
import json
import os
import subprocess
from pathlib import Path

import pytest

from rlhfdsl.running import launcher, worker


def slots(command: list[str]) -> dict:
    (found,) = [word for word in command if word.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(found.removeprefix("--world_info=")))


@pytest.mark.parametrize(
    ("named", "one", "two"),
    [("", "0", ["0", "1"]), ("3,5,7", "3", ["3", "5"]), ("6", "6", ["0", "1"]), ("GPU-ab,GPU-cd", "GPU-ab", None)],
)
def test_ranks_get_the_first_devices_that_are_visible(monkeypatch, named, one, two):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    _, environment = launcher.on_this_node("cuda", 1, ["some.module"])
    assert environment["CUDA_VISIBLE_DEVICES"] == one
    command, _ = launcher.on_this_node("cuda", 2, ["some.module"])
    assert slots(command) == {"localhost": two or named.split(",")}


def test_an_only_rank_has_the_environment_that_a_launcher_gives(tmp_path, monkeypatch):
    """Also inside of a job that has ranks of its own."""
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    alone, launched = (first_of(tmp_path, ranks) for ranks in (1, 2))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR")
    assert [alone[name] for name in names] == ["0", "0", "1", "1", "0", "1", "127.0.0.1"]
    assert [launched[name] for name in names] == ["0", "0", "2", "2", "0", "1", "127.0.0.1"]
    assert (alone["CUDA_VISIBLE_DEVICES"], launched["CUDA_VISIBLE_DEVICES"]) == ("0", "0,1")
    assert alone.keys() ^ launched.keys() <= {"PYTORCH_NVML_BASED_CUDA_CHECK"}  # DeepSpeed sets it where it is loaded


def first_of(folder: Path, ranks: int) -> dict[str, str]:
    """The environment of the first of so many ranks."""
    (folder / "told.py").write_text("import json, os\njson.dump(dict(os.environ), open(os.environ['RANK'], 'w'))\n")
    command, environment = launcher.on_this_node("cpu", ranks, ["told"])
    paths = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    subprocess.run(command, env=environment | {"PYTHONPATH": paths}, cwd=folder, timeout=120, check=True)
    return json.loads((folder / "0").read_text())


def test_what_a_rank_imports_is_kept_from_the_collector_that_goes_on():
    before = gc.get_freeze_count()
    try:
        worker.load("sft")
        assert gc.isenabled() and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_threads_of_a_cpu_do_not_wait_busily_for_long(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert launcher.surroundings("cpu", 1)["GOMP_SPINCOUNT"] == str(launcher.SPINS)
    assert "GOMP_SPINCOUNT" not in launcher.surroundings("cuda", 1)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert launcher.surroundings("cpu", 1)["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in launcher.surroundings("cpu", 1)
