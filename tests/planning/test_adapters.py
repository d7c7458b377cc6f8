"""Adapters in numbers: layers and counts against peft, what a layer keeps against autograd, memory and plan by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from shapes import config_of, tiny
from test_catalog import SMALLEST
from test_memory import saved
from workshop import HEAD, PAIRS, PIPELINE, gpus, rates_of

from rlhfdsl.language import load
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import compile, hardware, keys, lock, places, timing
from rlhfdsl.planning.adapters import Lora, chosen, linears, packed
from rlhfdsl.planning.advice import nearest
from rlhfdsl.planning.catalog import lookup, parameters, shape
from rlhfdsl.planning.cut import HOOKS, Lengths
from rlhfdsl.planning.families import FAMILIES, GATED
from rlhfdsl.planning.fit import fit
from rlhfdsl.planning.layout import Need, Rollout
from rlhfdsl.planning.memory import activations, gathered, layer_tokens, states
from rlhfdsl.planning.render import layout
from rlhfdsl.planning.render import render as plan_text
from rlhfdsl.planning.timing import OnPolicy, Supervised, seconds
from rlhfdsl.planning.validate import validate_plan

ROOT = Path(__file__).resolve().parents[2]
RANK = 8
# One family for each table of layers, and those whose norms or attention keep other things.
TABLES = ("llama", "phi3", "opt", "gpt2", "gpt_neox", "bloom")
KEEPING = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "opt", "gpt_neox", "bloom")


def entry(**changes):
    return {"rank": RANK, "alpha": 16, "dropout": 0.0, "targets": [], "lr": None} | changes


def adapted(numbers, paths, head="none", device="meta"):
    """The model of the numbers with adapters at the paths of each layer, as peft makes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhfdsl.models.lora import add_adapters

    automodel = AutoModelForCausalLM if head == "none" else AutoModelForSequenceClassification
    with torch.device(device):
        model = automodel.from_config(config_of(numbers))
        add_adapters(model, entry(targets=paths), seed=0, scalar=head == "scalar")
    return model


@pytest.mark.parametrize("numbers", [
    *(tiny(kind) | {"kv_heads": 2 if kind in GATED else 4} for kind in TABLES),
    *(lookup(hub) for hub in ("facebook/opt-350m", SMALLEST["gemma3_text"])),
], ids=lambda n: f"{n['type']}-{n['hidden']}")  # fmt: skip
def test_counts_equal_peft(numbers):
    """Two choices of layers, as a causal model and as one with a scalar head, which trains too."""
    known = shape(numbers)
    for targets, head in (("all", "none"), ("attention", "scalar")):
        layers = chosen(targets, linears(known))
        trained = known.layers * sum(RANK * (layer.inputs + layer.outputs) for layer in layers)
        model = adapted(numbers, [layer.path for layer in layers], head)
        assert sum(p.numel() for p in model.parameters()) == parameters(known, head) + trained
        more = known.embed if head == "scalar" else 0
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained + more


@pytest.mark.parametrize("kind", TABLES)
def test_all_is_what_peft_takes_for_all(kind):
    from rlhfdsl.models.lora import lora_layers

    numbers = tiny(kind)
    ours, theirs = (
        {(layer.in_features, layer.out_features) for layer in lora_layers(model)} | {len(lora_layers(model))}
        for model in (adapted(numbers, paths) for paths in ([x.path for x in linears(shape(numbers))], "all-linear"))
    )
    assert ours == theirs


@pytest.mark.parametrize("kind", KEEPING)
def test_a_frozen_layer_keeps_what_autograd_saves(kind):
    """As in test_memory, for matrices with and without adapters beside them; within 2 %."""
    numbers = tiny(kind) | {"hidden": 128, "context": 128, "kv_heads": 2 if FAMILIES[kind].gated else 4}
    numbers |= {"intermediate": 512} | ({"head_dim": 48} if "head_dim" in numbers else {})
    eager = not FAMILIES[kind].sdpa
    for targets in ("all", ["q_proj", "qkv_proj", "query_key_value"]):
        layers = chosen(targets, linears(shape(numbers)))
        lora = entry(targets=[layer.path for layer in layers])
        two, three = (saved(numbers | {"layers": count}, "bf16", eager, lora=lora) for count in (3, 4))
        expected = layer_tokens(shape(numbers), 64, "bf16", eager, "cpu", Lora(lora, layers, None))
        assert expected == pytest.approx(three - two, rel=0.02), targets


