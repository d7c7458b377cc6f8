"""Losses against numbers worked by hand and slow obvious versions."""

import math

import pytest
import torch

from rlhfdsl.training import losses
from rlhfdsl.training.losses import (
    kl_estimate,
    pair_loss,
    policy_loss,
    preference_loss,
    token_mean,
    token_statistics,
    value_loss,
)


def test_log_probs_of_a_two_word_vocabulary():
    # softmax([0, ln 3]) = [1/4, 3/4]; at temperature 2 it is [1, sqrt 3] / (1 + sqrt 3).
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    targets = torch.tensor([0, 1])
    assert token_statistics(logits, targets)[0].exp().tolist() == pytest.approx([0.25, 0.75])
    warm = token_statistics(logits, targets, temperature=2.0)[0].exp().tolist()
    assert warm == pytest.approx([1 / (1 + math.sqrt(3)), math.sqrt(3) / (1 + math.sqrt(3))])


def test_entropy_of_known_distributions():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, -math.inf]])
    found = token_statistics(logits, torch.zeros(3, dtype=torch.long))[1]
    assert found.tolist() == pytest.approx([math.log(4), 0.0, math.log(2)], abs=1e-6)


@pytest.mark.parametrize("which", [(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)])
@pytest.mark.parametrize("rows", [None, [4, 0, 6, 20, 11]])
def test_token_statistics_chunked_equal_the_plain_formula_with_gradients(monkeypatch, which, rows):
    torch.manual_seed(0)
    logits = torch.randn(21, 11, dtype=torch.float64, requires_grad=True)
    rows = None if rows is None else torch.tensor(rows)
    chosen = logits if rows is None else logits[rows]
    targets = torch.randint(11, (len(chosen),))
    weights = torch.randn(2, len(chosen), dtype=torch.float64)
    p = (chosen / 0.8).exp() / (chosen / 0.8).exp().sum(-1, keepdim=True)
    slow = p.gather(1, targets.unsqueeze(1)).squeeze(1).log(), -(p * p.log()).sum(-1)
    mixed = sum(c * (w * x).sum() for c, w, x in zip(which, weights, slow, strict=True))
    (expected,) = torch.autograd.grad(mixed, logits)
    monkeypatch.setattr(losses, "_CHUNK", 11 * 4)  # four tokens a chunk; the last one is shorter
    fast = token_statistics(logits, targets, 0.8, rows)
    for found, wanted in zip(fast, slow, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6)
    mixed = sum(c * (w * x).sum() for c, w, x in zip(which, weights, fast, strict=True) if c)
    (gradient,) = torch.autograd.grad(mixed, logits)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_bf16_logits_are_read_in_fp32():
    torch.manual_seed(1)
    logits = torch.randn(6, 1000).bfloat16().requires_grad_()
    targets = torch.randint(1000, (6,))
    found, entropy = token_statistics(logits, targets)
    wanted = logits.detach().double().log_softmax(-1)
    torch.testing.assert_close(found.double(), wanted.gather(1, targets.unsqueeze(1)).squeeze(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), -(wanted.exp() * wanted).sum(-1), atol=1e-5, rtol=0)
    found.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_token_mean_over_unequal_micro_batches_is_the_global_mean():
    # One row with 1 token of loss 4, another with 3 tokens of loss 0: mean 1, not the mean of means 2.
    first = token_mean(torch.tensor([[4.0, 9.0, 9.0]]), torch.tensor([[True, False, False]]), 4, 1)
    second = token_mean(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[True, True, True]]), 4, 1)
    assert (first + second).item() == 1.0


