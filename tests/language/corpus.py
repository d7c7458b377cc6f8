"""The corpus of recipes and what its comments say of them."""

from __future__ import annotations

import re
from pathlib import Path

CORPUS = Path(__file__).parents[1] / "corpus"
OK = sorted((CORPUS / "ok").glob("*.rlhf"))
BAD = sorted((CORPUS / "bad").glob("*.rlhf"))

_EXPECTED = re.compile(r"# error:((?: [EW]\d{4})+)(?: at (\d+))?")


def expected(path: Path) -> list[tuple[int, str]]:
    """`# error: E0301` on a mistake's line, or `# error: E0109 at 2` where that line can hold no comment."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        for match in _EXPECTED.finditer(line):
            codes = match.group(1).split()
            found += [(int(match.group(2) or number), code) for code in codes]
    return sorted(found)
