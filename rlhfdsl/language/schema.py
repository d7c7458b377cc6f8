"""The table of the language, grammar/recipe.schema.json, as the checker reads it.

The keys of `deepspeed { }` are a table of their own, grammar/deepspeed.schema.json, made from DeepSpeed's config models
(engines/deepspeed_keys.py); here the two are one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from rlhfdsl.language.resources import resource

_REF = "#/$defs/"
_ESCAPE = "deepspeed.schema.json"


@dataclass(frozen=True, slots=True)
class Attr:
    """One attribute: its alternatives (JSON schemas), default, examples, names in other tools."""

    name: str
    alternatives: tuple[Mapping[str, Any], ...]
    table: Mapping[str, Any]

    @property
    def doc(self) -> str:
        """One sentence about it."""
        return str(self.table.get("description", ""))

    @property
    def example(self) -> str:
        """A line that shows a right value."""
        return f"{self.name} = {self.table['examples'][0]}"

    @property
    def aliases(self) -> Mapping[str, list[str]]:
        """Tool: its names for this attribute."""
        aliases: Mapping[str, list[str]] = self.table.get("x-aliases", {})
        return aliases


@dataclass(frozen=True, slots=True)
class Definition:
    """One type of block. `free` is what every name is in a block with free names (mix, split, columns)."""

    type: str
    title: str
    label: str | None
    attributes: Mapping[str, Attr]
    blocks: Mapping[str, tuple[str, bool]]  # name: (type, always present)
    free: Attr | None
    table: Mapping[str, Any]

    @property
    def required(self) -> tuple[str, ...]:
        """Attributes and inner blocks that must be written."""
        return tuple(self.table.get("required", ()))

    @property
    def exclusive(self) -> tuple[tuple[str, ...], ...]:
        """Groups of attributes of which at most one is written (`not`, `oneOf` of the table)."""
        groups = [tuple(self.table["not"]["required"])] if "not" in self.table else []
        return (*groups, *([self.one_of] if self.one_of else ()))

    @property
    def one_of(self) -> tuple[str, ...]:
        """Attributes of which one must be written."""
        return tuple(part["required"][0] for part in self.table.get("oneOf", ()))

    @property
    def needs(self) -> Mapping[str, list[str]]:
        """Attribute: those that must be written beside it."""
        needs: Mapping[str, list[str]] = self.table.get("dependentRequired", {})
        return needs

    @property
    def name(self) -> str:
        """How a message calls it: `stage ppo`, `rollout`, `model`."""
        return f"stage {self.title}" if self.label == "stage" else self.title


@cache
def table() -> Mapping[str, Any]:
    """The whole JSON, with the definitions of the file that it refers to."""
    text = resource("grammar", "recipe.schema.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text.replace(f'"{_ESCAPE}#/', '"#/'))
    escape = json.loads(resource("grammar", _ESCAPE).read_text(encoding="utf-8"))
    data["$defs"] |= escape["$defs"]
    return data


@cache
def kinds() -> tuple[str, ...]:
    """The kinds of top-level blocks."""
    return tuple(table()["properties"])


@cache
def stage_kinds() -> tuple[str, ...]:
    """The kinds of stages."""
    choices = table()["properties"]["stage"]["additionalProperties"]["anyOf"]
    return tuple(choice["$ref"].removeprefix(_REF + "stage.") for choice in choices)


@cache
def types() -> tuple[str, ...]:
    """The types of all blocks. A definition without a title is a group of attributes that several types include."""
    return tuple(name for name, data in table()["$defs"].items() if "title" in data)


@cache
def definition(type_: str) -> Definition:
    """One type of block, with the attributes of the groups that it includes."""
    data = table()["$defs"][type_]
    properties: dict[str, Any] = {}
    for group in data.get("allOf", ()):
        properties |= table()["$defs"][group["$ref"].removeprefix(_REF)]["properties"]
    for name, value in data.get("properties", {}).items():
        properties[name] = {**properties.get(name, {}), **value}
    blocks = {
        name: (value["$ref"].removeprefix(_REF), bool(value.get("x-present")))
        for name, value in properties.items()
        if "$ref" in value
    }
    attributes = {name: _attr(name, value) for name, value in properties.items() if "$ref" not in value}
    free = _attr("", data["additionalProperties"]) if data.get("x-free") else None
    return Definition(type_, data["title"], data.get("x-label"), attributes, blocks, free, data)


@cache
def naming() -> Mapping[str, str]:
    """Inner blocks whose names are those of other blocks, by the kind of those: `mix` names data."""
    return {data["title"]: data["x-names"] for data in table()["$defs"].values() if "x-names" in data}


def find(path: str) -> str | None:
    """The type that a path of blocks leads to: `stage.grpo.reward` is the type `stage.ppo.reward`; None for none."""
    if path in types():
        return path
    parent, _, name = path.rpartition(".")
    outer = find(parent) if parent else None
    return definition(outer).blocks.get(name, (None,))[0] if outer is not None else None


def _attr(name: str, value: Mapping[str, Any]) -> Attr:
    return Attr(name, tuple(value.get("anyOf", (value,))), value)


def shape(alternative: Mapping[str, Any]) -> str:
    """What an alternative takes: symbol, none, switch, a unit, number, text, source, reference or list."""
    if "enum" in alternative:
        return "symbol"
    if "const" in alternative:
        return "none"
    if "x-reference" in alternative:
        return "reference"
    if alternative.get("x-source"):
        return "source"
    kind = alternative["type"]
    names = {"boolean": "switch", "integer": "count", "string": "text", "array": "list"}
    return str(alternative.get("x-unit") or names.get(kind, "number"))


def none_word(alternative: Mapping[str, Any]) -> str:
    """The word for an alternative without a value: `off`, or another that the table names."""
    return str(alternative.get("x-word", "off"))


def from_alias(type_: str, alias: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """What other tools call `alias`: (type, attribute, tools), this type and its inner blocks first."""
    found = []
    order = [type_, *(inner for inner in types() if inner.startswith(type_ + "."))]
    for candidate in [*order, *(other for other in types() if other not in order)]:
        block = definition(candidate)
        for attr in block.attributes.values():
            tools = tuple(tool for tool, names in attr.aliases.items() if alias in names)
            if tools:
                found.append((candidate, attr.name, tools))
    return found
