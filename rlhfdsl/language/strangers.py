"""What a file is that somebody took for a recipe: told once, instead of an error for each of its lines."""

from __future__ import annotations

import json
import re

_BINARY = frozenset({*range(9), *range(14, 27)})  # bytes that no text has
_JSON = re.compile(r'\s*(?:\{\s*(?:"(?:[^"\\\n]|\\.)*"\s*:|\})|\[\s*[\[{"\]])')  # no recipe begins like this
_KEY = re.compile(r"^[A-Za-z_][\w.-]*:(?:\s|$)", re.MULTILINE)
_BLOCK = re.compile(r"^\s*\w[^\n:]*\{", re.MULTILINE)

START = "`rlhf init` writes a recipe to start from"


def stranger(data: bytes, name: str) -> tuple[str, str] | None:
    """What a file is by its first bytes, and what to do with it; None for what may be a recipe, good or bad."""
    head = data[:4096]
    if not head.startswith((b"\xff\xfe", b"\xfe\xff")) and sum(byte in _BINARY for byte in head) >= 4:
        return "a binary file", "name the .rlhf file itself"
    text = data.decode("utf-8-sig", errors="replace")
    if _JSON.match(text):
        return _json(text, name)
    if len(_KEY.findall(text)) > 1 and not _BLOCK.search(text):
        return "YAML, as other trainers are set up", f"`rlhf import {name}` makes a recipe of what it knows"
    return None


def _json(text: str, name: str) -> tuple[str, str]:
    first, *more = text.strip().split("\n", 2)
    if '"format_version"' in text[:4096] and '"stages"' in text:
        return "a saved plan", f"`rlhf run {name}` runs it"
    if more and more[0].lstrip().startswith("{") and _whole(first):
        path = name if name.startswith(("/", ".")) else f"./{name}"
        return "JSON lines, as data is written", f'a recipe names it: data rows {{ from = "{path}", format = … }}'
    return "JSON", START


def _whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
