"""Which brace of a text has no partner: told by how the lines are indented, for the parser learns of it too late.

Only the top-level blocks whose braces do not pair are looked at, and in them only what is indented below its opener:
a text that is written flat tells nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

# What only stands at the top level: at the start of a line it tells that the block above has ended.
TOP = re.compile(
    r'(?:recipe|cluster|model|data|blend|parallel|scorer|stage)\b[ \t]+["\w][^={\n]*\{|param[ \t]+\w+[ \t]*:'
    r"|(?:let[ \t]+\w+[ \t]*=|override[ \t]+[\w.]+[ \t]*\{|profile[ \t]+\w+[ \t]*\{)"
)
# In a line: a text, a comment, a text without its closing quote, or a brace.
_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|#.*|".*|[{}]')


@dataclass(frozen=True, slots=True)
class Missing:
    """A `{` at `opener` whose `}` would stand before `before`, the first code that is not in its block any more.

    `at` is where to write it, and `text` what.
    """

    opener: int
    before: int
    at: int
    text: str


@dataclass(frozen=True, slots=True)
class _Line:
    """A line that holds code: where the code begins and ends, its column, and its braces."""

    start: int
    end: int
    column: int
    braces: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class _Open:
    """A `{`: its line, and whether what it holds is indented below it."""

    at: int
    line: _Line
    deeper: bool


def unpaired(text: str) -> tuple[list[Missing], list[int]]:
    """The braces that lack their `}`, inner before outer where two end at one place, and those that are too many."""
    missing: list[Missing] = []
    extra: list[int] = []
    lines = list(_lines(text))
    heads = [number for number, line in enumerate(lines) if TOP.match(text, line.start) and line.column == 0]
    for first, last in pairwise([0, *heads, len(lines)]):
        if not _paired(lines[first:last]):
            end = lines[last].start if last < len(lines) else len(text)
            _walk(text, lines[first:last], end, missing, extra)
    return missing, extra


def _lines(text: str) -> Iterator[_Line]:
    """The lines that hold code."""
    at = 0
    for content in text.split("\n"):
        braces: list[tuple[int, str]] = []
        code = content
        for piece in _PIECE.finditer(content):
            start, word = piece.start(), piece.group()
            if word.startswith("#"):
                code = content[:start]
            elif not word.endswith('"') or word == '"':
                # In a text without its closing quote, only the braces at the line's end are taken for braces.
                kept = len(word.rstrip("} \t\r")) if word.startswith('"') else 0
                braces += [(at + start + i, brace) for i, brace in enumerate(word) if i >= kept and brace in "{}"]
        code = code.rstrip()
        indent = len(code) - len(code.lstrip())
        if code:
            yield _Line(at + indent, at + len(code), len(code[:indent].expandtabs(4)), tuple(braces))
        at += len(content) + 1


def _paired(lines: list[_Line]) -> bool:
    depth = 0
    for line in lines:
        for _, brace in line.braces:
            depth += 1 if brace == "{" else -1
            if depth < 0:
                return False
    return depth == 0


def _walk(text: str, lines: list[_Line], end: int, missing: list[Missing], extra: list[int]) -> None:
    """Pair the braces of one part, which ends at `end`, and add those that have no partner."""
    stack: list[_Open] = []
    for before, line, below in zip([lines[0], *lines], lines, [*lines[1:], None], strict=False):
        closes = text[line.start] == "}"
        while stack and stack[-1].deeper and line.column < stack[-1].line.column + (not closes):
            missing.append(_end(text, stack.pop(), before, line.start))
        for at, brace in line.braces:
            if brace == "{" and text[line.start : at].rstrip().endswith("{"):
                extra.append(at)
            elif brace == "{":
                lies_below = below is not None and (below.column > line.column or text[below.start] == "}")
                stack.append(_Open(at, line, at + 1 < line.end or lies_below))
            elif stack and below is not None and _goes_on(text, stack, at, line, below):
                if at == line.start:
                    wrong = line.column == stack[-1].line.column or before.column <= line.column
                else:
                    wrong = line.braces[0][0] < at
                extra += [at] if wrong else []  # else the `{` of its block is missing, of which the parser knows
            elif stack:
                stack.pop()
    if all(opened.deeper for opened in stack):
        missing += [_end(text, opened, lines[-1], end) for opened in reversed(stack)]


def _goes_on(text: str, stack: list[_Open], at: int, line: _Line, below: _Line) -> bool:
    """Whether the innermost block holds the line below too, so that the `}` that ends this line does not close it."""
    column = stack[-1].line.column
    if at + 1 != line.end or stack[-1].line is line or not stack[-1].deeper:
        return False
    if text[below.start] == "}" and below.column == column:  # the one below closes it, unless this one does so as well
        outer = len(stack) > 1 and stack[-2].line.column == column
        return not outer and (at > line.start or line.column != column)
    return below.column > column


def _end(text: str, opened: _Open, last: _Line, before: int) -> Missing:
    """The `}` that a block lacks, whose last line is `last`."""
    if last is opened.line:
        return Missing(opened.at, before, last.end, " }")
    newline = text.find("\n", last.end)
    start = text.rfind("\n", 0, opened.line.start) + 1
    return Missing(opened.at, before, len(text) if newline < 0 else newline, f"\n{text[start : opened.line.start]}}}")
