"""Rewards, advantages and the KL controller against hand-worked numbers and a quadratic reference."""

import math

import pytest
import torch

from rlhfdsl.training.advantages import (
    advantages_and_returns,
    explained_variance,
    next_kl_coefficient,
    overlong_penalty,
    token_rewards,
    whiten,
)


def alone(tensor):
    return tensor


def test_rewards_put_the_score_on_the_last_token():
    kl = torch.tensor([[0.1, 0.2, 0.7], [0.5, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = token_rewards(torch.tensor([1.0, -2.0]), kl, mask, coefficient=0.5)
    expected = torch.tensor([[-0.05, -0.10, 1.0 - 0.35], [-2.0 - 0.25, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)
    # The sum over an answer is its score minus coefficient x its whole KL.
    torch.testing.assert_close(rewards.sum(1), torch.tensor([1.0 - 0.5 * 1.0, -2.0 - 0.5 * 0.5]))


def test_a_long_answer_costs_what_it_has_of_the_buffer():
    # answers of at most 10 tokens, the last 4 of them the buffer: 6 are free, 9 have 3 of the 4
    lengths = torch.tensor([1, 6, 7, 9, 10])
    assert overlong_penalty(lengths, 10, buffer=4, penalty=2.0).tolist() == [0.0, 0.0, 0.5, 1.5, 2.0]
    assert overlong_penalty(lengths, 10, buffer=10, penalty=1.0)[-1] == 1.0


def test_gae_by_hand():
    # gamma 1, lambda 0.5; deltas: 0 + 2 - 1 = 1, 0 + 4 - 2 = 2, 3 + 0 - 4 = -1
    # advantages from the end: -1, 2 - 0.5 = 1.5, 1 + 0.75 = 1.75
    rewards, values = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma=1.0, lam=0.5)
    assert advantages[0].tolist() == [1.75, 1.5, -1.0]
    assert returns[0].tolist() == [2.75, 3.5, 3.0]


def test_gae_equals_the_sum_over_all_later_deltas():
    torch.manual_seed(1)
    batch, width, gamma, lam = 5, 9, 0.97, 0.9
    rewards, values = torch.randn(batch, width), torch.randn(batch, width)
    lengths = torch.tensor([9, 1, 4, 7, 2])
    mask = torch.arange(width) < lengths.unsqueeze(1)
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma, lam)
    for row in range(batch):
        length = int(lengths[row])
        v = values[row].tolist()[:length] + [0.0]
        deltas = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(width):
            slow = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(slow, abs=1e-5)
    assert not returns[~mask].any()


def test_lambda_one_gives_the_discounted_return():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    values, mask = torch.randn(1, 3), torch.ones(1, 3, dtype=torch.bool)
    _, returns = advantages_and_returns(rewards, values, mask, gamma=0.5, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[1 + 1 + 1, 2 + 2, 4.0]]))


def test_whitening_ignores_padding_and_uses_all_ranks():
    mask = torch.tensor([[True, True, False], [True, True, False]])
    x = torch.tensor([[1.0, 3.0, 1e6], [5.0, 7.0, -1e6]])
    # mean 4, biased variance (9 + 1 + 1 + 9) / 4 = 5
    found = whiten(x, mask, alone)
    expected = torch.tensor([[-3, -1, 0], [1, 3, 0]]) / math.sqrt(5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    # Two ranks, one row each: a collective sum that knows the other rank's row gives the same numbers.
    other = iter([
        torch.tensor([2.0, 12.0], dtype=torch.float64),
        torch.tensor(1.0 + 9.0, dtype=torch.float64),
    ])  # fmt: skip
    first_rank = whiten(x[:1], mask[:1], lambda mine: mine + next(other))
    torch.testing.assert_close(first_rank, found[:1])


def test_whitening_one_token_does_not_blow_up():
    found = whiten(torch.tensor([[3.0, 0.0]]), torch.tensor([[True, False]]), alone)
    assert found.tolist() == [[0.0, 0.0]]


def test_explained_variance():
    returns = torch.tensor([[1.0, 3.0, 99.0]])
    mask = torch.tensor([[True, True, False]])
    assert explained_variance(returns.clone(), returns, mask, alone) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(1, 3), returns, mask, alone) == pytest.approx(0.0)
    assert math.isnan(explained_variance(returns, torch.ones(1, 3), mask, alone))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.2), (12.0, 0.2 * (1 + 0.2 * 0.1)), (3.0, 0.2 * (1 - 0.2 * 0.1)), (6.6, 0.2 * (1 + 0.1 * 0.1))],
)
def test_kl_controller_by_hand(kl, expected):
    found = next_kl_coefficient(0.2, kl, target=6.0, horizon=1000, sequences=100)
    assert found == pytest.approx(expected)
