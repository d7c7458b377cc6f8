"""The one canonical form of a recipe's text. It changes space, line ends and needless commas, nothing else.

The tokens of the text are laid out anew: two spaces for each open bracket; a block or list is on one line when
it was and fits, else it has one member on each line; `=` and comments stand below each other over lines in
a row. So no comment can get lost. Every run checks itself: the same tree, the same comments, stable.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from rlhfdsl.language.diagnostics import Diagnostic, Span
from rlhfdsl.language.parser import parse
from rlhfdsl.language.source import SourceFile, examine

WIDTH = 120
TOKEN = re.compile(
    r'(?P<text>"(?:[^"\\\n]|\\.)*")|(?P<comment>\#[^\n]*)|(?P<line>\n)|(?P<space>[ \t\r]+)'
    r"|(?P<number>[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?:[A-Za-z_]\w*|%)?)"
    r"|(?P<name>[A-Za-z_]\w*)|(?P<sign>.)",
    re.ASCII,
)
_OPEN, _CLOSE = "{[(", "}])"
_PAIRS = {"}": "{", "]": "[", ")": "("}
_BEFORE_SIGN = ("=", "(", "[", ",", "+", "-", "*", "/")
_TOUCHES_NEXT = ("(", "[", ".", "|")
_TOUCHES_BEFORE = (")", "]", ",", ".", ":", "|")


class Token(NamedTuple):
    """A piece of the text: its kind (`text`, `comment`, `line`, `number`, `name`, `sign`) and itself."""

    kind: str
    text: str


NEWLINE = Token("line", "\n")
COMMA = Token("sign", ",")


class NotEquivalent(Exception):
    """A bug of the formatter, found before anything is written: the result would not say the same."""


def format_text(source: SourceFile) -> tuple[str | None, list[Diagnostic]]:
    """The text in its canonical form; None with the errors of a text that cannot be parsed."""
    problems = examine(source)
    if problems:
        return None, problems
    document, problems = parse(source)
    if problems:
        return None, problems
    text = layout(source.text)
    again, problems = parse(SourceFile(source.name, text))
    if problems or bare(document) != bare(again) or _comments(source.text) != _comments(text):
        raise NotEquivalent(f"the formatted text of {source.name} would not say the same")
    if layout(text) != text:
        raise NotEquivalent(f"the formatted text of {source.name} is not stable")
    return text, []


def layout(text: str) -> str:
    """The canonical form of a text without syntax errors."""
    tokens = [
        Token(match.lastgroup or "", match.group().rstrip())
        if match.lastgroup == "comment"
        else Token(match.lastgroup or "", match.group())
        for match in TOKEN.finditer(text)
        if match.lastgroup != "space"
    ]
    while True:
        tokens = _break(tokens)
        rows = _rows(tokens)
        wide = [row.opener for row in rows if row.width > WIDTH and row.opener is not None]
        if not wide:
            break
        # A newline after the bracket makes it one of several lines, which _break then lays out.
        for opener in reversed(wide):
            tokens.insert(opener + 1, NEWLINE)
    return "\n".join(_aligned(_spaced(rows))) + "\n"


def bare(node: Any) -> Any:
    """A syntax tree without its spans, to compare what two texts say."""
    if isinstance(node, tuple):
        return tuple(bare(item) for item in node)
    if isinstance(node, Span):
        return None
    if dataclasses.is_dataclass(node):
        return (type(node).__name__, *(bare(getattr(node, field.name)) for field in dataclasses.fields(node)))
    return node


def _comments(text: str) -> list[str]:
    return [m.group().rstrip() for m in TOKEN.finditer(text) if m.lastgroup == "comment"]


def _break(tokens: list[Token]) -> list[Token]:
    """Blocks and lists of several lines get one member a line; commas stand where they are needed."""
    closers: dict[int, int] = {}
    open_: list[int] = []
    for index, token in enumerate(tokens):
        if token.kind == "sign" and token.text in _OPEN:
            open_.append(index)
        elif token.kind == "sign" and token.text in _CLOSE and open_:
            closers[open_.pop()] = index
    out: list[Token] = []
    inside: list[tuple[str, bool]] = []  # the open brackets, and whether each has several lines
    for index, token in enumerate(tokens):
        after = tokens[index + 1] if index + 1 < len(tokens) else NEWLINE
        ends = after.kind in ("line", "comment")
        bracket, many = inside[-1] if inside else ("", True)
        if token.kind != "sign":
            if token.kind != "line" or many or bracket == "(":
                out.append(token)
        elif token.text in _OPEN:
            body = tokens[index + 1 : closers.get(index, index + 1)]
            many = any(t.kind in ("line", "comment") for t in body) and any(t.kind != "line" for t in body)
            inside.append((token.text, many))
            out.append(token)
            if many and not ends and token.text != "(":
                out.append(NEWLINE)
        elif token.text in _CLOSE:
            if inside:
                inside.pop()
            if many and bracket == "[" and _last(out).text not in (",", "["):
                _insert_comma(out)
            if many and bracket in ("{", "[") and out[-1].kind != "line":
                out.append(NEWLINE)
            out.append(token)
        elif token.text == "," and bracket == "{":
            if many and not ends:
                out.append(NEWLINE)
            elif not many and after.text != "}":
                out.append(token)
        elif token.text == "," and bracket == "[":
            if many or after.text != "]":
                out.append(token)
            if many and not ends:
                out.append(NEWLINE)
        else:
            out.append(token)
    return out


def _last(tokens: list[Token]) -> Token:
    return next(token for token in reversed(tokens) if token.kind not in ("line", "comment"))


def _insert_comma(tokens: list[Token]) -> None:
    """A comma behind the last item of a list, before comments and line ends."""
    at = len(tokens)
    while tokens[at - 1].kind in ("line", "comment"):
        at -= 1
    tokens.insert(at, COMMA)


@dataclasses.dataclass(slots=True)
class Row:
    """A line: its depth, the left side of its `=` or all of it, the right side, its comment.

    `opener` is the index among all tokens of the first bracket that the line opens and closes.
    """

    depth: int
    left: str = ""
    right: str | None = None
    comment: str = ""
    opener: int | None = None
    opens: bool = False
    closes: bool = False

    @property
    def blank(self) -> bool:
        """Whether nothing stands on it."""
        return not self.left and not self.comment

    @property
    def width(self) -> int:
        """Columns of it, without its comment."""
        right = "" if self.right is None else f" = {self.right}"
        return 2 * self.depth + len(self.left) + len(right)


def _rows(tokens: list[Token]) -> list[Row]:
    rows: list[Row] = []
    depth = start = 0
    for index in range(len(tokens) + 1):
        if index < len(tokens) and tokens[index].kind != "line":
            continue
        line = tokens[start:index]
        lead = 0
        while lead < len(line) and line[lead].text in _PAIRS:
            lead += 1
        row = Row(max(depth - lead, 0))
        stack: list[int] = []
        for offset, token in enumerate(line):
            if token.kind == "sign" and token.text in _OPEN:
                stack.append(start + offset)
                depth += 1
            elif token.kind == "sign" and token.text in _CLOSE:
                depth = max(depth - 1, 0)
                if stack:
                    opened = stack.pop()
                    if tokens[opened].text != "(" and opened + 1 < start + offset:
                        row.opener = opened if row.opener is None else min(row.opener, opened)
        if line and line[-1].kind == "comment":
            row.comment = line.pop().text
        equals = next((i for i, token in enumerate(line) if token == ("sign", "=")), None)
        if equals is not None and not any(token.text in _OPEN for token in line[:equals]):
            row.left, row.right = _glue(line[:equals]), _glue(line[equals + 1 :])
        else:
            row.left = _glue(line)
        row.opens = bool(line) and line[-1].text in ("{", "[", "(")
        row.closes = lead > 0
        rows.append(row)
        start = index + 1
    return rows


def _glue(tokens: list[Token]) -> str:
    """The tokens of a line with the spaces that stand between them."""
    out = ""
    for index, token in enumerate(tokens):
        before = tokens[index - 1] if index else None
        if before is not None:
            sign = before.text == "-" and (index < 2 or tokens[index - 2].text in _BEFORE_SIGN)
            call = token.text == "(" and before.kind == "name"
            touches = before.kind == "sign" and before.text in _TOUCHES_NEXT
            touched = token.kind == "sign" and token.text in _TOUCHES_BEFORE
            if not (sign or call or touches or touched):
                out += " "
        out += token.text
    return out


def _spaced(rows: list[Row]) -> list[Row]:
    """The rows with one blank line at most in a row, and one around a top-level block of several lines."""
    out: list[Row] = []
    above = True  # whether a blank line here would be needless
    for index, row in enumerate(rows):
        if row.blank:
            if above:
                continue
            following = next((later for later in rows[index:] if not later.blank), None)
            if following is not None and not following.closes:
                out.append(Row(0))
                above = True
            continue
        if row.depth == 0 and row.opens and not row.closes:
            at = len(out)
            while at and out[at - 1].depth == 0 and not out[at - 1].left and out[at - 1].comment:
                at -= 1
            if at and not out[at - 1].blank:
                out.insert(at, Row(0))
        out.append(row)
        above = row.opens
        more = index + 1 < len(rows) and any(not later.blank for later in rows[index + 1 : index + 3])
        if row.depth == 0 and row.closes and more:
            out.append(Row(0))
            above = True
    return out


def _aligned(rows: list[Row]) -> list[str]:
    """The lines, with `=` and comments below each other over attributes in a row."""
    out: list[str] = []
    index = 0
    while index < len(rows):
        run = [rows[index]]
        while (
            rows[index].depth
            and run[0].right is not None
            and not run[-1].opens
            and index + len(run) < len(rows)
            and rows[index + len(run)].right is not None
            and rows[index + len(run)].depth == run[0].depth
        ):
            run.append(rows[index + len(run)])
        index += len(run)
        left = max(len(row.left) for row in run)
        codes = [
            "  " * row.depth + (row.left if row.right is None else f"{row.left:<{left}} = {row.right}")
            for row in run
        ]
        width = max(map(len, codes))
        for row, code in zip(run, codes, strict=True):
            if row.comment and row.left:
                code = f"{code:<{width}}  {row.comment}"
            out.append((code + row.comment if not row.left else code).rstrip())
    return out
