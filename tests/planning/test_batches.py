"""Batch algebra against numbers worked by hand."""

import pytest

from rlhfdsl.planning.batches import (
    Misfit,
    Run,
    divisors,
    largest_divisor,
    nearest_divisor,
    run_length,
    share,
    warmup_updates,
)


def test_divisors():
    assert divisors(36) == (1, 2, 3, 4, 6, 9, 12, 18, 36)
    assert divisors(7) == (1, 7)
    assert largest_divisor(36, 10) == 9
    assert largest_divisor(7, 5) == 1
    assert largest_divisor(8, 0) == 1
    assert nearest_divisor(36, 5) == 4  # 4 and 6 are equally near
    assert nearest_divisor(36, 100) == 36


def test_share():
    assert share(512, 8) == 64
    misfit = share(100, 8)
    assert misfit == Misfit(100, 8)
    assert (misfit.below, misfit.above, misfit.nearest) == (96, 104, "96 or 104")
    assert share(3, 8).nearest == "8"


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps", "expected"),
    [
        (1000, 64, 2, None, Run(15, 30, 40)),  # 1000 = 15 x 64 + 40
        (1000, 64, 1, 100, Run(15, 100, 40)),
        (63, 64, 5, None, Run(0, 0, 63)),
        (128, 64, 1, None, Run(2, 2, 0)),
    ],
)
def test_run_length(rows, batch, epochs, steps, expected):
    assert run_length(rows, batch, epochs, steps) == expected


def test_warmup():
    assert warmup_updates(7, 100) == 7
    assert warmup_updates(0.03, 100) == 3
    assert warmup_updates(0.05, 10) == 1  # 0.5 rounds up
    assert warmup_updates(0.03, 10) == 0
