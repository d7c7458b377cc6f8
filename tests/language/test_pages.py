"""The page of each code: there is one, and its recipes do what it says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpus import CORPUS

import rlhfdsl
from rlhfdsl.language import Diagnostic, load
from rlhfdsl.language.diagnostics.codes import CODES
from rlhfdsl.language.diagnostics.pages import codes, page

PACKAGE = Path(rlhfdsl.__file__).parent
_FENCE = re.compile(r"^```rlhf (ok|error=\w+)(?: ([^\n]*))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a snippet does not say itself.
STANDARD = {
    r"recipe ": 'recipe "x" { }\n',
    r"model base ": 'model base { from = "facebook/opt-125m" }\n',
    r"data rows ": 'data rows { from = "./rows.jsonl", format = preference }\n',
    r"stage ": "stage sft { model = model.base, data = data.rows, batch = 8, length = 64, lr = 1e-3 }\n",
}


def snippets() -> Iterator[tuple[str, str, str, str]]:
    for code in codes():
        text = page(code)
        assert text is not None
        for match in _FENCE.finditer(text):
            yield code, match.group(1), match.group(2) or "", match.group(3)


def compiled(tmp_path: Path, option: str, text: str) -> list[Diagnostic]:
    for name in ("base", "models"):
        shutil.copy(CORPUS / "parts" / f"{name}.rlhf", tmp_path)
    path = tmp_path / (option.removeprefix("file=") if option.startswith("file=") else "t.rlhf")
    if option != "none":
        parts = list(STANDARD.items())[:1] if "extends" in text else STANDARD.items()
        text += "".join(line for head, line in parts if not re.search(rf"^{head}", text, re.MULTILINE))
    path.write_text(text, encoding="utf-8")
    return [d for d in load(path).diagnostics]


@pytest.mark.parametrize(
    ("code", "kind", "option", "text"), snippets(), ids=lambda value: value if len(value) == 5 else ""
)
def test_the_recipes_of_a_page_do_what_it_says(tmp_path, code, kind, option, text):
    found = {d.code for d in compiled(tmp_path, option, text) if d.severity == "error" or code[0] == "W"}
    expected = {code} if kind != "ok" else set()
    assert found - ({"W0201"} if kind == "ok" else set()) == expected


def test_every_code_of_the_program_has_a_page_and_no_page_is_left_over():
    given = {
        code
        for path in PACKAGE.rglob("*.py")
        if path.name != "_tables.py"
        for code in re.findall(r"\"([EW]\d{4})\"", path.read_text(encoding="utf-8"))
    }
    assert given - set(codes()) == set(), "these codes have no page"
    assert set(codes()) - given == set(), "these pages have no code"
    assert CODES.keys() <= set(codes())


def test_pages_have_one_shape():
    for code in codes():
        text = page(code)
        assert text is not None and text.startswith(f"# {code}: ") and text.endswith("\n")
        title = text.partition("\n")[0].partition(": ")[2]
        assert not title.endswith(".") and CODES.get(code, title) == title
        assert len(text.split("\n")[2]) > 20


def test_a_page_of_no_code():
    assert page("E9999") is None and page("../codes") is None
