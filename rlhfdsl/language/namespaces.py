"""Names of imported files: what `import "models.rlhf" as m` calls `model.m.base` is one name, `m.base`.

So a path of the language has two words, a kind and a name, and at most one more for what the block gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from rlhfdsl.language import schema
from rlhfdsl.language.diagnostics import Span
from rlhfdsl.language.syntax import (
    Attribute,
    BlockSyntax,
    Call,
    Document,
    Expression,
    Listing,
    Member,
    Operation,
    Path,
    Text,
    Word,
)

Rename = Callable[[tuple[Word, ...]], tuple[Word, ...]]


def join(document: Document, namespaces: Collection[str]) -> Document:
    """The document with `m.base` as one name wherever `m` is an import's."""
    if not namespaces:
        return document

    def names(words: tuple[Word, ...]) -> tuple[Word, ...]:
        if len(words) < 2 or words[0].text not in namespaces:
            return words
        span = Span(words[0].span.file, words[0].span.start, words[1].span.end)
        return (Word(f"{words[0].text}.{words[1].text}", span), *words[2:])

    return _Renaming(names).document(document)


def prefix(document: Document, namespace: str) -> Document:
    """An imported document with the import's name before each name that it gives or reads."""

    def names(words: tuple[Word, ...]) -> tuple[Word, ...]:
        return (replace(words[0], text=f"{namespace}.{words[0].text}"), *words[1:])

    renaming = _Renaming(names)
    document = renaming.document(document)
    return replace(
        document,
        blocks=tuple(replace(block, labels=_names(block.labels, names)) for block in document.blocks),
        params=tuple(replace(param, name=names((param.name,))[0]) for param in document.params),
        lets=tuple(replace(let, name=names((let.name,))[0]) for let in document.lets),
    )


def _names(labels: tuple[Word | Text, ...], names: Rename) -> tuple[Word | Text, ...]:
    words = tuple(label for label in labels if isinstance(label, Word))
    return names(words) if words else labels


class _Renaming:
    """Renames what every path leads to; `names` gets the words of a path behind its kind."""

    def __init__(self, names: Rename) -> None:
        self.names = names

    def document(self, document: Document) -> Document:
        return replace(
            document,
            blocks=tuple(self.block(block) for block in document.blocks),
            params=tuple(
                replace(param, default=self.expression(param.default)) if param.default is not None else param
                for param in document.params
            ),
            lets=tuple(replace(let, value=self.expression(let.value)) for let in document.lets),
            profiles=tuple(
                replace(profile, settings=tuple(self.assignment(attribute) for attribute in profile.settings))
                for profile in document.profiles
            ),
            overrides=tuple(
                replace(
                    override,
                    path=self.path(override.path),
                    members=self.members(override.members, override.path.words[-1].text in schema.naming()),
                )
                for override in document.overrides
            ),
        )

    def block(self, block: BlockSyntax) -> BlockSyntax:
        copied = self.path(block.copied) if block.copied is not None else None
        members = self.members(block.members, block.kind.text in schema.naming())
        return replace(block, members=members, copied=copied)

    def members(self, members: tuple[Member, ...], naming: bool) -> tuple[Member, ...]:
        """The members; with `naming`, those of a `mix` or an `add`, whose names are those of other blocks."""
        renamed: list[Member] = []
        for member in members:
            if isinstance(member, BlockSyntax):
                renamed.append(self.block(member))
                continue
            path = member.path
            if naming:
                path = replace(path, words=self.names(path.words))
            renamed.append(replace(member, path=path, value=self.expression(member.value)))
        return tuple(renamed)

    def assignment(self, attribute: Attribute) -> Attribute:
        return replace(
            attribute, path=self.path(attribute.path), value=self.expression(attribute.value)
        )

    def path(self, path: Path) -> Path:
        kinds = (*schema.kinds(), "param", "let")
        if len(path.words) < 2 or path.words[0].text not in kinds:
            return path
        return replace(path, words=(path.words[0], *self.names(path.words[1:])))

    def expression(self, expression: Expression) -> Expression:
        match expression:
            case Path():
                return self.path(expression)
            case Call(arguments=items):
                return replace(expression, arguments=tuple(self.expression(item) for item in items))
            case Listing(items=items):
                return replace(expression, items=tuple(self.expression(item) for item in items))
            case Operation(left=left, right=right):
                first = self.expression(left) if left is not None else None
                return replace(expression, left=first, right=self.expression(right))
            case _:
                return expression
