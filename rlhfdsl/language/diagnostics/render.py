"""Diagnostics as text, with windows of the source."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from rlhfdsl.language.diagnostics import Diagnostic, Span
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.terminal import same_width, visible

SHOWN = 50
_LINE = 100

_COLOURS = {"error": "1;31", "warning": "1;33", "rule": "34", "second": "36", "bold": "1"}


def render(diagnostics: Sequence[Diagnostic], sources: Mapping[str, SourceFile], colour: bool) -> str:
    """Every diagnostic with its window, at most 50; without a final newline, empty for none."""
    shown = [_one(diagnostic, sources, colour) for diagnostic in diagnostics[:SHOWN]]
    if len(diagnostics) > SHOWN:
        shown.append(f"… and {len(diagnostics) - SHOWN} more")
    return "\n\n".join(shown)


def _one(diagnostic: Diagnostic, sources: Mapping[str, SourceFile], colour: bool) -> str:
    def paint(text: str, name: str) -> str:
        return f"\x1b[{_COLOURS[name]}m{text}\x1b[0m" if colour else text

    head = paint(f"{diagnostic.severity}[{diagnostic.code}]", diagnostic.severity)
    lines = [f"{head}{paint(f': {visible(diagnostic.message)}', 'bold')}"]
    spans: list[tuple[Span, str, str]] = []
    if diagnostic.span is not None:
        spans.append((diagnostic.span, diagnostic.label, diagnostic.severity))
    spans += [(label.span, label.text, "second") for label in diagnostic.secondary]
    spans = [(span, text, style) for span, text, style in spans if span.file in sources]
    numbers = [sources[span.file].position(span.start)[0] for span, _, _ in spans]
    width = len(str(max(numbers, default=1)))
    rule = paint("|", "rule")
    files: dict[str, list[tuple[int, int, Span, str, str]]] = {}
    for number, (span, text, style) in zip(numbers, spans, strict=True):
        column = sources[span.file].position(span.start)[1]
        files.setdefault(span.file, []).append((number, column, span, text, style))
    for file, marks in files.items():
        source = sources[file]
        number, column = marks[0][:2]
        lines.append(f"{' ' * width}{paint('-->', 'rule')} {visible(file)}:{number}:{column}")
        lines.append(f"{' ' * width} {rule}")
        last = None
        for number, column, span, text, style in sorted(marks, key=lambda mark: mark[:2]):
            if last is not None and number > last + 1:
                lines.append(paint("...", "rule"))
            content = same_width(source.line(number))
            if cropped := len(content) > _LINE:
                # A line of a machine-made recipe can be long: show the part around the mark.
                left = max(0, column - 1 - _LINE // 4)
                content, column = content[left : left + _LINE], column - left
            if number != last or cropped:
                text_line = f"{paint(str(number).rjust(width), 'rule')} {rule} {content.expandtabs(4)}"
                lines.append(text_line.rstrip())
            last = number
            sign = "-" if style == "second" else "^"
            before = _width(content[: column - 1])
            length = max(1, _width(content[: column - 1 + span.end - span.start]) - before)
            mark = paint(f"{sign * length} {visible(text)}".rstrip(), style)
            lines.append(f"{' ' * width} {rule} {' ' * before}{mark}")
    tail = [("note", note) for note in diagnostic.notes] + (
        [("help", diagnostic.help)] if diagnostic.help else []
    )
    if tail and spans:
        lines.append(f"{' ' * width} {rule}")
    lines += [f"{' ' * width} {paint('=', 'rule')} {paint(name, 'bold')}: {visible(text)}" for name, text in tail]
    return "\n".join(lines)


def _width(text: str) -> int:
    """Columns that a text takes on a terminal: wide characters take two, combining ones none."""
    wide = sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text.expandtabs(4)
    )
    return wide