def test_pair_loss_by_hand():
    # -log sigmoid(0) = ln 2; -log sigmoid(ln 3) = ln(4/3).
    found = pair_loss(torch.tensor([1.0, math.log(3)]), torch.tensor([1.0, 0.0]))
    assert found.tolist() == pytest.approx([math.log(2), math.log(4 / 3)])


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.4, True),  # the gain stops at 1.2 x 2
        (0.5, 2.0, -1.0, False),  # moving away from a good token is not clipped
        (0.5, -2.0, 1.6, True),  # the gain stops at 0.8 x 2
        (1.5, -2.0, 3.0, False),
        (10.0, -2.0, 20.0, False),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, expected, clipped):
    new = torch.tensor([[math.log(ratio)]])
    loss, where = policy_loss(new, torch.zeros(1, 1), torch.tensor([[advantage]]), clip=0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert where.item() is clipped


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    new = torch.tensor([[math.log(10.0), math.log(10.0)]])
    loss, where = policy_loss(new, torch.zeros(1, 2), torch.tensor([[-2.0, 2.0]]), clip=0.2, dual_clip=3.0)
    assert loss[0].tolist() == pytest.approx([6.0, -2.4], rel=1e-6)
    assert where[0].tolist() == [True, True]  # neither token has a gradient
    _, where = policy_loss(new * 0.4, torch.zeros(1, 2), torch.full((1, 2), -2.0), clip=0.2, dual_clip=3.0)
    assert where[0].tolist() == [False, False]  # 10 ** 0.4 = 2.5 is below 3


def test_the_upper_clip_has_its_own_width():
    new = torch.tensor([[math.log(1.5), math.log(0.5)]])
    loss, _ = policy_loss(new, torch.zeros(1, 2), torch.tensor([[2.0, -2.0]]), clip=0.2, clip_high=0.28)
    assert loss[0].tolist() == pytest.approx([-2 * 1.28, 2 * 0.8], rel=1e-6)


def test_preference_loss_by_hand():
    # sigmoid(ln 3) = 3/4: -ln(3/4), and with 10 % smoothing 0.9 ln(4/3) + 0.1 ln 4.
    margin = torch.tensor([0.0, math.log(3)])
    assert preference_loss(margin).tolist() == pytest.approx([math.log(2), math.log(4 / 3)])
    assert preference_loss(margin, 0.1)[1].item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))


def test_a_minibatch_with_random_masks_equals_loops_over_its_tokens():
    """Policy and value loss, reduced over two micro batches, in value and gradient."""
    torch.manual_seed(4)
    shape, lengths = (6, 9), torch.randint(1, 10, (6,))
    mask = torch.arange(9) < lengths.unsqueeze(1)
    old, advantages, old_values, returns = (torch.randn(shape) for _ in range(4))
    new = (old + 0.5 * torch.randn(shape)).requires_grad_()
    values = (old_values + torch.randn(shape)).requires_grad_()
    tokens = int(mask.sum())
    total = 0.0
    for rows in (slice(0, 2), slice(2, 6)):
        policy, _ = policy_loss(new[rows], old[rows], advantages[rows], 0.2, 3.0, 0.28)
        value, _ = value_loss(values[rows], old_values[rows], returns[rows], 0.3)
        part = token_mean(policy + 0.5 * value, mask[rows], tokens, 1)
        part.backward()
        total += part.item()
    slow_new, slow_values = (x.detach().double().requires_grad_() for x in (new, values))
    slow = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        for t in range(int(lengths[i])):
            ratio, a = torch.exp(slow_new[i, t] - old[i, t]), advantages[i, t].item()
            gain = min(ratio * a, ratio.clamp(0.8, 1.28) * a)
            if a < 0:
                gain = max(gain, torch.tensor(3.0 * a, dtype=torch.float64))
            v, r, o = slow_values[i, t], returns[i, t].item(), old_values[i, t].item()
            error = max((v - r) ** 2, (o + (v - o).clamp(-0.3, 0.3) - r) ** 2)
            slow = slow + (0.5 * error - gain) / tokens
    slow.backward()
    assert total == pytest.approx(slow.item(), rel=1e-5)
    torch.testing.assert_close(new.grad.double(), slow_new.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(values.grad.double(), slow_values.grad, atol=1e-6, rtol=1e-4)
    assert not new.grad[~mask].any() and not values.grad[~mask].any()


def test_value_loss_by_hand():
    # old 1, return 2: value 1.1 is inside the clip; value 3 is cut to 1.2 and the larger error (1) is kept;
    # value 1.9 errs by 0.1, but the cut value 1.2 errs by 0.8: (0.8)^2 = 0.64.
    values = torch.tensor([[1.1, 3.0, 1.9]])
    loss, clipped = value_loss(values, torch.ones(1, 3), torch.full((1, 3), 2.0), clip=0.2)
    assert loss[0].tolist() == pytest.approx([0.81, 1.0, 0.64], rel=1e-5)
    assert clipped[0].tolist() == [False, False, True]
    free, never = value_loss(values, torch.ones(1, 3), torch.full((1, 3), 2.0), clip=None)
    assert free[0].tolist() == pytest.approx([0.81, 1.0, 0.01], rel=1e-4)
    assert not never.any()


def test_kl_estimators_by_hand():
    # log p = ln 0.5, log ref = ln 0.25: r = 1/2.
    policy, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl_estimate(policy, ref, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(policy, ref, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate(policy, ref, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))


def test_k1_and_k3_average_to_the_exact_kl():
    torch.manual_seed(0)
    p, q = torch.randn(5).softmax(0), torch.randn(5).softmax(0)
    exact = (p * (p / q).log()).sum().item()
    for estimator in ("k1", "k3"):
        mean = (p * kl_estimate(p.log(), q.log(), estimator)).sum().item()
        assert mean == pytest.approx(exact, rel=1e-5)
