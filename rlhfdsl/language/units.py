"""Numbers with their units: exact values, and the arithmetic that units allow."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Unit = Literal["", "count", "ratio", "bytes", "duration"]

DIGIT_LIMIT = 40
EXPONENT_LIMIT = 400
_BIT_LIMIT = 4096

_NUMBER = re.compile(r"([0-9][0-9_]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?(.*)", re.ASCII)

# `k` and `Ki` differ on purpose: 16k tokens are 16 000, and a context of 16 384 is 16Ki.
_UNITS: dict[str, tuple[Unit, Fraction]] = {
    "": ("", Fraction(1)),
    "%": ("ratio", Fraction(1, 100)),
    **{unit: ("count", Fraction(size)) for unit, size in {
        "k": 10**3, "M": 10**6, "Ki": 2**10, "Mi": 2**20}.items()},
    **{unit: ("bytes", Fraction(size)) for unit, size in {
        "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
        "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}.items()},
    **{unit: ("duration", Fraction(size)) for unit, size in {
        "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}.items()},
}  # fmt: skip

_LIKELY = {"K": "k` (1 000) or `Ki` (1 024)", "m%": "%", "G": "GB` or `GiB", "g": "GB` or `GiB", "b": "B"}


@dataclass(frozen=True, slots=True)
class Quantity:
    """An exact value: bytes, durations in seconds, 80 % as 0.8, counts and plain numbers as they are."""

    value: Fraction
    unit: Unit = ""

    @property
    def whole(self) -> bool:
        """Whether it is an integer."""
        return self.value.denominator == 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a number or an operation is none: the code, a message and a help."""

    code: str
    message: str
    help: str | None = None


def read_number(text: str) -> Quantity | Refusal:
    """A number as the grammar lexes it: `16_000`, `16Ki`, `1e-5`, `80%`, `30m`."""
    match = _NUMBER.fullmatch(text)
    assert match is not None
    digits, fraction, exponent, unit = match.groups()
    shown = text if len(text) <= 24 else text[:20] + "…"
    if len(digits) + len(fraction or "") > DIGIT_LIMIT:
        return Refusal("E0903", f"`{shown}` has more than {DIGIT_LIMIT} digits")
    if exponent and (len(exponent) > 6 or abs(int(exponent[1:])) > EXPONENT_LIMIT):
        return Refusal("E0903", f"the exponent of `{shown}` is beyond {EXPONENT_LIMIT}")
    if unit not in _UNITS:
        if unit[0] in "eE":
            return Refusal("E0308", f"`{unit}` is not a unit", "an exponent has digits: 1e-5")
        likely = _LIKELY.get(unit) or next((known for known in _UNITS if known.lower() == unit.lower()), None)
        help = (
            f"did you mean `{likely}`?" if likely else "units: k M Ki Mi, %, B kB MB GB KiB MiB GiB, s m h d"
        )
        return Refusal("E0308", f"`{unit}` is not a unit", help)
    dimension, size = _UNITS[unit]
    return Quantity(Fraction(digits.replace("_", "") + (fraction or "") + (exponent or "")) * size, dimension)


def operate(operator: str, left: Quantity, right: Quantity) -> Quantity | Refusal:
    """`left op right`: a sum has one unit, a product at most one besides ratios, a quotient may cancel it."""
    one, two = _plain(left.unit), _plain(right.unit)
    unit: Unit
    if operator in ("+", "-"):
        if one != two and {one, two} != {"", "ratio"}:
            return Refusal("E0314", f"`{operator}` cannot join {name(left)} and {name(right)}")
        unit = one or two
        value = left.value + right.value if operator == "+" else left.value - right.value
    elif operator == "*":
        sized = [unit for unit in (one, two) if unit not in ("", "ratio")]
        if len(sized) == 2:
            return Refusal("E0314", f"{name(left)} times {name(right)} has no meaning")
        unit = sized[0] if sized else one if one == two else ""
        value = left.value * right.value
    else:
        if two not in ("", "ratio", one):
            return Refusal("E0314", f"{name(left)} over {name(right)} has no meaning")
        if right.value == 0:
            return Refusal("E0315", "a division by zero")
        unit = "" if one == two else one
        value = left.value / right.value
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _BIT_LIMIT:
        return Refusal("E0903", "a result is too large to be meant")
    return Quantity(value, unit)


def name(quantity: Quantity) -> str:
    """What a quantity is, for a message."""
    return {
        "": "a plain number",
        "count": "a count",
        "ratio": "a percentage",
        "bytes": "a size in bytes",
        "duration": "a duration",
    }[quantity.unit]


def _plain(unit: Unit) -> Unit:
    # `16k` is a way to write 16000: a count calculates like a plain number.
    return "" if unit == "count" else unit
