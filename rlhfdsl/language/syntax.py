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


@dataclass(frozen=True, slots=True)
class Attribute:
    """`name = value`; `layer` tells a setting of the file from one of --set."""

    path: Path
    value: Expression
    span: Span
    layer: Literal["file", "set"] = "file"


@dataclass(frozen=True, slots=True)
class BlockSyntax:
    """`kind labels { members }`; `header` spans kind and labels, `broken` tells of an unreadable member."""

    kind: Word
    labels: tuple[Word | Text, ...]
    members: tuple[Attribute | BlockSyntax, ...]
    header: Span
    span: Span
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Param:
    """`param name: type = default`."""

    name: Word
    types: tuple[Word, ...]
    default: Expression | None
    span: Span


@dataclass(frozen=True, slots=True)
class Document:
    """A file's blocks and parameters; `broken` tells that something in the file could not be read.

    `misnested` tells that brackets do not pair up, so that settings may stand in the wrong blocks.
    """

    blocks: tuple[BlockSyntax, ...]
    params: tuple[Param, ...]
    broken: bool
    misnested: bool


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
