"""The kernels of the token statistics against the same in torch, on a CUDA device."""

import math

import pytest
import torch

from rlhfdsl.training import losses

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("vocabulary", [7, 4096, 50272])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [False, True])
def test_kernels_equal_the_torch_version(vocabulary, dtype, cut):
    kernels = losses._kernels()
    make = torch.Generator(device="cuda").manual_seed(0)
    logits = 4 * torch.randn(33, vocabulary, device="cuda", generator=make)
    logits[:, 1] = -math.inf  # a token that a mask took away
    logits = logits.to(dtype)
    rows = torch.randperm(33, device="cuda", generator=make)[:20] if cut else None
    targets = torch.randint(2, vocabulary, (20 if cut else 33,), device="cuda", generator=make)
    found = kernels.statistics(logits, targets, 0.8, rows)
    for mine, wanted in zip(found, losses._statistics(logits, targets, 0.8, rows), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)
    log_probs, entropy, norm = found
    weights = torch.randn(2, len(targets), device="cuda", generator=make)
    for of in ((weights[0], None), (None, weights[1]), (weights[0], weights[1])):
        arguments = (logits, targets, 0.8, rows, norm, entropy, *of)
        # a logit of 20 is known to 2e-6, and so is its p relatively; bf16 has 8 bits
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(
            kernels.gradient(*arguments), losses._gradient(*arguments), atol=1e-6, rtol=tolerance
        )


def test_no_targets_have_no_gradient():
    logits = torch.randn(4, 11, device="cuda", requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64, device="cuda")
    losses.token_statistics(logits, none, 1.0, none)[0].sum().backward()
    assert not logits.grad.any()
