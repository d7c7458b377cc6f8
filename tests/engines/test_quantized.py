"""Adapters beside a base in 4 bits: what is packed, what stays, and that all else is as beside whole weights."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from rollouts import joined, same, sampled
from rollouts import learn as learn_once
from safetensors.torch import load_file
from small import engine, model_entry, scratch, spec
from test_engine import LENGTHS, nll, rollout, some_ids
from test_lora import FULL, learn, tensors
from test_peephole import Slow, same_logits
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhfdsl.engines import artifacts
from rlhfdsl.engines.artifacts import save_model
from rlhfdsl.engines.base import BasePolicy
from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.engines.rollout.eager import EagerSampler
from rlhfdsl.engines.rollout.fusing import products
from rlhfdsl.engines.rollout.graph import GraphSampler
from rlhfdsl.engines.rollout.operands import SCALES, Packed
from rlhfdsl.engines.rollout.peephole import Peephole
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.models import quantized
from rlhfdsl.models.loading import load_model, parameter_count
from rlhfdsl.models.lora import NAME, lora_layers
from rlhfdsl.models.tokenizers import byte_tokenizer
from rlhfdsl.planning.adapters import linears
from rlhfdsl.planning.catalog import shape
from rlhfdsl.planning.memory import PACKED, states

ARCHS = ("llama", "opt", "gpt2", "gpt_neox")


def lora(rank=4, targets="all-linear", **changes):
    return {"rank": rank, "alpha": 2 * rank, "dropout": 0.0, "targets": targets, "lr": None, "base": "nf4"} | changes


def packed(module) -> dict[str, tuple[torch.Tensor, ...]]:
    """Copies of all that a base in 4 bits is made of."""
    found = {}
    for path, layer in quantized.layers(module).items():
        state = layer.weight.quant_state
        parts = layer.weight.data, state.absmax, state.offset, state.state2.absmax
        found[path] = tuple(part.clone() for part in parts)
    return found


def unpacked(module):
    """A copy of a module whose layers in 4 bits are plain ones of the weights that those compute with."""
    plain = copy.deepcopy(module)
    for path, layer in quantized.layers(module).items():
        whole = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=module.dtype)
        weight = quantized.read_back(layer)
        whole.weight.data = weight.T if quantized.transposed(layer) else weight
        if layer.bias is not None:
            whole.bias.data = layer.bias.data.clone()
        plain.set_submodule(path, whole.requires_grad_(False))
    return plain


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for path in one for a, b in zip(one[path], other[path], strict=True))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Models of two layers on the disk, by type."""
    folder = tmp_path_factory.mktemp("sources")
    options = {"hidden": 64, "intermediate": 128, "kv_heads": 4}
    return {arch: scratch(folder / arch, type=arch, **options) for arch in ARCHS}


@pytest.mark.parametrize(("arch", "count"), [("llama", 7), ("opt", 6), ("gpt2", 4), ("gpt_neox", 4)])
def test_the_layers_of_the_decoder_are_packed_and_nothing_else(sources, arch, count):
    entry = spec(zero=1, dtype="bf16", lora=lora(targets=["fc1", "q_proj", "c_fc", "dense"]))
    policy = engine(PolicyEngine, sources[arch], entry)
    found = quantized.layers(policy.module)
    assert len(found) == 2 * count and all(layer.weight.dtype == torch.uint8 for layer in found.values())
    plain = AutoModelForCausalLM.from_pretrained(sources[arch])
    adapters = sum(p.numel() for name, p in policy.module.named_parameters() if ".lora_" in name)
    assert parameter_count(policy.module) == sum(p.numel() for p in plain.parameters()) + adapters
    others = [p for p in policy.module.parameters() if not hasattr(p, "quant_state")]
    assert others and all(p.dtype == torch.bfloat16 for p in others)
    for layer in found.values():  # NF4 of the model's own weights: half a step is at most 0.152 of a block's largest
        weight, state = quantized.read_back(layer), layer.weight.quant_state
        assert state.quant_type == "nf4" and state.nested and state.blocksize == 64 and weight.dtype == torch.bfloat16
    path, layer = next(iter(found.items()))
    own = plain.get_parameter(f"{path.replace('.base_layer', '')}.weight").detach()
    weight = quantized.read_back(layer).float()
    assert (weight - own).abs().max() <= 0.16 * own.abs().max() and not torch.equal(weight, own)


