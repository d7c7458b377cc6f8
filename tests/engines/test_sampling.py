"""The noise of sampling: its distribution, and what it does and does not depend on."""

import pytest
import torch
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from rlhfdsl.engines.rollout.eager import answer_lengths
from rlhfdsl.engines.rollout.sampling import Distribution, draw, gumbel, mix, row_seeds


def test_mix_is_splitmix64():
    # The first outputs of SplitMix64 from seed 0, published with the algorithm's reference code.
    state, golden = 0, 0x9E3779B97F4A7C15
    found = [mix(torch.tensor(_signed(state + golden * i))).item() % 2**64 for i in range(3)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_frequencies_follow_the_softmax():
    draws = 40_000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    seeds = row_seeds(3, 0, torch.arange(draws))
    tokens = (logits + gumbel(seeds, 5, 5)).argmax(-1)
    expected = logits.softmax(-1)
    found = torch.bincount(tokens, minlength=5) / draws
    # Five standard deviations of a binomial share: a fair sampler fails this once in a million runs.
    tolerance = 5 * (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() < tolerance).all()


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, 0.9), (None, 0.3), (None, 1e-4), (7, None), (1, None), (500, None), (20, 0.5)]
)
def test_a_cut_keeps_what_generate_keeps(top_k, top_p):
    logits = torch.randn(64, 97, generator=torch.Generator().manual_seed(0)) * 3
    warpers = LogitsProcessorList()
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    assert torch.equal(Distribution(1.0, top_k, top_p).kept(logits), warpers(None, logits))


def test_draws_from_a_cut_follow_it_and_are_told_by_the_whole():
    draws, temperature = 40_000, 0.5
    logits = torch.tensor([0.0, 0.5, 1.0, -0.5, 0.25])
    # divided by 0.5 and exponentiated 1, e, e^2, 1/e, e^0.5: of 13.1, the likeliest three have 0.56, 0.77, 0.90
    whole = (logits / temperature).log_softmax(-1)
    seeds = row_seeds(4, 0, torch.arange(draws))
    tokens, log_probs = draw(logits.expand(draws, 5), Distribution(temperature, top_p=0.8), seeds, 2)
    assert torch.equal(tokens.unique(), torch.tensor([1, 2, 4]))
    torch.testing.assert_close(log_probs, whole[tokens])
    expected = whole[[1, 2, 4]].softmax(-1)
    found = torch.bincount(tokens)[[1, 2, 4]] / draws
    # five standard deviations of a binomial share, as above
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_noise_has_the_moments_of_a_gumbel_variable():
    noise = gumbel(row_seeds(1, 2, torch.arange(400)), 0, 500).double()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.577216) < 0.015  # Euler's constant; sd of the mean is 1.28 / sqrt(200 000)
    assert abs(noise.var().item() - 1.644934) < 0.04  # pi^2 / 6


def test_noise_depends_on_row_step_and_rollout_only():
    rows = torch.tensor([4, 9, 2])
    together = gumbel(row_seeds(7, 1, rows), 3, 64)
    alone = gumbel(row_seeds(7, 1, rows[1:2]), 3, 64)
    assert torch.equal(together[1:2], alone)
    for seed, rollout, step in ((7, 1, 4), (7, 2, 3), (8, 1, 3)):
        other = gumbel(row_seeds(seed, rollout, rows), step, 64)
        assert not torch.isclose(other, together).all(1).any()


def test_steps_and_tokens_are_uncorrelated():
    noise = torch.stack([gumbel(row_seeds(0, 0, torch.arange(2000)), step, 8) for step in range(4)], 1).flatten(1)
    correlation = torch.corrcoef(noise.T) - torch.eye(noise.shape[1])
    assert correlation.abs().max() < 5 / 2000**0.5


def test_answer_lengths_include_the_first_stop_id():
    answers = torch.tensor([[5, 6, 9, 9], [5, 5, 5, 5], [8, 1, 1, 9]])
    lengths, ended = answer_lengths(answers, (9, 8))
    assert lengths.tolist() == [3, 4, 1]
    assert ended.tolist() == [True, False, True]


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
