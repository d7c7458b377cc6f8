"""One recipe over GPUs and over models."""

from __future__ import annotations

import json
import re

import pytest

from rlhfdsl.cli.main import main
from rlhfdsl.planning import hardware, scaling

RECIPE = "recipes/deepspeed-chat.rlhf"
BASE = ["plan", RECIPE, "--no-lock", "--gpu", "a100-80g"]


def plans(capsys, *arguments: str) -> list[dict]:
    assert main([*BASE, *arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)["plans"]


def test_the_curve(capsys):
    points = plans(capsys, "--gpus", "1,2,4,3")
    assert [point["world"] for point in points] == [1, 2, 4, 3]
    times = [point["seconds"] for point in points[:3]]
    assert times == sorted(times, reverse=True) and all(point["peak"] <= point["usable"] for point in points[:3])
    assert points[3]["seconds"] is None and "do not split over 3 GPUs" in points[3]["error"]  # 128 sequences
    assert main([*BASE, "--gpus", "1,2,3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "GPUs" and "100%" in lines[1] and lines[3].startswith("3     batch = 128")
    # twice the GPUs, each with half the work: the efficiency is t1 / (2 t2)
    assert f"{times[0] / 2 / times[1]:.0%}" in lines[2]


def test_the_largest_of_a_family(capsys):
    points = plans(capsys, "--gpus", "1", "--largest", "actor")
    assert [point["name"] for point in points][:3] == ["facebook/opt-125m", "facebook/opt-350m", "facebook/opt-1.3b"]
    fits = [point["error"] is None for point in points]
    assert fits == sorted(fits, reverse=True), "what a larger model has room for, a smaller one has"
    assert main([*BASE, "--gpus", "1", "--largest", "qwen2.5", "--set", "model.judge.from=Qwen/Qwen2.5-0.5B"]) == 0
    assert "largest: Qwen/Qwen2.5-" in capsys.readouterr().out


def test_what_fits_is_unknown_beside_a_model_of_unknown_size(capsys):
    assert main([*BASE, "--gpus", "1", "--largest", "actor", "--set", "model.judge.from=org/strange"]) == 0
    out = capsys.readouterr().out
    assert "largest:" not in out and "which of them fits is not known: `rlhf lock` reads" in out


def test_the_memory_of_the_host_bounds_what_offload_makes_room_for(capsys):
    """At ZeRO 2 with offload of the optimizer a node holds at least 16 bytes for each parameter that trains."""
    points = plans(capsys, "--gpus", "1", "--largest", "actor", "--host-memory", "200")
    bound = {point["name"]: point["bound"] for point in points}
    assert bound["facebook/opt-2.7b"] is None and bound["facebook/opt-6.7b"] is None
    large = next(point for point in points if point["name"] == "facebook/opt-13b")
    assert large["bound"] == "host" and large["host_usable"] == int(0.9 * (200 << 30)) < 16 * 13e9
    assert main([*BASE, "--gpus", "1", "--largest", "actor", "--host-memory", "200"]) == 0
    out = capsys.readouterr().out
    assert "largest: facebook/opt-6.7b; the host's memory is too small for facebook/opt-13b\n" in out
    assert "GiB of the host of each node, of whose 200.0 GiB a plan may fill 180.0 GiB" in out
    assert {point["host"] for point in points if point["error"]} == {None}
    assert main([*BASE, "--gpus", "1", "--largest", "actor"]) == 0
    assert "--host-memory GIB" in capsys.readouterr().out  # of a named GPU the host is not known


def test_the_host_of_the_machine_whose_gpu_it_is(capsys, monkeypatch):
    here = hardware.Target(
        "cuda", "a100-80g", hardware.catalog()["a100-80g"]["memory_mib"] << 20, 1, 1, "detected", host=64 << 30
    )
    monkeypatch.setattr(hardware, "detect", lambda: here)
    assert main(["plan", RECIPE, "--no-lock", "--largest", "opt", "--format", "json"]) == 0
    points = json.loads(capsys.readouterr().out)["plans"]
    assert {point["host_usable"] for point in points} == {int(0.9 * (64 << 30))}
    bound = [point["name"].removeprefix("facebook/opt-") for point in points if point["bound"] == "host"]
    assert bound == ["6.7b", "13b", "30b", "66b", "175b"]


def test_one_plan_tells_of_the_host(capsys):
    large = [*BASE, "--gpus", "1", "-p", "actor=facebook/opt-13b"]
    assert main(large) == 0
    assert re.search(r"^  host      \d+\.\d GiB on each node \(estimate\)$", capsys.readouterr().out, re.MULTILINE)
    for how in ((), ("--fit",)):
        assert main([*large, *how, "--host-memory", "400"]) == 0
        assert re.search(r"GiB of 400\.0 on each node \(\d+%\)  ok \(estimate\)\n", capsys.readouterr().out)
        assert main([*large, *how, "--host-memory", "100"]) == 1
        assert "of the host of each node, of whose 100.0 GiB a plan may fill 90.0 GiB" in capsys.readouterr().err


def test_families():
    assert scaling.family("gpt2") == [f"openai-community/gpt2{size}" for size in ("", "-medium", "-large", "-xl")]
    assert scaling.family("Qwen/Qwen2.5-7B-Instruct")[:2] == ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B"]
    assert all(scaling.family(name) for name in scaling.families())


def test_no_family_in_place_of_a_model_from_scratch(capsys):
    assert main(["plan", "recipes/quickstart.rlhf", "--no-lock", "--gpu", "a100-80g", "--largest", "opt"]) == 2
    assert "`model.tiny` is made from scratch; --largest sets the models of a family" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--largest", "optt"], "did you mean `opt`"),
        (["--gpus", "1,0"], "takes a number from 1"),
        (["--gpus", "two"], "takes a number from 1, not `two`"),
        (["--gpus", "1,2", "--largest", "opt"], "print a curve"),
        (["--host-memory", "0"], "takes a number from 1"),
        (["--gpu", "cpu", "--host-memory", "100"], "is for offload from GPUs, and the target is cpu"),
    ],
)
def test_bad_options(capsys, arguments, said):
    assert main([*BASE, *arguments]) == 2
    assert said in capsys.readouterr().err