def test_bytes_are_those_of_the_plan(tmp_path):
    """A half, a scale of 8 bits for 64 weights, and one of 32 bits for 256 of those; each layer has a table besides."""
    numbers = model_entry(hidden=128, intermediate=256, kv_heads=4)["arch"]
    source = scratch(tmp_path / "model", **numbers)
    policy = engine(PolicyEngine, source, spec(zero=1, dtype="bf16", lora=lora()))
    count = sum(2 * layer.inputs * layer.outputs for layer in linears(shape(numbers)))
    found = quantized.layers(policy.module).values()
    assert count == sum(quantized.size(layer.weight).numel() for layer in found)
    held = sum(
        part.numel() * part.element_size() for layer in found
        for part in (layer.weight.data, layer.weight.quant_state.absmax, layer.weight.quant_state.state2.absmax)
    )  # fmt: skip
    assert held == PACKED * count
    given = {"dtype": "bf16", "offload": "off", "trains": True, "nodes": 1, "gpus": 1, "trained": 10}
    for zero in (1, 2):
        both = [states(10**6, 10, zero=zero, packed=part, **given) for part in (0, 10**5)]
        assert both[0].weights - both[1].weights == int((2 - PACKED) * 10**5)
        assert both[0].total - both[1].total == both[0].weights - both[1].weights


@pytest.mark.parametrize(("zero", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")])
def test_only_adapters_move_and_the_base_stays_a_policy_of_its_own(sources, zero, dtype):
    actor = engine(HybridEngine, sources["llama"], spec(zero=zero, dtype=dtype, lr=1e-2, lora=lora()))
    base = BasePolicy(spec("ref", trains=False), actor)
    frozen, others, adapters = packed(actor.module), tensors(actor.module, False), tensors(actor.module, True)
    with torch.no_grad():
        start = actor.logits(some_ids(), LENGTHS)  # adapters begin as 0
    for _ in range(2):
        learn(actor)
        rollout(actor, [[10, 20, 30], [7]])
        with torch.no_grad():
            assert torch.equal(base.logits(some_ids(), LENGTHS), start)
            assert not torch.allclose(actor.logits(some_ids(), LENGTHS), start, atol=1e-2)
    assert equal(packed(actor.module), frozen)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors(actor.module, False).items())
    assert not any(torch.equal(tensor, adapters[name]) for name, tensor in tensors(actor.module, True).items())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_are_those_of_plain_layers_of_the_same_weights(sources, arch, dtype):
    """In bf16 within two units of its last place (2^-8) of the largest entry: both sides round the same products."""
    policy = engine(PolicyEngine, sources[arch], spec(zero=1, dtype=dtype, lora=lora()))
    learn(policy, 1)
    policy.eval()
    module = policy.module
    plain = unpacked(module)
    assert not quantized.layers(plain) and len(lora_layers(plain)) == len(lora_layers(module))
    found = []
    for model in (module, plain):
        logits = model(input_ids=some_ids()).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), some_ids()[:, 1:].flatten())
        trained = [p for name, p in model.named_parameters() if ".lora_" in name]
        found.append(torch.autograd.grad(loss, trained))
    for one, other in zip(*found, strict=True):
        tolerance = (1e-5 if dtype == "fp32" else 2**-7) * other.abs().max()
        assert other.abs().max() > 0 and (one - other).abs().max() <= tolerance


def test_checkpointing_changes_no_gradient(sources):
    found = []
    for checkpointing in (False, True):
        entry = spec(zero=1, lr=1e-2, lora=lora(), checkpointing=checkpointing)
        policy = engine(PolicyEngine, sources["llama"], entry)
        learn(policy)
        found.append(tensors(policy.module, True))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_autograd_keeps_what_it_keeps_beside_whole_weights(sources, arch):
    """So that the plan of activations holds: what is read back for a product is not kept for the backward pass."""
    kept = []
    for entry in (lora(), lora(base="full")):
        policy = engine(PolicyEngine, sources[arch], spec(zero=1, dtype="bf16", lora=entry))
        own = {p.untyped_storage().data_ptr() for p in (*policy.module.parameters(), *policy.module.buffers())}
        held = {}

        def keep(tensor, own=own, held=held):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            policy.logits(some_ids(), FULL)
        kept.append(sum(size for size, _ in held.values()))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("arch", ARCHS)
