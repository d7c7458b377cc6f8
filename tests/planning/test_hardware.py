"""Targets: flags over cluster over machine."""

import os

import pytest

from rlhfdsl.planning import hardware
from rlhfdsl.planning.hardware import CPU, MIB, Target, parse_smi, resolve

TWO = Target("cuda", "h100-80g", 81559 * MIB, 1, 2, "detected")
NODE = {"address": "cluster.node", "gpu": "a100-80g", "gpus": 8, "nodes": 2}


def test_nvidia_smi():
    two = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559\n"
    assert parse_smi(two) == TWO
    unlisted = parse_smi("NVIDIA T4, 15360\n")
    assert (unlisted.gpu, unlisted.memory, unlisted.gpus) == ("NVIDIA T4", 15360 * MIB, 1)
    assert parse_smi("") == parse_smi("No devices were found\n") == CPU


def test_a_container_may_have_less_memory_than_its_host(tmp_path, monkeypatch):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(hardware, "CGROUP", limit)
    assert hardware.host_memory() == whole
    for text, expected in (("max\n", whole), ("1073741824\n", 1 << 30)):
        limit.write_text(text)
        assert hardware.host_memory() == expected


@pytest.mark.parametrize(
    ("flags", "cluster", "machine", "expected"),
    [
        ({}, None, CPU, CPU),
        ({}, None, TWO, TWO),
        ({}, NODE, TWO, Target("cuda", "a100-80g", 81920 * MIB, 2, 8, "cluster.node")),
        ({"gpus": 1}, NODE, TWO, Target("cuda", "a100-80g", 81920 * MIB, 2, 1, "--gpus")),
        ({"gpu": "l4-24g", "nodes": 1}, NODE, CPU, Target("cuda", "l4-24g", 23034 * MIB, 1, 8, "--gpu")),
        ({"gpu": "l4-24g"}, None, TWO, Target("cuda", "l4-24g", 23034 * MIB, 1, 1, "--gpu")),
        ({"gpu": "cpu", "gpus": 2}, None, TWO, Target("cpu", None, None, 1, 2, "--gpu")),
        ({}, {**NODE, "gpu": None}, TWO, Target("cuda", "h100-80g", 81559 * MIB, 2, 8, "cluster.node")),
        ({}, {**NODE, "gpu": None, "nodes": 1}, CPU, Target("cpu", None, None, 1, 8, "cluster.node")),
    ],
)
def test_order_of_strength(flags, cluster, machine, expected):
    assert resolve(flags, cluster, machine) == expected


def test_catalog():
    assert hardware.known("cpu") and hardware.known("h200-141g") and not hardware.known("h200")
    assert not Target("cuda", "v100-32g", 1, 1, 1, "--gpu").has_bf16
    assert TWO.has_bf16 and CPU.has_bf16
    for entry in hardware.catalog().values():
        assert set(entry) == {
            "memory_mib", "bf16_tflops", "fp16_tflops", "fp32_tflops", "bandwidth_gb", "link_gb", "host_gb",
            "network_gb", "price", "names",
        }  # fmt: skip
    assert (CPU.devices, TWO.devices) == ("process", "GPUs")


def test_no_program_is_a_cpu(monkeypatch):
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    assert hardware.detect() == CPU
