"""The page of each code, behind `rlhf explain CODE`: what it means, a recipe that shows it, the way out."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def page(code: str) -> str | None:
    """The Markdown of a code's page; None when there is no such code."""
    path = _FOLDER / f"{code}.md"
    return path.read_text(encoding="utf-8") if code in codes() else None


def codes() -> list[str]:
    """Every code that has a page."""
    return sorted(path.stem for path in _FOLDER.glob("*.md"))
