"""The syntax tree: what the text says, with the span of everything, before its meaning is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhfdsl.language.diagnostics import Span


@dataclass(frozen=True, slots=True)
class Word:
    """A bare word; as an expression, a symbol."""

    text: str
    span: Span


@dataclass(frozen=True, slots=True)
class Text:
    """A quoted text, its escapes resolved."""

    value: str
    span: Span


@dataclass(frozen=True, slots=True)
class Number:
    """A number with its unit, as written."""

    text: str
    span: Span


@dataclass(frozen=True, slots=True)
class Path:
    """A dotted path: a reference in an expression, an address in --set."""

    words: tuple[Word, ...]
    span: Span

    @property
    def text(self) -> str:
        """The path with its dots."""
        return ".".join(word.text for word in self.words)


@dataclass(frozen=True, slots=True)
class Call:
    """A function with its arguments."""

    name: Word
    arguments: tuple[Expression, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Listing:
    """Values in `[ ]`."""

    items: tuple[Expression, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Operation:
    """`left op right`; a sign is `0 - right`, with `left` None."""

    operator: Literal["+", "-", "*", "/"]
    left: Expression | None
    right: Expression
    span: Span


Expression = Word | Text | Number | Path | Call | Listing | Operation


WrittenLayer = Literal["base", "file", "profile", "set"]


@dataclass(frozen=True, slots=True)
class Attribute:
    """`name = value`; `layer` tells who says it, `earlier` is the weaker setting that it took the place of."""

    path: Path
    value: Expression
    span: Span
    layer: WrittenLayer = "file"
    earlier: Attribute | None = None


@dataclass(frozen=True, slots=True)
class BlockSyntax:
    """`kind labels from copied { members }`; `header` spans kind and labels.

    `broken` tells of an unreadable member.
    """

    kind: Word
    labels: tuple[Word | Text, ...]
    members: tuple[Attribute | BlockSyntax, ...]
    header: Span
    span: Span
    broken: bool = False
    copied: Path | None = None


@dataclass(frozen=True, slots=True)
class Param:
    """`param name: type = default`; `earlier` is the default that an override or a profile replaced."""

    name: Word
    types: tuple[Word, ...]
    default: Expression | None
    span: Span
    earlier: Param | None = None


@dataclass(frozen=True, slots=True)
class Let:
    """`let name = value`."""

    name: Word
    value: Expression
    span: Span


@dataclass(frozen=True, slots=True)
class Include:
    """`extends "path"`, or `import "path" as name`."""

    path: Text
    name: Word | None
    span: Span


@dataclass(frozen=True, slots=True)
class Profile:
    """`profile name { path = value }`."""

    name: Word
    settings: tuple[Attribute, ...]
    span: Span
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Override:
    """`override path { members }`, of a block that an included file has."""

    path: Path
    members: tuple[Attribute | BlockSyntax, ...]
    span: Span
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says; `broken` tells that something in it could not be read, and `lost` that this may be
    a block or another item of the top level, so that names may be missing.

    `misnested` tells that brackets do not pair up, so that settings may stand in the wrong blocks.
    """

    blocks: tuple[BlockSyntax, ...]
    params: tuple[Param, ...]
    broken: bool
    misnested: bool
    lets: tuple[Let, ...] = ()
    includes: tuple[Include, ...] = ()
    profiles: tuple[Profile, ...] = ()
    overrides: tuple[Override, ...] = ()
    lost: bool = False


Member = Attribute | BlockSyntax


def address_of(block: BlockSyntax) -> str:
    """The address of a top-level block, as far as its header tells it."""
    words = [label.text for label in block.labels if isinstance(label, Word)]
    if block.kind.text == "stage":
        return f"stage.{words[-1] if words else ''}"
    return f"{block.kind.text}.{words[0]}" if words else block.kind.text


def type_of(block: BlockSyntax) -> str:
    """The type of a top-level block, as far as its header tells it: `model`, `stage.ppo`."""
    first = block.labels[0] if block.labels else None
    return f"stage.{first.text}" if block.kind.text == "stage" and isinstance(first, Word) else block.kind.text


def key_of(member: Member) -> str:
    """What tells a member from its neighbours: `lr`, `kl`, `mix.PART`."""
    if isinstance(member, Attribute):
        return member.path.text
    label = member.labels[0] if member.labels else None
    return f"{member.kind.text}.{label.text}" if isinstance(label, Word) else member.kind.text


def paths_of(expression: Expression) -> Sequence[Path]:
    """Every dotted path inside an expression."""
    match expression:
        case Path():
            return [expression]
        case Call(arguments=items) | Listing(items=items):
            return [path for item in items for path in paths_of(item)]
        case Operation(left=left, right=right):
            return [*(paths_of(left) if left is not None else ()), *paths_of(right)]
        case _:
            return []
