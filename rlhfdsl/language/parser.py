"""Text to syntax tree, by the grammar in grammar/rlhf.lark, with every syntax error of the text."""

from __future__ import annotations

from rlhfdsl.language.build import Builder
from rlhfdsl.language.diagnostics import Diagnostic
from rlhfdsl.language.recovery import parse_all
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.syntax import Attribute, Document


def parse(source: SourceFile) -> tuple[Document, list[Diagnostic]]:
    """The tree of what could be read, and the syntax errors in the order of the text."""
    tree, problems = parse_all(source, "start")
    document = Builder(source, problems).document(tree)
    return document, problems


def parse_assignment(source: SourceFile) -> tuple[Attribute | None, list[Diagnostic]]:
    """The one `path = value` of a --set argument."""
    tree, problems = parse_all(source, "assignment")
    if tree is None or problems:
        return None, problems
    return Builder(source, problems).attribute(tree, layer="set"), problems
