"""Norms in one kernel against those of transformers."""

import pytest
import torch
from rollouts import TYPES, tiny_model
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rlhfdsl.engines import norms
from rlhfdsl.engines.rollout.fusing import fused

IDS = torch.randint(0, 250, (3, 17), generator=torch.Generator().manual_seed(0))


def logits_and_gradients(model, ids) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.float().log_softmax(-1).square().sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters()]


def test_a_norm_with_more_than_a_weight_is_left_alone():
    assert norms.is_plain(LlamaRMSNorm) and norms.is_plain(Qwen3RMSNorm)
    assert not any(norms.is_plain(kind) for kind in (Gemma2RMSNorm, Gemma3RMSNorm, BambaRMSNormGated))
    assert norms.epsilon(LlamaRMSNorm(8, eps=0.25)) == 0.25 and norms.epsilon(torch.nn.LayerNorm(8)) is None


@pytest.mark.parametrize("name", TYPES)
def test_a_model_computes_what_it_did(name):
    model = tiny_model(name).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.1)  # of a norm too, whose weight is 1 or 0 at first
    expected, gradients = logits_and_gradients(model, IDS)
    norms.in_one_kernel(model)
    found, ours = logits_and_gradients(model, IDS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


def test_a_capture_leaves_them_as_they_were():
    model = tiny_model("llama").eval()
    norms.in_one_kernel(model)
    before = [module.__dict__.get("forward") for module in model.modules()]
    assert any(before)
    with fused(model, compiled=False):
        pass
    assert [module.__dict__.get("forward") for module in model.modules()] == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_gpu_has_one_kernel_for_them(name):
    """In bf16, beside the same in fp32: no further from it than transformers' own norms, and in fewer launches."""
    exact, plain, one = (tiny_model(name).eval().cuda() for _ in range(3))
    for model in (plain, one):
        model.load_state_dict(exact.state_dict())
        model.bfloat16()
    exact.load_state_dict({key: value.float() for key, value in plain.state_dict().items()})
    norms.in_one_kernel(one)
    ids = IDS.cuda()
    (expected, _), (theirs, _), (ours, _) = (logits_and_gradients(model, ids) for model in (exact, plain, one))
    errors = [(found.float() - expected).abs().mean() for found in (ours, theirs)]
    assert errors[0] < 1.25 * errors[1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        logits_and_gradients(one, ids)
    names = {event.key for event in seen.key_averages()}
    assert "aten::_fused_rms_norm" in names and "aten::rsqrt" not in names
