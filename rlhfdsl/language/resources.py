"""Find the files of grammar/: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def resource(folder: str, name: str = "") -> Path:
    """The path of `folder/name` (`grammar`, `recipes`); FileNotFoundError when the installation lacks it."""
    for root in (_PACKAGE, _PACKAGE.parent):
        path = root / folder / name
        if path.exists():
            return path
    raise FileNotFoundError(f"this installation of rlhfdsl lacks {folder}/{name}")