def test_states_by_hand():
    """1 M parameters of which 10 k train, bf16: 2 bytes for each, and 4 + 12 for each that trains."""
    given = {"dtype": "bf16", "offload": "off", "trains": True, "nodes": 1, "trained": 10_000}
    one = states(10**6, 0, zero=1, gpus=1, **given)
    assert (one.weights, one.gradients, one.optimizer) == (2 * 10**6, 4 * 10**4, 12 * 10**4)
    two = states(10**6, 0, zero=2, gpus=4, **given)
    assert (two.weights, two.gradients, two.optimizer) == (2 * 10**6, 10_000, 30_000)
    three = states(10**6, 0, zero=3, gpus=4, **given)
    assert (three.weights, three.gradients, three.optimizer) == (5 * 10**5, 10_000, 30_000)
    host = states(10**6, 0, zero=3, gpus=4, **given | {"offload": "both"}).host
    assert host == int(1.5 * (2 * 10**6 + 16 * 10**4))
    assert states(10**6, 0, zero=0, gpus=1, **given | {"dtype": "fp32"}).total == 4 * 10**6 + 12 * 10**4


ADAPTED = PIPELINE.replace("actor { model = stage.sft, lr = 1e-4 }", """actor {
    model = stage.sft, lr = 1e-4, ema = 0.9
    lora { rank = 4 }
  }""").replace("critic { model = stage.reward, lr = 1e-4 }", """critic {
    model = stage.reward, lr = 1e-4
    lora { rank = 2, targets = ["q_proj"] }
  }""")  # fmt: skip
LAYERS = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 96))  # TINY: 2 layers, rank 4, hidden 32, intermediate 96


def engines(plan):
    stage = plan["stages"][-1]
    return stage, stage["engines"], stage["memory"]["engines"]


def test_the_actors_base_is_the_reference(shop):
    plan = shop.plan(ADAPTED)
    stage, planned, memory = engines(plan)
    assert planned["ref"]["shares"] == "actor" and planned["ref"]["deepspeed"] == {}
    assert planned["ref"]["micro"] == planned["actor"]["micro"] and memory["ref"]["total"] == 0
    assert stage["batch"]["why"]["ref.zero"] == "the actor's base, with its adapters off"
    assert memory["actor"]["trained"] == LAYERS and memory["actor"]["average"] == 4 * LAYERS
    assert memory["critic"]["trained"] == 32 + 2 * 2 * (32 + 32)  # the head, and rank 2 beside 2 matrices
    assert memory["reward"]["trained"] == 0
    assert stage["artifacts"]["policy_adapter"].endswith("ppo/actor-adapter")
    assert {"path": stage["artifacts"]["ema_adapter"], "bytes": 4 * LAYERS} in stage["writes"]
    validate_plan(plan)
    places.confined(plan)
    assert keys.keys(plan)["stage.ppo"] != keys.keys(shop.plan(ADAPTED.replace("rank = 4", "rank = 8")))["stage.ppo"]
    assert "base of actor" in plan_text(plan) and "ppo.ref" not in layout(plan)
    whole = shop.plan(PIPELINE)
    saved = sum(engines(whole)[2][name]["total"] - memory[name]["total"] for name in ("actor", "ref"))
    count = memory["ref"]["parameters"]
    assert saved == 4 * count + 12 * (count - LAYERS) - 4 * LAYERS - 4 * LAYERS  # a reference less; adapters, average


def test_a_reference_of_other_weights_has_its_own(shop):
    plan, _ = shop.compile(ADAPTED.replace("  reward { model", "  ref { model = model.tiny }\n  reward { model"))
    _, planned, memory = engines(plan)
    assert planned["ref"]["shares"] is None and planned["ref"]["deepspeed"] and memory["ref"]["total"] > 0


def test_zero_of_a_shared_reference_is_the_actors(shop):
    text = ADAPTED.replace("lr = 1e-4, ema", "lr = 1e-4, parallel = parallel.p, ema")
    stage, planned, memory = engines(shop.plan(text + "parallel p { zero = 3 }\n", gpus(4)))
    assert [planned[name]["zero"] for name in ("actor", "ref", "reward")] == [3, 3, 3]
    assert stage["batch"]["why"]["ref.micro"] == "as the actor's, read in one forward with it"
    assert memory["actor"]["working"]["score"] == memory["ref"]["working"]["score"]


