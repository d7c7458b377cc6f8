import pytest

from rlhfdsl.engines.schedule import learning_rate


def rates(kind, warmup, updates):
    schedule = {"kind": kind, "lr": 1.0, "warmup": warmup, "updates": updates}
    return [learning_rate(schedule, update) for update in range(updates)]


def test_constant_with_warmup():
    assert rates("constant", 3, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_reaches_zero_one_update_after_the_last():
    assert rates("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25]


def test_cosine_halves_in_the_middle():
    # cos(0), cos(pi/4), cos(pi/2), cos(3 pi/4) mapped by (1 + c) / 2
    assert rates("cosine", 0, 4) == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


def test_cosine_starts_after_the_warmup():
    assert rates("cosine", 1, 3) == pytest.approx([0.5, 1.0, 0.5])
