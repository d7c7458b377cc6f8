"""A held-out evaluation in numbers, by hand."""

import pytest
import torch

from rlhfdsl.training.evaluation import summary


def answers(*scores):
    return {
        "scores": torch.tensor(scores, dtype=torch.float64), "kl": torch.tensor([0.0, 1.0, 2.0, 5.0]),
        "lengths": torch.tensor([1.0, 3.0, 3.0, 3.0]), "ended": torch.tensor([1.0, 0.0, 0.0, 0.0]),
    }  # fmt: skip


def test_an_evaluation_beside_the_one_before():
    # Before: mean 1.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 4. After: mean 2, variance (1 + 1 + 1 + 9) / 4 = 3.
    # Of the four answers the first and the last win, the second is as good, the third loses: 2.5 / 4.
    found = summary(answers(1.0, 1.0, 1.0, 5.0), answers(0.0, 1.0, 2.0, 3.0))
    assert found == pytest.approx({
        "eval_score": 2.0, "eval_score_std": 3**0.5, "eval_kl": 2.0, "eval_length": 2.5, "eval_ended": 0.25,
        "eval_prompts": 4, "eval_score_before": 1.5, "eval_gain": 0.5 / 1.25**0.5, "eval_win_rate": 0.625,
    })  # fmt: skip
    assert not {"eval_gain", "eval_win_rate", "eval_score_before"} & summary(answers(0.0, 1.0, 2.0, 3.0)).keys()
