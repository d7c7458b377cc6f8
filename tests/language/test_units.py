"""Numbers, units and their arithmetic."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfdsl.language.units import Quantity, Refusal, operate, read_number


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("16", 16, ""),
        ("16_000", 16_000, ""),
        ("16k", 16_000, "count"),
        ("16Ki", 16_384, "count"),
        ("2M", 2_000_000, "count"),
        ("1Mi", 2**20, "count"),
        ("1e-5", Fraction(1, 100_000), ""),
        ("9.65e-6", Fraction(965, 10**8), ""),
        ("1E3", 1000, ""),
        ("80%", Fraction(4, 5), "ratio"),
        ("0.5%", Fraction(1, 200), "ratio"),
        ("80GB", 80 * 10**9, "bytes"),
        ("80GiB", 80 * 2**30, "bytes"),
        ("1.5KiB", 1536, "bytes"),
        ("30s", 30, "duration"),
        ("30m", 1800, "duration"),
        ("30min", 1800, "duration"),
        ("2h", 7200, "duration"),
        ("1.5d", 129_600, "duration"),
    ],
)
def test_numbers(text, value, unit):
    assert read_number(text) == Quantity(Fraction(value), unit)


@pytest.mark.parametrize(
    ("text", "code", "help"),
    [
        ("16K", "E0308", "Ki"),
        ("2G", "E0308", "GiB"),
        ("2gb", "E0308", "GB"),
        ("1e", "E0308", "1e-5"),
        ("5x", "E0308", "units"),
        ("9" * 41, "E0903", None),
        ("1e401", "E0903", None),
        ("1e99999999", "E0903", None),
    ],
)
def test_what_is_no_number(text, code, help):
    refusal = read_number(text)
    assert isinstance(refusal, Refusal) and refusal.code == code
    assert help is None or help in (refusal.help or "")


@given(st.decimals(min_value=0, max_value=10**12, allow_nan=False, places=9))
def test_a_number_is_the_nearest_float(value: Decimal):
    quantity = read_number(f"{value:f}")
    assert isinstance(quantity, Quantity)
    assert float(quantity.value) == float(f"{value:f}")


PLAIN, COUNT, RATIO, BYTES, TIME = (read_number(text) for text in ("6", "2k", "50%", "4GiB", "30m"))


@pytest.mark.parametrize(
    ("left", "operator", "right", "value", "unit"),
    [
        (PLAIN, "+", COUNT, 2006, ""),
        (PLAIN, "-", COUNT, -1994, ""),
        (PLAIN, "/", PLAIN, 1, ""),
        (RATIO, "*", PLAIN, 3, ""),
        (PLAIN, "*", RATIO, 3, ""),
        (RATIO, "*", RATIO, Fraction(1, 4), "ratio"),
        (RATIO, "+", PLAIN, Fraction(13, 2), "ratio"),
        (RATIO, "-", RATIO, 0, "ratio"),
        (RATIO, "/", PLAIN, Fraction(1, 12), "ratio"),
        (BYTES, "*", PLAIN, 24 * 2**30, "bytes"),
        (BYTES, "*", RATIO, 2 * 2**30, "bytes"),
        (BYTES, "/", BYTES, 1, ""),
        (BYTES, "/", COUNT, Fraction(4 * 2**30, 2000), "bytes"),
        (TIME, "+", TIME, 3600, "duration"),
    ],
)
def test_arithmetic(left, operator, right, value, unit):
    assert operate(operator, left, right) == Quantity(Fraction(value), unit)


@pytest.mark.parametrize(
    ("left", "operator", "right", "code"),
    [
        (BYTES, "+", PLAIN, "E0314"),
        (BYTES, "-", TIME, "E0314"),
        (BYTES, "*", TIME, "E0314"),
        (PLAIN, "/", BYTES, "E0314"),
        (RATIO, "+", TIME, "E0314"),
        (PLAIN, "/", Quantity(Fraction(0)), "E0315"),
        (Quantity(Fraction(10) ** 1200), "*", Quantity(Fraction(10) ** 1200), "E0903"),
    ],
)
def test_arithmetic_that_has_no_meaning(left, operator, right, code):
    refusal = operate(operator, left, right)
    assert isinstance(refusal, Refusal) and refusal.code == code
