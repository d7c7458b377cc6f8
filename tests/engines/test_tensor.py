"""Rollouts over shards of the weights: how layers are cut, in one process, and the answers of two ranks."""

import json
import os
import subprocess
import sys
from base64 import urlsafe_b64encode
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tensor_ranks
import torch
from ahead import ENVIRONMENT, begun
from rollouts import LORA, tiny_model

from rlhfdsl.engines.ports import free_port
from rlhfdsl.engines.rollout.shards import cuts
from rlhfdsl.models.lora import add_adapters
from rlhfdsl.planning import catalog, shards
from rlhfdsl.planning.capabilities import table
from rlhfdsl.planning.families import FAMILIES

# -- how layers are cut ------------------------------------------------------------------------------------------------


def parts_of(model, name: str) -> dict[str, list[torch.Tensor]]:
    """The parts of both ranks, by the name of each parameter that is cut."""
    own = dict(model.named_parameters())
    found = {}
    ranks = [cuts(model, shards.rules(name), 2, rank) for rank in range(2)]
    for parameter, cut in ranks[0].items():
        whole = own[parameter].detach()
        found[parameter] = [torch.full(cut.shape(whole.shape), torch.nan) for _ in ranks]
        for rank, part in enumerate(found[parameter]):
            ranks[rank][parameter].take(whole, part)
    return found


@pytest.mark.parametrize("name", shards.types())
def test_shards_are_the_whole(name):
    """Every value of a cut parameter is in one shard; of a row layer's bias the others hold zeros."""
    model = tiny_model(name)
    own = dict(model.named_parameters())
    for parameter, parts in parts_of(model, name).items():
        whole = own[parameter]
        if parts[0].shape == whole.shape:
            assert torch.equal(parts[0], whole) and not parts[1].any() and whole.dim() == 1
        else:
            values = torch.cat([part.flatten() for part in parts])
            assert torch.equal(values.sort().values, whole.flatten().sort().values)
            assert parts[0].shape == parts[1].shape


@pytest.mark.parametrize("name", shards.types())
def test_every_matrix_of_a_layer_is_cut_and_no_other(name):
    model = tiny_model(name)
    matrices = {key for key, p in model.named_parameters() if p.dim() == 2}
    inside = {key for key in matrices if ".layers." in key or ".h." in key}
    assert {key for key in parts_of(model, name) if key in matrices} == inside


def test_parts_are_whole_heads():
    """A rank has queries, keys and values of its heads, however a layer holds them; here 4 of width 16, 2 of keys."""
    split = {  # which rows of the matrix are the second rank's
        "llama": {"self_attn.q_proj": [(32, 64)], "self_attn.k_proj": [(16, 32)]},
        "phi3": {"self_attn.qkv_proj": [(32, 64), (80, 96), (112, 128)], "mlp.gate_up_proj": [(64, 128), (192, 256)]},
        "gpt2": {"attn.c_attn": [(32, 64), (96, 128), (160, 192)]},
        "gpt_neox": {"attention.query_key_value": [(96, 192)]},
    }
    for name, layers in split.items():
        model = tiny_model(name)
        parts, own = parts_of(model, name), dict(model.named_parameters())
        for layer, rows in layers.items():
            key = next(key for key in own if key.endswith(f".0.{layer}.weight"))
            whole, part = (tensor.T if name == "gpt2" else tensor for tensor in (own[key], parts[key][1]))
            assert torch.equal(part, torch.cat([whole[first:last] for first, last in rows])), key


@pytest.mark.parametrize("name", tensor_ranks.ADAPTED)
def test_parts_of_adapters_multiply_to_the_parts_of_their_product(name):
    model = tiny_model(name)
    add_adapters(model, LORA, seed=2, scalar=False)
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter)
    parts, own = parts_of(model, name), dict(model.named_parameters())
    checked = 0
    for key in own:
        if ".lora_A." not in key or "lm_head" in key:
            continue
        up = key.replace("lora_A", "lora_B")
        base = key.replace(".lora_A.default", ".base_layer")
        product = own[up] @ own[key]
        delta = product.T if name == "gpt2" else product
        taken = torch.empty_like(parts[base][1])
        cuts(model, shards.rules(name), 2, 1)[base].take(delta.detach(), taken)
        mine = (parts[up][1] if up in parts else own[up]) @ (parts[key][1] if key in parts else own[key])
        torch.testing.assert_close(mine.T if name == "gpt2" else mine, taken)
        assert (up in parts) != (key in parts)
        checked += 1
    assert checked >= 8


def test_types_that_sample_by_graph_have_rules_or_a_reason():
    graph = {name for name, rule in table()["types"].items() if rule["engine"] == "graph"}
    assert set(shards.types()) <= graph
    assert "all heads" in shards.why_not("olmo2") and shards.rules("olmo2") is None
    assert "no rules" in shards.why_not("new")


@pytest.mark.parametrize("name", [name for name in shards.types() if name in FAMILIES])
def test_planning_counts_what_a_rank_holds(name):
    """To the unit, but that it counts the vectors that are cut (biases) whole."""
    model = tiny_model(name)
    config, own = model.config, dict(model.named_parameters())
    numbers = {
        "type": name, "layers": config.num_hidden_layers, "hidden": 64, "heads": 4,
        "kv_heads": getattr(config, "num_key_value_heads", 4), "head_dim": 16, "vocab": 259, "context": 512,
        "intermediate": 256 if name == "gpt2" else 128, "tied": True,
    }  # fmt: skip
    cut = cuts(model, shards.rules(name), 2, 0)
    held = sum(cut[key].shape(p.shape).numel() if key in cut and p.dim() == 2 else p.numel() for key, p in own.items())
    assert shards.held(catalog.shape(numbers), sum(p.numel() for p in own.values()), 2) == held


# -- the answers of two ranks ------------------------------------------------------------------------------------------


def launched(folder: Path, device: str) -> list[dict]:
    """What each of two ranks found."""
    launch = [
        sys.executable, "-m", "deepspeed.launcher.launch",
        f"--world_info={urlsafe_b64encode(json.dumps({'localhost': [0, 1]}).encode()).decode()}",
        "--master_addr=127.0.0.1", f"--master_port={free_port()}",
        str(Path(tensor_ranks.__file__)), str(folder), device,
    ]  # fmt: skip
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": device}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"TORCHDYNAMO_DISABLE": "1"} if device == "cpu" else {}  # as the launcher of the program does
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def two_ranks() -> list[dict]:
    with TemporaryDirectory() as folder:
        return launched(Path(folder), "cpu")


AHEAD = {"on_cpu": two_ranks}


@pytest.fixture(scope="module")
def on_cpu() -> list[dict]:
    return begun(two_ranks).result()


@pytest.mark.parametrize("case", tensor_ranks.cases("cpu"))
def test_two_ranks_sample_what_one_does(on_cpu, case):
    assert [found[case] for found in on_cpu] == [None, None]


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory) -> list[dict]:
    return launched(tmp_path_factory.mktemp("tensor"), "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("case", tensor_ranks.cases("cuda"))
def test_two_gpus_sample_what_one_does_with_captured_steps(on_gpus, case):
    assert [found[case] for found in on_gpus] == [None, None]
