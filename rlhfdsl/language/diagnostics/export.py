"""Diagnostics for other programs: JSON, which is the stable interface, SARIF 2.1.0, and GitHub's commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhfdsl.language.diagnostics import Diagnostic, Span
from rlhfdsl.language.diagnostics.codes import CODES
from rlhfdsl.language.source import SourceFile

Sources = Mapping[str, SourceFile]


def as_json(diagnostics: Sequence[Diagnostic], sources: Sources) -> dict[str, Any]:
    """`{"format_version": "1.0", "diagnostics": […]}`: lines and columns from 1, offsets from 0."""
    return {"format_version": "1.0", "diagnostics": [_json(one, sources) for one in diagnostics]}


def _json(diagnostic: Diagnostic, sources: Sources) -> dict[str, Any]:
    return {
        "code": diagnostic.code,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        "span": _span(diagnostic.span, sources),
        "label": diagnostic.label,
        "secondary": [
            {"span": _span(label.span, sources), "text": label.text} for label in diagnostic.secondary
        ],
        "notes": list(diagnostic.notes),
        "help": diagnostic.help,
        "fixes": [
            {
                "title": fix.title,
                "edits": [{"span": _span(edit.span, sources), "text": edit.text} for edit in fix.edits],
            }
            for fix in diagnostic.fixes
        ],
    }


def _span(span: Span | None, sources: Sources) -> dict[str, Any] | None:
    if span is None or span.file not in sources:
        return None
    line, column = sources[span.file].position(span.start)
    end_line, end_column = sources[span.file].position(span.end)
    return {
        "file": span.file,
        "start": {"line": line, "column": column, "offset": span.start},
        "end": {"line": end_line, "column": end_column, "offset": span.end},
    }


def as_sarif(diagnostics: Sequence[Diagnostic], sources: Sources, version: str) -> dict[str, Any]:
    """A SARIF 2.1.0 log of one run; `version` is the program's."""
    codes = sorted({diagnostic.code for diagnostic in diagnostics})
    rules = [
        {"id": code, "shortDescription": {"text": CODES[code]}} if code in CODES else {"id": code}
        for code in codes
    ]
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": {"name": "rlhf", "version": version, "rules": rules}},
                "columnKind": "unicodeCodePoints",
                "results": [_result(one, codes, sources) for one in diagnostics],
            }
        ],
    }


def _result(diagnostic: Diagnostic, codes: list[str], sources: Sources) -> dict[str, Any]:
    parts = [diagnostic.message, *diagnostic.notes, *([diagnostic.help] if diagnostic.help else [])]
    result: dict[str, Any] = {
        "ruleId": diagnostic.code,
        "ruleIndex": codes.index(diagnostic.code),
        "level": diagnostic.severity,
        "message": {"text": "; ".join(parts)},
        "locations": [_location(diagnostic.span, sources)] if _known(diagnostic.span, sources) else [],
    }
    related = [label for label in diagnostic.secondary if _known(label.span, sources)]
    if related:
        result["relatedLocations"] = [
            _location(label.span, sources) | {"id": number, "message": {"text": label.text}}
            for number, label in enumerate(related)
        ]
    if diagnostic.fixes:
        result["fixes"] = [
            {
                "description": {"text": fix.title},
                "artifactChanges": [
                    {
                        "artifactLocation": {"uri": edit.span.file},
                        "replacements": [
                            {"deletedRegion": _region(edit.span, sources), "insertedContent": {"text": edit.text}}
                        ],
                    }
                    for edit in fix.edits
                ],
            }
            for fix in diagnostic.fixes
        ]
    return result


def _known(span: Span | None, sources: Sources) -> bool:
    return span is not None and span.file in sources


def _location(span: Span | None, sources: Sources) -> dict[str, Any]:
    assert span is not None
    return {
        "physicalLocation": {"artifactLocation": {"uri": span.file}, "region": _region(span, sources)}
    }


def _region(span: Span, sources: Sources) -> dict[str, Any]:
    line, column = sources[span.file].position(span.start)
    end_line, end_column = sources[span.file].position(span.end)
    return {
        "startLine": line,
        "startColumn": column,
        "endLine": end_line,
        "endColumn": end_column,
        "charOffset": span.start,
        "charLength": span.end - span.start,
    }


def as_github(diagnostics: Sequence[Diagnostic], sources: Sources) -> str:
    """GitHub's workflow commands, one line each, which show as annotations of a pull request."""
    return "\n".join(_github(diagnostic, sources) for diagnostic in diagnostics)


def _github(diagnostic: Diagnostic, sources: Sources) -> str:
    properties = {"title": diagnostic.code}
    span = diagnostic.span
    if span is not None and span.file in sources:
        line, column = sources[span.file].position(span.start)
        properties = {"file": span.file, "line": str(line), "col": str(column)} | properties
    text = ",".join(f"{key}={_escaped(value, ':,')}" for key, value in properties.items())
    message = diagnostic.message + (f" ({diagnostic.help})" if diagnostic.help else "")
    return f"::{diagnostic.severity} {text}::{_escaped(message, '')}"


def _escaped(text: str, more: str) -> str:
    for char in "%\r\n" + more:
        text = text.replace(char, f"%{ord(char):02X}")
    return text
