"""The parser's tree to ours, in syntax.py; unknown escapes and values nested too deep become diagnostics."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from rlhfdsl.language.diagnostics import Diagnostic, Span
from rlhfdsl.language.lalr import Token, Tree
from rlhfdsl.language.source import NESTING_LIMIT, SourceFile
from rlhfdsl.language.syntax import (
    Attribute,
    BlockSyntax,
    Call,
    Document,
    Expression,
    Include,
    Let,
    Listing,
    Member,
    Number,
    Operation,
    Override,
    Param,
    Path,
    Profile,
    Text,
    Word,
    WrittenLayer,
)

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)")
_ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "t": "\t"}
_OPERATORS: dict[str, Literal["+", "-", "*", "/"]] = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_MISNESTED = ("E0105", "E0107", "E0112")


def _inside(span: Span | None, block: Span) -> bool:
    """Whether a mistake is within a block that was read, so that it hides no other one."""
    return span is not None and block.start < span.start and span.end < block.end


class _TooDeep(Exception):
    """An expression is nested beyond the limit."""


class Builder:
    """The parser's tree to ours; unknown escapes and deep expressions become diagnostics."""

    def __init__(self, source: SourceFile, problems: list[Diagnostic]) -> None:
        self.source = source
        self.problems = problems

    def span(self, node: Tree | Token) -> Span:
        return Span(self.source.name, node.start_pos or 0, node.end_pos or 0)

    def document(self, tree: Tree | None) -> Document:
        """The whole file."""
        blocks: list[BlockSyntax] = []
        params: list[Param] = []
        lets: list[Let] = []
        includes: list[Include] = []
        profiles: list[Profile] = []
        overrides: list[Override] = []
        for item in tree.children if tree is not None else ():
            if not isinstance(item, Tree):
                continue
            match str(item.data):
                case "block":
                    blocks.append(self.block(item))
                case "param":
                    params.append(self.param(item))
                case "let":
                    lets += [let] if (let := self.let(item)) is not None else []
                case "profile":
                    profiles.append(self.profile(item))
                case "override":
                    overrides.append(self.override(item))
                case _:
                    includes.append(self.include(item))
        return Document(
            tuple(blocks),
            tuple(params),
            bool(self.problems),
            any(problem.code in _MISNESTED for problem in self.problems),
            tuple(lets),
            tuple(includes),
            tuple(profiles),
            tuple(overrides),
            lost=not all(any(_inside(problem.span, block.span) for block in blocks) for problem in self.problems),
        )

    def include(self, node: Tree) -> Include:
        """`extends "path"`, or `import "path" as name`."""
        path, *names = node.children
        assert isinstance(path, Token)
        words = [self.word(name) for name in names if isinstance(name, Token)]
        return Include(self.text(path), words[0] if words else None, self.span(node))

    def let(self, node: Tree) -> Let | None:
        """`let name = value`."""
        name, value = node.children
        assert isinstance(name, Token) and isinstance(value, Tree)
        expression = self.value(value)
        return None if expression is None else Let(self.word(name), expression, self.span(node))

    def profile(self, node: Tree) -> Profile:
        """`profile name { path = value }`."""
        name, *members = node.children
        assert isinstance(name, Token)
        settings, broken = self.body(members, "profile")
        kept = tuple(member for member in settings if isinstance(member, Attribute))
        return Profile(self.word(name), kept, self.span(node), broken)

    def override(self, node: Tree) -> Override:
        """`override path { members }`."""
        path, *members = node.children
        assert isinstance(path, Tree)
        body, broken = self.body(members, "file")
        return Override(self.path(path), body, self.span(node), broken)

    def word(self, token: Token) -> Word:
        return Word(str(token), self.span(token))

    def param(self, node: Tree) -> Param:
        name, types, default = node.children
        assert isinstance(name, Token) and isinstance(types, Tree)
        words = tuple(self.word(token) for token in types.children if isinstance(token, Token))
        value = self.value(default) if isinstance(default, Tree) else None
        return Param(self.word(name), words, value, self.span(node))

    def block(self, node: Tree) -> BlockSyntax:
        """`kind labels from path { members }`."""
        kind, labels, copied, *members = node.children
        assert isinstance(kind, Token) and isinstance(labels, Tree)
        names: list[Word | Text] = []
        for label in labels.children:
            assert isinstance(label, Token)
            names.append(self.text(label) if label.type == "STRING" else self.word(label))
        source = None
        if isinstance(copied, Tree):
            (path,) = copied.children
            assert isinstance(path, Tree)
            source = self.path(path)
        body, broken = self.body(members, "file")
        head = self.span(kind)
        header = Span(head.file, head.start, names[-1].span.end if names else head.end)
        return BlockSyntax(self.word(kind), tuple(names), body, header, self.span(node), broken, source)

    def body(
        self, members: Sequence[Tree | Token | None], layer: WrittenLayer
    ) -> tuple[tuple[Member, ...], bool]:
        """The members that could be read, and whether one could not."""
        read = [
            self.block(member) if member.data == "block" else self.attribute(member, layer)
            for member in members
            if isinstance(member, Tree)
        ]
        kept = tuple(member for member in read if member is not None)
        return kept, len(kept) < len(members)

    def attribute(self, node: Tree, layer: WrittenLayer = "file") -> Attribute | None:
        """`path = value`."""
        path, value = node.children
        assert isinstance(path, Tree) and isinstance(value, Tree)
        expression = self.value(value)
        return None if expression is None else Attribute(self.path(path), expression, self.span(node), layer)

    def value(self, node: Tree) -> Expression | None:
        """A whole value, or None when it is too deep for the passes, which descend into it."""
        try:
            return self.expression(node)
        except _TooDeep:
            message = f"a value has more than {NESTING_LIMIT} operations inside each other"
            self.problems.append(Diagnostic("E0902", "error", message, self.span(node)))
            return None

    def path(self, node: Tree) -> Path:
        words = tuple(self.word(token) for token in node.children if isinstance(token, Token))
        return Path(words, self.span(node))

    def text(self, token: Token) -> Text:
        span = self.span(token)

        def resolve(match: re.Match[str]) -> str:
            body = match.group(1)
            if body[0] == "u" and len(body) == 5:
                return chr(int(body[1:], 16))
            if body not in _ESCAPES:
                place = Span(span.file, span.start + 1 + match.start(), span.start + 1 + match.end())
                message = f"`\\{body}` is not an escape"
                help = 'the escapes are \\" \\\\ \\n \\t and \\u with four hex digits'
                self.problems.append(Diagnostic("E0117", "error", message, place, help=help))
            return _ESCAPES.get(body, "")

        return Text(_ESCAPE.sub(resolve, str(token)[1:-1]), span)

    def expression(self, node: Tree, depth: int = 0) -> Expression:
        span = self.span(node)
        if depth > NESTING_LIMIT:
            raise _TooDeep
        children = node.children
        kind = str(node.data)
        if kind in ("number", "string", "symbol"):
            token = children[0]
            assert isinstance(token, Token)
            makers: dict[str, Callable[[], Expression]] = {
                "number": lambda: Number(str(token), span),
                "string": lambda: self.text(token),
                "symbol": lambda: self.word(token),
            }
            return makers[kind]()
        if kind == "ref":
            return self.path(node)
        if kind == "call":
            name, *arguments = children
            assert isinstance(name, Token)
            return Call(self.word(name), self.expressions(arguments, depth), span)
        if kind == "list":
            return Listing(self.expressions(children, depth), span)
        operands = self.expressions(children, depth)
        if kind == "neg":
            return Operation("-", None, operands[0], span)
        return Operation(_OPERATORS[kind], operands[0], operands[1], span)

    def expressions(self, nodes: Sequence[Tree | Token | None], depth: int) -> tuple[Expression, ...]:
        return tuple(self.expression(node, depth + 1) for node in nodes if isinstance(node, Tree))