def test_random_weights_are_like_those_that_were_read(sources, arch):
    """What `rlhf bench` measures with: the same layers packed, of the same size, and nothing left without data."""
    read = load_model(spec(dtype="bf16", lora=lora()), sources[arch], revision=None, seed=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sources[arch]), dtype=torch.bfloat16)
    quantized.draw(model, quantized.config(model, torch.bfloat16, None), torch.device("cpu"))
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    sizes = [{path.replace(".base_layer", ""): layer.weight.shape for path, layer in quantized.layers(m).items()}
             for m in (read, model)]  # fmt: skip
    assert sizes[0] == sizes[1]
    assert model(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_a_cast_leaves_packed_weights_alone(sources):
    """As DeepSpeed casts a module to its type."""
    model = load_model(spec(dtype="fp32", lora=lora()), sources["llama"], revision=None, seed=1)
    before = packed(model)
    for cast in (model.half, model.bfloat16, model.float, lambda: model.to(torch.bfloat16), lambda: model.to("cpu")):
        cast()
        assert equal(packed(model), before)
    assert model.dtype == torch.bfloat16


def test_training_after_inference_has_gradients(sources):
    """bitsandbytes would lay a layer's weights out anew at its first inference on some CPUs, and then not train."""
    policy = engine(PolicyEngine, sources["llama"], spec(dtype="bf16", zero=1, lora=lora()))
    policy.eval()
    with torch.no_grad():
        policy.logits(some_ids(), LENGTHS)
    policy.train()
    policy.backward(nll(policy, some_ids(), LENGTHS, [0, 1, 2, 3], (LENGTHS - 1).sum()))
    assert policy.step()["grad_norm"] > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_a_static_cache_samples_as_generate_does(sources, arch):
    policy = engine(HybridEngine, sources[arch], spec(lr=1e-2, lora=lora()))
    graph, eager = GraphSampler(policy), EagerSampler(policy)
    assert products(policy.module) == []  # packed weights are no views of one product
    for _ in range(2):
        same(sampled(graph), sampled(eager))
        learn_once(policy)
    same(sampled(graph), sampled(eager))
    joined(policy)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_fewer_kernels_leave_packed_layers_alone(sources, arch, few):
    """What waits for the product after it is computed before a layer in 4 bits reads it."""
    policy = engine(HybridEngine, sources[arch], spec(lr=1e-2, lora=lora()))
    learn(policy)
    slow = Slow(few)
    with torch.no_grad():
        expected = policy.module(some_ids()).logits
        with Peephole(slow):
            found = policy.module(some_ids()).logits
    torch.testing.assert_close(found, expected)
    assert slow.calls


class SlowPacked(Slow):
    unpacked = 0

    def product(self, x, weight, bias, *more):
        if isinstance(weight, Packed):
            from bitsandbytes.functional import get_4bit_type

            self.unpacked += 1
            both = torch.stack([weight.codes.flatten() >> 4, weight.codes.flatten() & 15], -1).flatten()
            maxima = weight.maxima.repeat_interleave(SCALES)[: len(weight.scales)]
            scales = weight.table[weight.scales.long()] * maxima + weight.offset
            values = get_4bit_type("nf4", device="cpu")[both.long()].view(-1, quantized.BLOCK) * scales[:, None]
            weight = values.view(weight.shape)
        super().product(x, weight, bias, *more)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_are_given_packed_weights_with_their_adapters(sources, arch, few, monkeypatch):
    """Slow kernels read the codes by hand: a table of sixteen, two scales and the offset."""
    policy = engine(HybridEngine, sources[arch], spec(lr=1e-2, lora=lora()))
    learn(policy)
    slow = SlowPacked(few)
    same_logits(slow, policy.module, some_ids(), monkeypatch)
    assert slow.adapters == len(lora_layers(policy.module))
    assert slow.unpacked == (len(quantized.layers(policy.module)) if few else 0)


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_saved_is_what_was_trained(sources, tmp_path, monkeypatch, arch):
    """The base as it was read back and alpha / rank x B A, in files of a bounded size."""
    policy = engine(PolicyEngine, sources[arch], spec(zero=1, lr=1e-2, lora=lora(targets="all-linear")))
    learn(policy)
    before = packed(policy.module)
    save_model(policy, byte_tokenizer(), tmp_path / "one", stop_ids=(258,))
    monkeypatch.setattr(artifacts, "PART", 50_000)
    save_model(policy, byte_tokenizer(), tmp_path / "many", stop_ids=(258,))
    assert equal(packed(policy.module), before)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3 and index.keys() == whole.keys() == load_file(
        f"{sources[arch]}/model.safetensors"
    ).keys()
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name])
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert "quantization_config" not in config
    with torch.no_grad():
        expected = policy.logits(some_ids(), FULL)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
        torch.testing.assert_close(loaded(some_ids()).logits, expected, atol=1e-5, rtol=1e-5)
        start = AutoModelForCausalLM.from_pretrained(sources[arch])
        assert not torch.allclose(start(some_ids()).logits, expected, atol=1e-2)
    assert (tmp_path / "one-adapter" / "adapter_model.safetensors").exists()


