"""What expressions come to, and how messages name it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhfdsl.language.syntax import Path
from rlhfdsl.language.units import Quantity, name


@dataclass(frozen=True, slots=True)
class Symbol:
    """A bare word; the schema says what it means."""

    text: str


Value = Quantity | Symbol | str | Path | tuple["Value", ...]


def describe(value: Value) -> str:
    """What a value is, for a message."""
    match value:
        case Quantity(unit="" | "count"):
            return f"the number {written(value)}"
        case Quantity():
            return name(value)
        case Symbol(text=text):
            return f"the word `{text}`"
        case str():
            return "a text"
        case Path():
            return f"the reference `{value.text}`"
        case _:
            return "a list"


def written(value: Value) -> str:
    """A value as a writer would write it."""
    match value:
        case Quantity(unit=unit):
            number = float(value.value * 100) if unit == "ratio" else to_float(value)
            text = str(int(number)) if abs(number) < 1e15 and number == int(number) else repr(number)
            return text + {"ratio": "%", "bytes": "B", "duration": "s"}.get(unit, "")
        case Symbol(text=text):
            return f"`{text}`"
        case str():
            return f'"{value}"'
        case Path():
            return f"`{value.text}`"
        case _:
            return f"a list of {len(value)}"


def to_float(value: Quantity) -> float:
    """The nearest float; infinity when there is none."""
    try:
        return float(value.value)
    except OverflowError:
        return math.inf