def test_buckets_hold_what_trains(shop):
    text = HEAD + 'model big { from = "facebook/opt-1.3b" }\n' + PAIRS + """stage sft {
  model = model.big, data = data.pairs, batch = 8, length = 64, lr = 1e-4, parallel = parallel.p
  lora { rank = 16 }
}
parallel p { zero = 3 }
"""
    zero = shop.plan(text, gpus(2))["stages"][0]["engines"]["policy"]["deepspeed"]["zero_optimization"]
    trained = 24 * 16 * (4 * 4096 + 2 * (2048 + 8192))
    assert zero["reduce_bucket_size"] == trained and zero["stage3_prefetch_bucket_size"] == 50_000_000


def test_a_training_step_by_hand():
    """Forward and backward take as much each, since frozen weights have no gradient; adapters read and write beside."""
    entry = shape(lookup("facebook/opt-1.3b"))
    layers = linears(entry)
    count = entry.layers * sum(16 * (layer.inputs + layer.outputs) for layer in layers)
    need = Need(
        "policy", entry, parameters(entry) + count, "none", "bf16", False, True, 8, 1, 512, 1, "off", True, 8, False,
        trained=count, lora=Lora({"rank": 16, "dropout": 0.0}, layers, count),
    )  # fmt: skip
    one = gpus(1)
    rates, tokens = one.rates("bf16"), 8 * 512
    passes = 3 * tokens * (2 * need.count + 4 * 24 * 2048 * 512) / (rates.matmul * rates.train)  # one recomputes
    inputs, outputs = 5 * 2048 + 8192, 5 * 2048 + 8192
    layer = (2 + 2.1) * 2 * (16 * 2048 + 2 * 8192)
    layer += 2 * 2 * (inputs + 6 * outputs) + 2 * (5 * inputs + 4 * outputs)  # two forward passes and one backward
    moved = tokens * (24 * layer + 50272 * 2 * (1 + 3)) + (10 + 46 + 16) * count
    launched = (24 * 6 * 2) * rates.forward / 30  # a step's, for each matrix of an adapter
    placed = fit([need], None, one)
    took = pytest.approx(passes + moved / rates.copy + launched)
    assert seconds(placed, Supervised(Lengths(512)), one) == {"train": took}


def placed_pair(zero):
    """OPT-1.3B with adapters of rank 16 and its base as the reference on 4 GPUs: 16 sequences in 2 micro batches."""
    entry = shape(lookup("facebook/opt-1.3b"))
    layers = linears(entry)
    count = entry.layers * sum(16 * (layer.inputs + layer.outputs) for layer in layers)
    given = ("bf16", False, True, 16, 1, 512, zero, "off", False, 8, False)
    lora = Lora({"rank": 16, "dropout": 0.0}, layers, count)
    actor = Need("actor", entry, parameters(entry) + count, "none", *given, trained=count, lora=lora)
    ref = replace(actor, name="ref", count=parameters(entry), trains=False, trained=None, lora=None, shares="actor")
    four = gpus(4)
    placed = fit([actor, ref], Rollout(16, 256, 512), four)
    took = seconds(placed, OnPolicy(16, Lengths(256), 256, 1, 1, 0, 512), four)
    return {p.need.name: p for p in placed.engines}, took


def test_actor_and_reference_are_one_pass_where_it_gathers(monkeypatch):
    """Where only gathering takes time, reading both is two gathers of the base at ZeRO 3, one for each micro batch."""
    rates_of(monkeypatch)
    joint, took = placed_pair(3)
    count = joint["actor"].need.count
    assert took["score"] == pytest.approx(2 * (388 * HOOKS + 2 * count * 3 / 4 / 1e11), rel=1e-3)
    apart, took = placed_pair(2)
    assert took["score"] < 1e-3 and not apart["actor"].joint and not apart["ref"].joint
    # Activations are of twice the rows; beside them ZeRO 3 keeps the same weights whole.
    of_rows = [
        activations(joint["actor"].need.shape, sequences=rows, length=512, dtype="bf16", trains=False,
                    checkpointing=False, head="none", eager=False, device="cuda")
        for rows in (8, 16)
    ]  # fmt: skip
    assert apart["actor"].working["score"] == apart["ref"].working["score"] == of_rows[0]
    whole = gathered(joint["actor"].states, dtype="bf16", zero=3)
    assert joint["actor"].working["score"] == joint["ref"].working["score"] == of_rows[1] + whole


