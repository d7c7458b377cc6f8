"""Reward and value models."""

from __future__ import annotations

import torch
from small import scratch, spec

from rlhfdsl.models.loading import load_model


def test_a_score_in_bf16_is_not_rounded_to_bf16(tmp_path):
    """Weights and hidden states are bf16, their products and the sum of them are not: 8 bits of a score near 5 are
    steps of 1/32, far more than 32 products of fp32 differ by in another order."""
    critic = load_model(spec("critic", dtype="bf16"), scratch(tmp_path / "small"), revision=None, seed=1).eval()
    ids, lengths = torch.arange(24).view(2, 12), torch.tensor([12, 12])
    backbone, weight = critic.classifier.model, critic.classifier.score.weight
    weight.data.mul_(4)
    hidden = backbone(input_ids=ids).last_hidden_state
    expected = (hidden.double() * weight[0].double()).sum(-1)
    found = critic(ids, lengths)
    assert hidden.dtype == weight.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    assert (expected - expected.bfloat16().double()).abs().max() > 1e-3
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    torch.testing.assert_close(gradient[0].double(), hidden.double().sum((0, 1)), atol=0.05, rtol=0.01)


def test_ids_that_only_the_actor_has_read_the_last_row(tmp_path):
    """Models of one tokenizer differ in their padding rows; an actor now and then samples one of its own."""
    critic = load_model(spec("critic"), scratch(tmp_path / "small", vocab=270), revision=None, seed=1).eval()
    ids, lengths = torch.tensor([[5, 269, 7, 8], [270, 6, 299, 0]]), torch.tensor([4, 3])
    with torch.no_grad():
        found = critic(ids, lengths)
        expected = critic(torch.tensor([[5, 269, 7, 8], [269, 6, 269, 0]]), lengths)
        other = critic(torch.tensor([[5, 268, 7, 8], [268, 6, 268, 0]]), lengths)
    assert torch.equal(found[1, :3], expected[1, :3]) and torch.equal(found[0], expected[0])
    assert not torch.equal(found, other)
