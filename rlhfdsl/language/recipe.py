"""What the language hands on: a checked recipe of typed blocks, each value with its origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhfdsl.language.diagnostics import Span
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.syntax import Expression

Layer = Literal["default", "base", "file", "profile", "param", "set"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: its layer, the place (`quickstart.rlhf:12:3`), and the text as written."""

    layer: Layer
    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of a block; `span` is its place, `name` that of its name, both None for a default.

    `earlier` are the origins of the weaker settings that it took the place of, the strongest first;
    `expression` is what is written.
    """

    value: Any
    span: Span | None
    origin: Origin
    name: Span | None = None
    earlier: tuple[Origin, ...] = ()
    expression: Expression | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """A dotted path to a block: `blend.chat.eval` is Reference("blend.chat", "eval")."""

    address: str
    facet: str | None = None

    def __str__(self) -> str:
        return self.address if self.facet is None else f"{self.address}.{self.facet}"


@dataclass(frozen=True, slots=True)
class Source:
    """A `from`: a hub id, or a path; `path` is relative to the recipe's folder, or absolute if written so."""

    kind: Literal["hub", "path"]
    text: str
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A checked block. `settings` holds every attribute of its type; a free-name block only those written.

    `type` is the definition in grammar/recipe.schema.json: `stage.ppo` for a block of kind `stage`.
    A `mix PART` stands in `blocks` of its blend under `mix.PART`, the plain one under `mix`.
    """

    address: str
    kind: str
    type: str
    name: str | None
    span: Span | None
    settings: Mapping[str, Setting]
    blocks: Mapping[str, Block]

    def __getitem__(self, name: str) -> Any:
        """The plain value: written, else the default, else None; KeyError when there is no such attribute."""
        return self.settings[name].value

    def setting(self, name: str) -> Setting:
        """The value with its origin; KeyError for no attribute."""
        return self.settings[name]

    def written(self, name: str) -> bool:
        """Whether the recipe, a parameter or --set gives the value (and not the schema)."""
        return name in self.settings and self.settings[name].origin.layer != "default"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe without errors. `blocks` maps the address of every top-level block, in the file's order.

    `sources` are the texts that its spans are of, for the windows of messages about it.
    """

    path: Path
    name: str
    block: Block
    blocks: Mapping[str, Block]
    stages: tuple[Block, ...]
    sources: Mapping[str, SourceFile] = field(default_factory=dict, compare=False, repr=False)

    def of_kind(self, kind: str) -> tuple[Block, ...]:
        """The top-level blocks of a kind, in the file's order."""
        return tuple(block for block in self.blocks.values() if block.kind == kind)

    def find(self, address: str) -> Block | None:
        """The block at an address, nested ones too (`stage.ppo.actor`, `blend.chat.mix.reward`)."""
        return find_block(self.blocks, address)

    def span_of(self, address: str) -> Span | None:
        """The place of a setting or a block (`data.own.from`, `stage.ppo.actor`), for a message about it."""
        parent, _, name = address.rpartition(".")
        block = self.find(parent)
        if block is not None and name in block.settings and block.settings[name].span is not None:
            return block.settings[name].span
        whole = self.find(address) or block
        return whole.span if whole is not None else None


def find_block(blocks: Mapping[str, Block], address: str) -> Block | None:
    """The block at an address, nested ones too, among top-level blocks by their addresses."""
    for cut in range(len(address), 0, -1):
        block = blocks.get(address[:cut]) if cut == len(address) or address[cut] == "." else None
        if block is not None:
            return _inside(block, address[cut + 1 :])
    return None


def _inside(block: Block, rest: str) -> Block | None:
    if not rest:
        return block
    for key, inner in block.blocks.items():
        if rest == key or rest.startswith(key + "."):
            found = _inside(inner, rest[len(key) + 1 :])
            if found is not None:
                return found
    return None
