"""Text to syntax tree, by the grammar in grammar/rlhf.lark, with every syntax error of the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

from lark import Lark, Token, Tree

from rlhfdsl.language.diagnostics import Diagnostic, Span
from rlhfdsl.language.recovery import parse_all
from rlhfdsl.language.source import NESTING_LIMIT, SourceFile
from rlhfdsl.language.syntax import (
    Attribute,
    BlockSyntax,
    Call,
    Document,
    Expression,
    Listing,
    Number,
    Operation,
    Param,
    Path,
    Text,
    Word,
)
from rlhfdsl.language.tables import load_parser

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)")
_ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "t": "\t"}
_OPERATORS: dict[str, Literal["+", "-", "*", "/"]] = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_MISNESTED = ("E0105", "E0107", "E0112")
_LATER = {
    "extends": "`extends`",
    "import_": "`import`",
    "let": "`let`",
    "profile": "`profile`",
    "override": "`override`",
    "from_": "a copy with `from`",
}


@cache
def grammar() -> Lark:
    """The parser, made once for a process."""
    return load_parser()


def parse(source: SourceFile) -> tuple[Document, list[Diagnostic]]:
    """The tree of what could be read, and the syntax errors in the order of the text."""
    tree, problems = parse_all(grammar(), source, "start")
    document = _Builder(source, problems).document(tree)
    return document, problems


def parse_assignment(source: SourceFile) -> tuple[Attribute | None, list[Diagnostic]]:
    """The one `path = value` of a --set argument."""
    tree, problems = parse_all(grammar(), source, "assignment")
    if tree is None or problems:
        return None, problems
    return _Builder(source, problems).attribute(tree, layer="set"), problems


class _TooDeep(Exception):
    """An expression is nested beyond the limit."""


class _Builder:
    """Lark's tree to ours; unsupported forms, unknown escapes and deep expressions become diagnostics."""

    def __init__(self, source: SourceFile, problems: list[Diagnostic]) -> None:
        self.source = source
        self.problems = problems

    def span(self, node: Tree[Token] | Token) -> Span:
        if isinstance(node, Token):
            return Span(self.source.name, node.start_pos or 0, node.end_pos or 0)
        return Span(self.source.name, node.meta.start_pos, node.meta.end_pos)

    def document(self, tree: Tree[Token] | None) -> Document:
        blocks, params = [], []
        for item in tree.children if tree is not None else ():
            if isinstance(item, Token):
                continue
            if item.data == "block":
                blocks.append(self.block(item))
            elif item.data == "param":
                params.append(self.param(item))
            else:
                self.later(item)
        misnested = any(problem.code in _MISNESTED for problem in self.problems)
        return Document(tuple(blocks), tuple(params), bool(self.problems), misnested)

    def later(self, node: Tree[Token]) -> None:
        what = _LATER[str(node.data)]
        message = f"{what} is not supported yet by this version"
        help = "write the settings out, or use `param`"
        self.problems.append(Diagnostic("E0120", "error", message, self.span(node), help=help))

    def word(self, token: Token) -> Word:
        return Word(str(token), self.span(token))

    def param(self, node: Tree[Token]) -> Param:
        name, types, default = node.children
        assert isinstance(name, Token) and isinstance(types, Tree)
        words = tuple(self.word(token) for token in types.children if isinstance(token, Token))
        value = self.value(default) if isinstance(default, Tree) else None
        return Param(self.word(name), words, value, self.span(node))

    def block(self, node: Tree[Token]) -> BlockSyntax:
        kind, labels, copied, *members = node.children
        assert isinstance(kind, Token) and isinstance(labels, Tree)
        names: list[Word | Text] = []
        for label in labels.children:
            assert isinstance(label, Token)
            names.append(self.text(label) if label.type == "STRING" else self.word(label))
        if isinstance(copied, Tree):
            self.later(copied)
        body = [
            self.block(member) if member.data == "block" else self.attribute(member)
            for member in members
            if isinstance(member, Tree)
        ]
        head = self.span(kind)
        header = Span(head.file, head.start, names[-1].span.end if names else head.end)
        broken = isinstance(copied, Tree) or len(body) < len(members) or None in body
        kept = tuple(member for member in body if member is not None)
        return BlockSyntax(self.word(kind), tuple(names), kept, header, self.span(node), broken)

    def attribute(self, node: Tree[Token], layer: Literal["file", "set"] = "file") -> Attribute | None:
        path, value = node.children
        assert isinstance(path, Tree) and isinstance(value, Tree)
        expression = self.value(value)
        return None if expression is None else Attribute(self.path(path), expression, self.span(node), layer)

    def value(self, node: Tree[Token]) -> Expression | None:
        """A whole value, or None when it is too deep for the passes, which descend into it."""
        try:
            return self.expression(node)
        except _TooDeep:
            message = f"a value has more than {NESTING_LIMIT} operations inside each other"
            self.problems.append(Diagnostic("E0902", "error", message, self.span(node)))
            return None

    def path(self, node: Tree[Token]) -> Path:
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
                message = f"`\\{body}` is no escape"
                help = 'the escapes are \\" \\\\ \\n \\t and \\u with four hex digits'
                self.problems.append(Diagnostic("E0117", "error", message, place, help=help))
            return _ESCAPES.get(body, "")

        return Text(_ESCAPE.sub(resolve, str(token)[1:-1]), span)

    def expression(self, node: Tree[Token], depth: int = 0) -> Expression:
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

    def expressions(self, nodes: Sequence[Tree[Token] | Token | None], depth: int) -> tuple[Expression, ...]:
        return tuple(self.expression(node, depth + 1) for node in nodes if isinstance(node, Tree))