def test_lora_is_named_where_nothing_else_fits(shop):
    """13e9 x 18 bytes are no 80 GiB; 13e9 x 2 are. Nothing takes LoRA by itself, since it changes what is learned."""
    text = HEAD + 'model big { from = "facebook/opt-13b" }\n' + PAIRS + "parallel p { offload = off }\n"
    text += "stage sft { model = model.big, data = data.pairs, batch = 8, length = 512, lr = 1e-5"
    text += ", parallel = parallel.p"
    found = shop.problem(text + " }\n", gpus(1))
    assert "`lora { rank = 16 }` in what trains fits, and learns something else" in found.help
    assert shop.plan(text + "\n  lora { rank = 16 }\n}\n", gpus(1))["stages"][0]["memory"]["fits"]


def packed_need(**changes):
    """OPT-1.3B with adapters of rank 16 beside a base in 4 bits."""
    entry = shape(lookup("facebook/opt-1.3b"))
    layers = linears(entry)
    count = entry.layers * sum(16 * (layer.inputs + layer.outputs) for layer in layers)
    need = Need(
        "actor", entry, parameters(entry) + count, "none", "bf16", False, True, 8, 1, 512, None, None, None, 8, False,
        trained=count, lora=Lora({"rank": 16, "dropout": 0.0, "base": "nf4"}, layers, count),
        packed=entry.layers * 12 * 2048**2,
    )  # fmt: skip
    return replace(need, **changes)


def test_a_base_in_4_bits_by_hand():
    """Of 1.3 B the 12 x 2048^2 of each of 24 layers take 0.516 bytes; a matrix of 2048 x 8192 is read back whole."""
    need, one = packed_need(), gpus(1)
    assert packed(need.shape) == need.packed == 24 * (4 * 2048**2 + 2 * 2048 * 8192)
    placed, whole = (fit([n], Rollout(8, 256, 512, "graph"), one) for n in (need, replace(need, packed=0)))
    (p,), (w,) = placed.engines, whole.engines
    assert p.states.weights == 2 * need.count - int((2 - 0.515869140625) * need.packed)
    assert w.states.weights - p.states.weights == w.states.total - p.states.total
    read = int(2.125 * 2048 * 8192)
    assert p.working["train"] - w.working["train"] == read == placed.sampling.whole - whole.sampling.whole
    assert placed.sampling.cache == whole.sampling.cache


def test_a_base_in_4_bits_is_named_where_adapters_alone_do_not_fit(shop):
    """66e9 x 2 bytes are no 80 GiB, 66e9 x 0.516 are; where the adapters fit it is not named."""
    text = HEAD + 'model big { from = "facebook/opt-66b" }\n' + PAIRS + "parallel p { offload = off }\n"
    text += "stage sft { model = model.big, data = data.pairs, batch = 8, length = 512, lr = 1e-5"
    text += ", parallel = parallel.p"
    for beside in (" }\n", "\n  lora { rank = 16 }\n}\n"):
        found = shop.problem(text + beside, gpus(1))
        assert "`lora { rank = 16, base = nf4 }` in what trains fits, and learns something else" in found.help
    assert shop.plan(text + "\n  lora { rank = 16, base = nf4 }\n}\n", gpus(1))["stages"][0]["memory"]["fits"]
    assert "nf4" not in shop.problem(text.replace("66b", "13b") + " }\n", gpus(1)).help


