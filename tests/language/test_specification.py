"""The specification's recipes do what its comments say; the reference is fresh."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from corpus import CORPUS
from test_pages import STANDARD

from rlhfdsl.language import load, reference

TEXT = (reference.FILE.parent / "specification.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```rlhf\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_recipe_of_the_specification(tmp_path: Path, text: str):
    for name in ("base", "models"):
        shutil.copy(CORPUS / "parts" / f"{name}.rlhf", tmp_path)
    expected = []
    for number, line in enumerate(text.split("\n"), 1):
        expected += [(number, code) for code in re.findall(r"# error: ([EW]\d{4})", line)]
    parts = list(STANDARD.items())[:1] if "extends" in text else STANDARD.items()
    more = "".join(line for head, line in parts if not re.search(rf"^{head}", text, re.MULTILINE))
    path = tmp_path / "t.rlhf"
    path.write_text(text + more, encoding="utf-8")
    compilation = load(path)
    found = [
        (compilation.sources[d.span.file].position(d.span.start)[0] if d.span else 0, d.code)
        for d in compilation.diagnostics
        if d.severity == "error"
    ]
    assert sorted(found) == sorted(expected)


def test_the_reference_is_fresh():
    assert reference.FILE.read_text(encoding="utf-8") == reference.generate()
