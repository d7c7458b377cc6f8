"""Passes without padding masks against the model as transformers runs it, and fp32 sums of bf16 gradients."""

import pytest
import torch
from rollouts import TYPES, tiny, tiny_model
from transformers import AutoModelForCausalLM

from rlhfdsl.engines import passes
from rlhfdsl.models.inputs import forward_inputs, length_mask

LENGTHS = torch.tensor([19, 3, 11, 1])
IDS = torch.randint(0, 250, (4, 19), generator=torch.Generator().manual_seed(0))


def logits_and_gradients(model) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of the real tokens only."""
    real = length_mask(LENGTHS, IDS.shape[1])
    logits = model(**forward_inputs(model, IDS, LENGTHS)).logits[real]
    model.zero_grad()
    logits.log_softmax(-1).square().sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", TYPES)
def test_real_tokens_do_not_need_a_mask(name):
    model = tiny_model(name).eval()  # no dropout
    expected, gradients = logits_and_gradients(model)
    passes.without_masks(model)
    found, ours = logits_and_gradients(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_a_type_with_attention_of_its_own_keeps_its_masks():
    model = tiny_model("falcon", num_hidden_layers=1, hidden_size=32, num_attention_heads=2)
    passes.without_masks(model)
    assert model.config._attn_implementation == "sdpa"


def test_masks_are_back_while_they_are_needed():
    model = tiny_model("llama")
    passes.without_masks(model)
    with passes.with_masks(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == passes.CAUSAL


def test_a_saved_model_does_not_name_the_attention(tmp_path):
    model = tiny_model("llama")
    passes.without_masks(model)
    model.save_pretrained(tmp_path)
    assert passes.CAUSAL not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_micro_batches_sum_to_the_bits_of_fp32_sums():
    engine = tiny("llama", dtype="bf16", zero=1)
    sums: dict[str, torch.Tensor] = {}
    for part in (slice(0, 2), slice(2, 4)):
        plain = tiny_model("llama").to(torch.bfloat16)
        passes.without_masks(plain)
        for model, backward in ((plain, torch.Tensor.backward), (engine.deepspeed, engine.backward)):
            backward(model(**forward_inputs(plain, IDS[part], LENGTHS[part])).logits.float().square().mean())
        for name, parameter in plain.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad.float()
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter._hp_grad.view(parameter.shape), sums[name]), name
