"""Adapters beside frozen weights: what trains, what stays, the base as a policy of its own, and what is saved."""

import json

import pytest
import torch
from peft import PeftModel
from rollouts import LORA, joined, tiny
from rollouts import learn as learn_once
from small import engine, scratch, spec
from test_engine import LENGTHS, nll, rollout, some_ids
from test_peephole import Slow, same_logits
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhfdsl.engines.artifacts import save_model
from rlhfdsl.engines.base import BasePolicy
from rlhfdsl.engines.ema import MovingAverage
from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.engines.rollout.eager import EagerSampler
from rlhfdsl.engines.rollout.graph import GraphSampler
from rlhfdsl.engines.rollout.operands import adapter_of
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.models.loading import gathered
from rlhfdsl.models.lora import adapters_off, adapters_on_half, lora_layers
from rlhfdsl.models.tokenizers import byte_tokenizer

ALL = "all-linear"
FULL = torch.full((4,), 12)


def lora(rank=4, targets=ALL, **changes):
    return {"rank": rank, "alpha": 2 * rank, "dropout": 0.0, "targets": targets, "lr": None} | changes


def learn(policy, times=3):
    for _ in range(times):
        policy.train()
        policy.backward(nll(policy, some_ids(), LENGTHS, [0, 1, 2, 3], (LENGTHS - 1).sum()))
        policy.step()
    policy.eval()


