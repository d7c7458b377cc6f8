"""What must hold before the first update, on tensors."""

import pytest
import torch

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.training.invariants import padding_is_ignored, ratio_is_one, reference_agrees

ONES = torch.ones(1, 2)


def test_a_drift_beyond_rounding_is_refused():
    """0.5 nats a token, the bound of fp32 being 1e-5."""
    for check, code in ((ratio_is_one, "E0780"), (reference_agrees, "E0781")):
        assert check(ONES, ONES, ONES, "fp32") == 0.0
        with pytest.raises(UserError, match="5.00e-01") as raised:
            check(ONES, ONES + 0.5, ONES, "fp32")
        assert raised.value.code == code


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_no_drift(number):
    """Weights with nan in them make both forwards nan; that says nothing of dropout, of another dtype or of masks."""
    spoilt = torch.full((1, 2), number)
    for check in (ratio_is_one, reference_agrees):
        with pytest.raises(UserError, match="not finite") as raised:
            check(spoilt, spoilt, ONES, "fp32")
        assert raised.value.code == "E0794"
    with pytest.raises(UserError, match="not finite"):
        padding_is_ignored(spoilt[0], spoilt[0], "fp32")
