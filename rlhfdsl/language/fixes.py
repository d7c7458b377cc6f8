"""Fixes carried out: the texts of the files as the diagnostics' edits make them."""

from __future__ import annotations

from pathlib import Path

from rlhfdsl.language.compile import Compilation, load
from rlhfdsl.language.diagnostics import Diagnostic, Edit
from rlhfdsl.language.source import Overlay

_ROUNDS = 10


def fix(
    path: Path, only: str | None = None, overlay: Overlay | None = None
) -> tuple[str | None, list[Diagnostic], Compilation]:
    """The mended text of a recipe (None when there is nothing to mend), what was mended, and what is left.

    Only diagnostics with exactly one fix, in the file itself; `only` takes those of one code. A round of fixes
    that leaves more errors than before is not kept. `overlay` gives the texts that an editor holds.
    """
    text: str | None = None
    mended: list[Diagnostic] = []
    compilation = load(path, overlay=overlay)
    for _ in range(_ROUNDS):
        source = compilation.sources.get(path.as_posix())
        if source is None:
            break
        chosen, edits = _choose(compilation, source.name, only)
        if not edits:
            break
        fixed = apply(source.text, edits)
        after = load(path, overlay=_instead(path, fixed, overlay))
        if _left(after) > _left(compilation):
            break
        text, compilation = fixed, after
        mended += chosen
    return text, mended, compilation


def _instead(path: Path, text: str, overlay: Overlay | None) -> Overlay:
    return lambda asked: text if asked == path else overlay(asked) if overlay is not None else None


def apply(text: str, edits: list[Edit]) -> str:
    """The text with edits of disjoint spans carried out."""
    for edit in sorted(edits, key=lambda edit: -edit.span.start):
        text = text[: edit.span.start] + edit.text + text[edit.span.end :]
    return text


def _choose(compilation: Compilation, file: str, only: str | None) -> tuple[list[Diagnostic], list[Edit]]:
    """The diagnostics to mend and their edits, those of one place only once."""
    chosen: list[Diagnostic] = []
    edits: list[Edit] = []
    for diagnostic in compilation.diagnostics:
        if len(diagnostic.fixes) != 1 or (only is not None and diagnostic.code != only):
            continue
        new = list(diagnostic.fixes[0].edits)
        inside = all(edit.span.file == file for edit in new)
        apart = all(a.span.end <= b.span.start or b.span.end <= a.span.start for a in new for b in edits)
        if inside and apart:
            chosen.append(diagnostic)
            edits += new
    return chosen, edits


def _left(compilation: Compilation) -> tuple[bool, int]:
    """Whether brackets do not pair up, for then no other mistakes are told, and the number of errors."""
    misnested = compilation.document is not None and compilation.document.misnested
    return misnested, sum(diagnostic.severity == "error" for diagnostic in compilation.diagnostics)
