"""Offload to NVMe: bytes by hand, the configuration as DeepSpeed reads it, what is refused."""

from __future__ import annotations

import pytest
from workshop import HEAD, PAIRS, gpus

from rlhfdsl.planning import nvme
from rlhfdsl.planning.memory import states

MODEL = 'model big { from = "facebook/opt-13b" }\n'
GIB = 2**30


def sft(parallel: str) -> str:
    return (
        HEAD + MODEL + PAIRS + f"parallel p {{ {parallel}, micro = 1 }}\n"
        "stage sft { model = model.big, data = data.pairs, steps = 3, batch = 8, length = 64, lr = 1e-3"
        ", parallel = parallel.p }\n"
    )


def test_bytes_of_a_node():
    count, gpus_, nodes = 8 * 10**9, 4, 2
    on_host = states(count, 10**8, dtype="bf16", zero=3, offload="both", trains=True, gpus=gpus_, nodes=nodes)
    found = nvme.moved(on_host, dtype="bf16", offload="both", learns=count, largest=10**8, gpus=gpus_, nodes=nodes)
    # drive: 16 bytes of states and gradients and 2 of weights, half of them on each node
    assert found.disk == (16 + 2) * count // 2
    # host: fp32 sums of half the gradients; for each GPU four buffers of 100 M fp32, 1 G parameters that stay (of its
    # own 8 G / 8), and five buffers of 100 M parameters in bf16
    assert found.host == 4 * count // 2 + 4 * (4 * 4 * 10**8 + 2 * (10**9 + 5 * 10**8))
    assert (found.weights, found.optimizer) == (on_host.weights, on_host.optimizer)
    only = nvme.moved(on_host, dtype="bf16", offload="optimizer", learns=count, largest=10**8, gpus=gpus_, nodes=nodes)
    assert only.disk == 16 * count // 2


def test_the_plan(shop, monkeypatch):
    from deepspeed.runtime import config as runtime

    host, drive = (
        shop.plan(sft(f"offload = both{more}"), gpus(1, 40))["stages"][0] for more in ("", ', nvme = "/local/nvme"')
    )
    engine = drive["engines"]["policy"]
    assert (engine["zero"], engine["offload"], engine["nvme"]) == (3, "both", "/local/nvme")
    memories = [stage["memory"]["engines"]["policy"] for stage in (host, drive)]
    assert memories[0]["disk"] == 0 and memories[1]["disk"] > 200 * GIB > memories[1]["host"]
    assert host["memory"]["peak"] == drive["memory"]["peak"]
    assert drive["time"]["each"]["train"] > host["time"]["each"]["train"]
    monkeypatch.setattr(runtime.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(runtime.dist, "get_world_size", lambda: 1)
    read = runtime.DeepSpeedConfig(engine["deepspeed"])
    assert read.zero_config.offload_optimizer.device == read.zero_config.offload_param.device == "nvme"
    assert str(read.zero_config.offload_param.nvme_path) == "/local/nvme"
    # OPT-13B's embedding, 50 272 x 5 120, is the largest parameter, whole on one GPU
    assert read.zero_config.offload_param.buffer_size == 50272 * 5120
    assert read.optimizer_params["torch_adam"] is False and "fused" not in read.optimizer_params


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ('zero = 2, offload = optimizer, nvme = "/n"', "offload to NVMe needs ZeRO 3, and zero is 2"),
        ('offload = off, nvme = "/n"', "`nvme` has no effect: nothing is offloaded"),
    ],
)
def test_what_is_refused(shop, parallel, message):
    found = shop.problem(sft(parallel).replace("13b", "125m"), gpus(1))
    assert (found.code, found.message) == ("E0711", message)