def test_a_bf16_merge_is_rounded_once(sources, tmp_path):
    policy = engine(PolicyEngine, sources["opt"], spec(zero=1, dtype="bf16", lora=lora(targets=["fc1"])))
    for layer in lora_layers(policy.module):
        torch.nn.init.normal_(layer.lora_B[NAME].weight, generator=torch.Generator().manual_seed(1))
    save_model(policy, byte_tokenizer(), tmp_path / "model", stop_ids=(258,))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    for path, layer in quantized.layers(policy.module).items():
        expected, plain = quantized.read_back(layer), path.removesuffix(".base_layer")
        if plain != path:
            adapter = policy.module.get_submodule(plain)
            a, b = (part[NAME].weight.double() for part in (adapter.lora_A, adapter.lora_B))
            expected = (expected.double() + 2 * (b @ a)).to(torch.bfloat16)
        assert torch.equal(merged.get_parameter(f"{plain}.weight"), expected)


def test_a_critic_trains_its_head_beside_a_packed_base(sources, tmp_path):
    critic = engine(ScalarEngine, sources["llama"], spec("critic", zero=2, lr=1e-3, lora=lora(2, ["q_proj"], lr=1e-2)))
    assert critic.module.classifier.score.weight.requires_grad and len(quantized.layers(critic.module)) == 14
    trained = tensors(critic.module, True)
    critic.train()
    critic.backward(critic.scores(some_ids(), LENGTHS).square().mean())
    critic.step()
    moved = {name for name, tensor in tensors(critic.module, True).items() if not torch.equal(tensor, trained[name])}
    assert any(name.endswith("score.weight") for name in moved) and any(".lora_B." in name for name in moved)
    save_model(critic, byte_tokenizer(), tmp_path / "critic", stop_ids=(258,))
    critic.eval()
    with torch.no_grad():
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
        expected = critic.scores(some_ids(), FULL)
        torch.testing.assert_close(loaded(some_ids()).logits[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_a_state_dict_has_no_scales(sources):
    """Those of a checkpoint would be of the frozen base, which comes from where the engine came."""
    policy = engine(PolicyEngine, sources["llama"], spec(lora=lora()))
    assert not [name for name in policy.module.state_dict() if "absmax" in name or "quant" in name]
    kept = policy.deepspeed.module_state_dict(exclude_frozen_parameters=True)
    assert kept.keys() - {"lm_head.weight"} == tensors(policy.module, True).keys()  # a tied weight has a second name


def test_bitsandbytes_asks_the_hub_for_nothing(tmp_path):
    """A package `kernels` that is there is not asked, and is there again afterwards."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **options):\n    raise SystemExit('asked')\n")
    code = "from rlhfdsl.models import lora; import kernels, bitsandbytes; print(kernels.__name__)"
    path = os.pathsep.join((str(tmp_path), *sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.strip() == "kernels", done.stderr
    assert "kernels-community" not in done.stderr


def test_without_bitsandbytes_it_says_so(sources, monkeypatch):
    monkeypatch.setattr(quantized, "HERE", False)
    with pytest.raises(UserError, match="bitsandbytes") as raised:
        load_model(spec(lora=lora()), sources["llama"], revision=None, seed=1)
    assert raised.value.code == "E0823" and "rlhfdsl[qlora]" in raised.value.help


def test_rows_of_broken_blocks_are_refused(source):
    """32 inputs are half a block. bitsandbytes would read them back wrongly on a CPU, and say nothing."""
    with pytest.raises(UserError) as raised:
        load_model(spec(lora=lora()), source, revision=None, seed=1)
    assert raised.value.code == "E0824" and "has 32 inputs, which are not a multiple of 64" in raised.value.help


@pytest.mark.parametrize("width", [64, 192, 576])
def test_what_is_read_back_is_what_was_packed(width):
    """Of normal weights the error of NF4 is 9 % (root mean square), whatever the width; of others it would be 140 %."""
    from bitsandbytes.nn import Params4bit

    weight = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    packed = Params4bit(weight.clone(), compress_statistics=True, quant_type="nf4").to("cpu")
    layer = torch.nn.Linear(width, 40)
    layer.weight, layer.source_cls = packed, torch.nn.Linear
    assert 0.085 < (quantized.read_back(layer) - weight).square().mean().sqrt() < 0.1


def test_experts_in_one_tensor_are_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=259, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    with pytest.raises(UserError, match="cannot be held in 4 bits") as raised:
        load_model(spec(lora=lora()), str(tmp_path / "experts"), revision=None, seed=1)
    assert raised.value.code == "E0824" and "base = full" in raised.value.help