@pytest.mark.parametrize("copy", [1e11, 1e12])
@pytest.mark.parametrize("rows", [8, 32, 64])
def test_seconds_of_a_base_in_4_bits_by_hand(monkeypatch, rows, copy):
    """A pass reads and writes the packed weights once, 2 bytes for each of 0.516. A step of few rows reads 0.516 or
    makes values of them, whichever takes longer.
    """
    rates_of(monkeypatch, copy=copy)
    need, one = packed_need(per_rank=rows, micro=rows, checkpointing=True), gpus(1)
    took = []
    monkeypatch.setattr(timing, "READ", 0.0)  # launches
    for given in (need, replace(need, packed=0)):
        placed = fit([given], Rollout(rows, 256, 512, "graph"), one)
        took.append(seconds(placed, OnPolicy(rows, Lengths(256), 256, 1, 1, 0, 512), one))
    packed, whole = took
    again = (0.515869140625 + 2) * need.packed / copy
    lies = 0.515869140625 * need.packed / copy
    step = {8: max(lies, 0.5e-12 * need.packed), 32: max(lies, 0.86e-12 * need.packed)}
    step[64] = again + 2 * need.packed / copy
    assert packed["train"] - whole["train"] == pytest.approx(3 * again)  # forward, forward again, backward
    assert packed["generate"] - whole["generate"] == pytest.approx(256 * (step[rows] - 2 * need.packed / copy))


def test_stage_3_is_never_derived_for_a_base_in_4_bits(monkeypatch):
    """On GPUs that its layout does not fit, the last that is tried has the optimizer on the host and no shards."""
    need = packed_need()
    for target in (gpus(1, 1), gpus(4, 1)):
        (placed,) = fit([need], Rollout(8, 256, 512, "graph"), target).engines
        assert placed.zero <= 2 and placed.offload in ("off", "optimizer")
        told = [way.words for way in nearest([need], None, target, Supervised(Lengths(512)))]
        assert not any("zero = 3" in words or "both" in words for words in told)


def test_a_base_in_4_bits_stands_in_the_plan(shop):
    text = ADAPTED.replace("hidden = 32", "hidden = 64").replace("lora { rank = 4 }", "lora { rank = 4, base = nf4 }")
    plan = shop.plan(text)
    validate_plan(plan)
    _, planned, memory = engines(plan)
    assert planned["actor"]["lora"]["base"] == "nf4" and "base" not in planned["critic"]["lora"]
    whole = shop.plan(text.replace("base = nf4", "base = full"))
    assert whole | {"origins": 0} == shop.plan(text.replace(", base = nf4", "")) | {"origins": 0}
    assert keys.keys(plan)["stage.ppo"] != keys.keys(whole)["stage.ppo"]
    assert memory["actor"]["weights"] < engines(whole)[2]["actor"]["weights"]
    assert memory["ref"]["working"]["score"] > engines(whole)[2]["ref"]["working"]["score"]
    assert "rank 4 beside nf4" in plan_text(plan)
    planned["actor"]["zero"] = 3
    with pytest.raises(UserError, match="stage 3 does not partition"):
        validate_plan(plan)


def test_66b_on_one_gpu():
    """65.2e9 weights of 0.516 bytes, and 0.5e9 in the embeddings of two each, beside a critic and a reward model."""
    recipe = load(ROOT / "recipes" / "opt-66b-qlora-1gpu.rlhf").recipe
    memory_mib = hardware.catalog()["h100-80g"]["memory_mib"]
    one = hardware.Target("cuda", "h100-80g", memory_mib * hardware.MIB, 1, 1, "--gpu")
    plan, found = compile(recipe, lock.empty(), one)
    stage, _, memory = engines(plan)
    assert memory["actor"]["weights"] == pytest.approx(64 * 12 * 9216**2 * 0.516 + 2 * 0.67e9, rel=0.01)
    assert stage["memory"]["fits"] and memory["ref"]["total"] == 0 and found == ()


@pytest.mark.parametrize(("name", "size"), [("opt-13b-lora-1gpu", "13b"), ("opt-30b-lora-1gpu", "30b")])
def test_what_one_gpu_of_80_gb_holds(name, size):
    """PPO beside a frozen base of 2 bytes for each parameter (30B: 59.9e9 bytes), the reference without any."""
    recipe = load(ROOT / "recipes" / f"{name}.rlhf").recipe
    memory_mib = hardware.catalog()["h100-80g"]["memory_mib"]
    one = hardware.Target("cuda", "h100-80g", memory_mib * hardware.MIB, 1, 1, "--gpu")
    stage, planned, memory = engines(compile(recipe, lock.empty(), one)[0])
    weights = 2 * parameters(shape(lookup(f"facebook/opt-{size}")))
    assert weights < memory["actor"]["weights"] < 1.005 * weights and memory["ref"]["total"] == 0
    assert stage["memory"]["peak"] < 76 * 2**30 and planned["actor"]["gradient_checkpointing"]
