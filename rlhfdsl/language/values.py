"""Values to what an attribute takes: by the first alternative of the table that fits, or why none does."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rlhfdsl.language import schema
from rlhfdsl.language.describe import Symbol, Value, describe, to_float, written
from rlhfdsl.language.diagnostics import Diagnostic, Edit, Fix, Span
from rlhfdsl.language.recipe import Reference, Source
from rlhfdsl.language.schema import Attr
from rlhfdsl.language.suggest import listed, nearest
from rlhfdsl.language.syntax import Expression, Path
from rlhfdsl.language.units import Quantity

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".arrow", ".gz")
_WORDS = {"true": "on", "yes": "on", "false": "off", "no": "off", "none": "off", "null": "off"}
_EXPECTED = {
    "switch": "`on` or `off`",
    "count": "a whole number",
    "number": "a number",
    "ratio": "a ratio",
    "bytes": "a size in bytes",
    "duration": "a duration",
    "text": "a text",
    "source": "a hub id or a path, in quotes",
    "list": "a list",
}
_USES = {
    "policy": "a policy",
    "reward": "a reward model",
    "rows": "a blend, a part of one, or a data block",
    "parallel": "a `parallel` block",
    "scorer": "a `scorer` block",
}


@dataclass(frozen=True, slots=True)
class Invalid:
    """In place of a value that is wrong; later checks pass it by."""


INVALID = Invalid()


def takes(uses: Iterable[str]) -> str:
    """What a reference must lead to, for a message."""
    return " or ".join(_USES[use] for use in uses)


def convert(
    attr: Attr, expression: Expression, value: Value, blocks: Iterable[str], folder: str = ""
) -> Any:
    """The plain value by the first alternative that takes it, or the Diagnostic that says why none does.

    `blocks` are the addresses known so far, for suggestions; `folder` is where a relative path begins.
    """
    near: Mapping[str, Any] | None = None
    for alternative in attr.alternatives:
        fitted = fit(alternative, value)
        if fitted is INVALID:
            continue
        if in_range(alternative, fitted):
            if schema.shape(alternative) == "source":
                return _source(attr, expression, fitted, folder)
            return fitted
        near = near or alternative
    notes: tuple[str, ...] = ()
    if isinstance(expression, Path) and expression.words[0].text in ("param", "let"):
        notes = (f"`{expression.text}` is {written(value)}",)
    if near is not None:
        help = f"for example `{attr.example}`"
        if schema.shape(near) == "ratio" and isinstance(value, Quantity) and not value.unit and 1 < value.value <= 100:
            help = f"did you mean {written(value)}%?"
        message = f"`{attr.name}` must be {_range(near)}"
        label = f"this is {written(value)}"
        return Diagnostic("E0307", "error", message, expression.span, label, notes=notes, help=help)
    return _mismatch(attr, expression, value, blocks, notes)


def _mismatch(
    attr: Attr, expression: Expression, value: Value, blocks: Iterable[str], notes: tuple[str, ...]
) -> Diagnostic:
    """The message for a value that no alternative takes."""
    shapes = {schema.shape(alternative) for alternative in attr.alternatives}
    words = [word for alternative in attr.alternatives for word in _words(alternative)]
    expected = _expected(attr)
    label, help = f"this is {describe(value)}", f"for example `{attr.example}`"
    code = "E0306"
    fixes: tuple[Fix, ...] = ()
    span = expression.span
    if isinstance(value, Symbol) and words:
        code = "E0304"
        label = ""
        foreign = _WORDS.get(value.text.lower())
        near = [foreign] if foreign in words else nearest(value.text, words)
        help = f"did you mean {listed(near)}?" if near else help
        fixes = tuple(rename(word, span) for word in near)
    elif isinstance(value, Symbol) and shapes & {"text", "source"}:
        help = f'a text is quoted: write "{value.text}"'
        fixes = (Fix("quote it", (Edit(span, f'"{value.text}"'),)),)
    elif isinstance(value, str) and value in words:
        help = f"write it without quotes: `{value}`"
        fixes = (Fix("take the quotes off", (Edit(span, value),)),)
    elif isinstance(value, Quantity) and shapes & {"count", "number", "ratio", "bytes", "duration"}:
        if value.unit not in ("", "count") or shapes <= {"bytes", "duration"}:
            code = "E0309"
        elif "count" in shapes and not value.whole:
            label = "this is not whole"
    elif isinstance(value, Symbol) and "reference" in shapes:
        meant = next((address for address in blocks if address.endswith("." + value.text)), attr.example)
        help = f"a reference has a dot: `{meant}`"
    message = f"`{attr.name}` takes {expected}, not {describe(value)}"
    return Diagnostic(code, "error", message, span, label, notes=notes, help=help, fixes=fixes)


def _source(attr: Attr, expression: Expression, text: str, folder: str) -> Source | Diagnostic:
    """A `from`: a path when it begins like one, else a hub id."""
    if text.startswith(("./", "../", "/")):
        return Source("path", text, posixpath.normpath(posixpath.join(folder, text)))
    suffix = PurePosixPath(text).suffix
    if suffix in _FILE_ENDINGS or not _HUB_ID.fullmatch(text):
        message = f"`{text}` is not a hub id (`org/name`), and a path begins with ./ ../ or /"
        fixable = bool(text) and not text.startswith("~")
        help = (
            f'write "./{text}" for a file beside the recipe' if fixable else f"for example `{attr.example}`"
        )
        fixes = (Fix("make it a path", (Edit(expression.span, f'"./{text}"'),)),) if fixable else ()
        return Diagnostic("E0317", "error", message, expression.span, help=help, fixes=fixes)
    return Source("hub", text)


def rename(name: str, span: Span) -> Fix:
    """The fix that puts a name in place of a span."""
    return Fix(f"write `{name}`", (Edit(span, name),))


def _words(alternative: Mapping[str, Any]) -> list[str]:
    match schema.shape(alternative):
        case "symbol":
            return list(alternative["enum"])
        case "switch":
            return ["on", "off"]
        case "none":
            return [schema.none_word(alternative)]
        case _:
            return []


def _expected(attr: Attr) -> str:
    parts = []
    for alternative in attr.alternatives:
        shape = schema.shape(alternative)
        if shape == "symbol":
            parts.append(("" if len(alternative["enum"]) == 1 else "one of ") + listed(alternative["enum"]))
        elif shape == "none":
            parts.append(f"`{schema.none_word(alternative)}`")
        elif shape == "reference":
            parts.append("a reference to " + takes(alternative["x-reference"]))
        elif shape == "list":
            parts.append(f"a list of {_items(alternative)}")
        else:
            parts.append(_EXPECTED[shape])
    return " or ".join(parts)


def type_words(attr: Attr) -> str:
    """What an attribute takes, with its bounds: `a whole number of at least 1 or off`."""
    parts = []
    for alternative in attr.alternatives:
        one = _expected(Attr(attr.name, (alternative,), attr.table))
        bounds = _range(alternative) if schema.shape(alternative) in _EXPECTED else ""
        if schema.shape(alternative) == "list":
            one, bounds = _range(alternative), ""
        parts.append(f"{one} {bounds}" if bounds and schema.shape(alternative) not in ("text", "source") else one)
    return " or ".join(parts).replace("`", "")


def fit(alternative: Mapping[str, Any], value: Value) -> Any:
    """The plain value in an alternative, without its range; INVALID when the alternative does not take it."""
    match schema.shape(alternative), value:
        case "symbol", Symbol(text=text) if text in alternative["enum"]:
            return text
        case "none", Symbol(text=text) if text == schema.none_word(alternative):
            return None
        case "switch", Symbol(text="on" | "off" as text):
            return text == "on"
        case "count", Quantity(unit="" | "count", whole=True):
            return int(value.value)
        case "number", Quantity(unit="" | "count"):
            return to_float(value)
        case "ratio", Quantity(unit="" | "ratio"):
            return to_float(value)
        case "bytes", Quantity(unit="bytes", whole=True):
            return int(value.value)
        case "duration", Quantity(unit="duration"):
            return to_float(value)
        case (("text" | "source"), str()):
            return value
        case "reference", Path(words=words) if len(words) in (2, 3):
            address = ".".join(word.text for word in words[:2])
            return Reference(address, words[2].text if len(words) == 3 else None)
        case "list", tuple():
            items = [fit(alternative["items"], item) for item in value]
            return INVALID if INVALID in items else tuple(items)
        case _:
            return INVALID


def in_range(alternative: Mapping[str, Any], value: Any) -> bool:
    """Whether a plain value is in the bounds of its alternative."""
    if isinstance(value, tuple):
        fits = bool(alternative["minItems"] <= len(value) <= alternative["maxItems"])
        return fits and all(in_range(alternative["items"], item) for item in value)
    if isinstance(value, str):
        return bool(len(value) >= alternative.get("minLength", 0))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    low, high = alternative.get("minimum", value), alternative.get("maximum", value)
    above, below = (
        alternative.get("exclusiveMinimum", -math.inf),
        alternative.get("exclusiveMaximum", math.inf),
    )
    return bool(low <= value <= high and above < value < below)


def _items(alternative: Mapping[str, Any]) -> str:
    """What a list holds: `2 numbers`, `1 to 64 texts`."""
    low, high = alternative["minItems"], alternative["maxItems"]
    kind = "texts" if schema.shape(alternative["items"]) == "text" else "numbers"
    return f"{low if low == high else f'{low} to {high}'} {kind}"


def _range(alternative: Mapping[str, Any]) -> str:
    if schema.shape(alternative) == "list":
        return f"{_items(alternative)}, each {_range(alternative['items'])}"
    if schema.shape(alternative) == "text":
        return "a text that is not empty"
    low, high, above, below = (
        f"{alternative[key]:_}" if key in alternative else None
        for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    )
    parts = [f"at least {low}"] if low is not None else [f"above {above}"] if above is not None else []
    parts += [f"at most {high}"] if high is not None else [f"below {below}"] if below is not None else []
    return f"from {low} to {high}" if low is not None and high is not None else " and ".join(parts)