def tensors(module, trained):
    """Copies of the whole parameters that train, or of those that do not."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad == trained:
            with gathered([parameter]):
                found[name] = parameter.detach().clone()
    return found


@pytest.mark.parametrize(("zero", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_only_adapters_move_and_the_base_stays_a_policy_of_its_own(source, zero, dtype):
    actor = engine(HybridEngine, source, spec(zero=zero, dtype=dtype, lr=1e-2, lora=lora()))
    base = BasePolicy(spec("ref", trains=False), actor)
    plain = engine(PolicyEngine, source, spec("ref", trains=False, dtype=dtype))
    frozen, adapters = tensors(actor.module, False), tensors(actor.module, True)
    assert adapters and all(".lora_" in name for name in adapters)
    for _ in range(2):
        learn(actor)
        rollout(actor, [[10, 20, 30], [7]])
        with torch.no_grad():
            reference = base.logits(some_ids(), LENGTHS)
            assert torch.equal(reference, plain.logits(some_ids(), LENGTHS))
            assert not torch.allclose(actor.logits(some_ids(), LENGTHS), reference, atol=1e-2)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in tensors(actor.module, False).items())
    assert not any(torch.equal(tensor, adapters[name]) for name, tensor in tensors(actor.module, True).items())


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "phi3", "gemma2", "gpt2", "gpt_neox", "opt", "opt post-norm", "bloom", "falcon", "mpt"]
)
def test_one_forward_reads_policy_and_base(name):
    policy = tiny(name, lora=LORA)
    learn_once(policy)
    joined(policy)


def test_a_layer_that_does_not_see_whole_rows_is_no_half():
    """As the experts of a mixture would see tokens of both halves in an order of their own."""
    policy = tiny("llama", lora=LORA)
    with pytest.raises(RuntimeError, match="of a batch of 49 tokens"), adapters_on_half(lora_layers(policy.module), 49):
        policy.logits(some_ids(), LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [EagerSampler, GraphSampler])
def test_the_base_has_the_same_bits_after_a_thousand_rounds(source, sampler):
    actor = engine(HybridEngine, source, spec(zero=1, dtype="bf16", lr=1e-3, lora=lora()))
    actor.sampler = sampler(actor)
    frozen, adapters = tensors(actor.module, False), tensors(actor.module, True)
    for _ in range(1000):
        rollout(actor, [[10, 20, 30], [7]])
        learn(actor, times=1)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in tensors(actor.module, False).items())
    assert not any(torch.equal(tensor, adapters[name]) for name, tensor in tensors(actor.module, True).items())


@pytest.mark.parametrize(("arch", "zero"), [("llama", 0), ("llama", 3), ("gpt2", 3), ("opt", 0), ("gpt_neox", 0)])
def test_the_merged_artifact_is_the_trained_policy(tmp_path, arch, zero):
    source = scratch(tmp_path / "start", type=arch, kv_heads=4, tied=True)
    policy = engine(PolicyEngine, source, spec(zero=zero, lr=1e-2, lora=lora()))
    learn(policy)
    before = tensors(policy.module, True)
    save_model(policy, byte_tokenizer(), tmp_path / "model", stop_ids=(258,))
    with torch.no_grad():
        expected = policy.logits(some_ids(), FULL)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(loaded(some_ids()).logits, expected, atol=1e-5, rtol=1e-5)
        start = AutoModelForCausalLM.from_pretrained(source)
        assert start.state_dict().keys() == loaded.state_dict().keys()
        assert not torch.allclose(start(some_ids()).logits, expected, atol=1e-2)
        again = PeftModel.from_pretrained(start, tmp_path / "model-adapter")
        torch.testing.assert_close(again(some_ids()).logits, expected, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(policy.module, True).items())
    assert not list(tmp_path.glob("*.partial"))
    config = json.loads((tmp_path / "model-adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == source and config["target_modules"] == sorted(config["target_modules"])


def test_a_bf16_merge_is_rounded_once(source, tmp_path):
    policy = engine(PolicyEngine, source, spec(zero=1, dtype="bf16", lora=lora(targets=["q_proj"])))
    for name, parameter in policy.module.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    save_model(policy, byte_tokenizer(), tmp_path / "model", stop_ids=(258,))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").state_dict()
    for name, tensor in policy.module.state_dict().items():
        if ".lora_" in name:
            continue
        if "q_proj" in name:
            a, b = (policy.module.state_dict()[name.replace("base_layer", f"lora_{m}.default")] for m in "AB")
            tensor = (tensor.double() + 2 * (b.double() @ a.double())).to(torch.bfloat16)
        assert torch.equal(merged[name.replace(".base_layer", "")], tensor)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_critic_trains_its_head_beside_adapters(source, tmp_path, zero):
    critic = engine(ScalarEngine, source, spec("critic", zero=zero, lr=1e-3, lora=lora(2, ["q_proj"], lr=1e-2)))
    trained = tensors(critic.module, True)
    assert sum(tensor.numel() for tensor in trained.values()) == 32 + 2 * 2 * (32 + 32)  # the head, 2 layers of rank 2
    critic.train()
    critic.backward(critic.scores(some_ids(), LENGTHS).square().mean())
    assert critic.step()["lr"] == 1e-3
    assert sorted(group["lr"] for group in critic.deepspeed.optimizer.param_groups) == pytest.approx([1e-3, 1e-2])
    moved = {name for name, tensor in tensors(critic.module, True).items() if not torch.equal(tensor, trained[name])}
    assert any(name.endswith("score.weight") for name in moved) and any(".lora_B." in name for name in moved)
    save_model(critic, byte_tokenizer(), tmp_path / "critic", stop_ids=(258,))
    critic.eval()
    with torch.no_grad():
        expected = critic.scores(some_ids(), FULL)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
        torch.testing.assert_close(loaded(some_ids()).logits[:, 0], expected, atol=1e-5, rtol=1e-5)
        start = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
        start.config.pad_token_id = loaded.config.pad_token_id
        again = PeftModel.from_pretrained(start, tmp_path / "critic-adapter")
        torch.testing.assert_close(again(some_ids()).logits[:, 0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("zero", [0, 3])
def test_checkpointing_changes_no_gradient(source, zero):
    found = []
    for checkpointing in (False, True):
        policy = engine(PolicyEngine, source, spec(zero=zero, lr=1e-2, lora=lora(), checkpointing=checkpointing))
        learn(policy)
        found.append(tensors(policy.module, True))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_average_is_of_the_adapters(source):
    policy = engine(PolicyEngine, source, spec(zero=2, lr=1e-2, lora=lora()))
    average = MovingAverage(policy, 0.9)
    assert average.shard.keys() == tensors(policy.module, True).keys()
    frozen = tensors(policy.module, False)
    learn(policy)
    average.update()
    average.write()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in tensors(policy.module, False).items())
    for name, tensor in tensors(policy.module, True).items():
        assert torch.equal(tensor, average.shard[name])


def test_adapters_are_drawn_from_the_seed_of_the_stage(source):
    first, same, other = (
        tensors(engine(PolicyEngine, source, spec(lora=lora()), seed=seed).module, True) for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_targets_that_are_in_no_model(source):
    with pytest.raises(UserError, match="no layer of the model") as raised:
        engine(PolicyEngine, source, spec(lora=lora(targets=["c_attn"])))
    assert raised.value.code == "E0822"


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("name", ["opt", "llama", "gpt2"])
def test_kernels_are_given_layers_with_their_adapters(name, few, monkeypatch):
    """Where the kernels do not take the product of a layer, or it is no `nn.Linear`, its adapter comes after it."""
    policy = tiny(name, lora=lora())
    learn(policy)
    slow = Slow(few)
    same_logits(slow, policy.module, some_ids(), monkeypatch)
    assert slow.adapters == len(lora_layers(policy.module))


def test_kernels_leave_an_adapter_that_is_off_alone():
    policy = tiny("opt", lora=lora())
    layer = lora_layers(policy.module)[0]
    policy.eval()
    assert adapter_of(layer).factor == 2.0
    with adapters_off([layer]):
        assert adapter_of(layer) is None
    policy.train()
    assert adapter_of(layer) is None  # dropout
